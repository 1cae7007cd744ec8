"""A step over a layout: by hand and through `make_update`, and what XLA made of it."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from models import Model
from steps import copied

import functrain as ft

_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


class Candidate(NamedTuple):
    """A compiled step that goes on from where it is, and what is known of it."""

    run: Callable[[], Any]
    compiled: Any
    seconds: float
    state_bytes: int


def data_mesh() -> Any:
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def stepping(step: Any, state: Any, batch: Any, state_bytes: int) -> Candidate:
    """A candidate of `step(state, batch) -> (state, loss)`, jitted and donating."""
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    here = state

    def run() -> Any:
        nonlocal here
        here, loss = compiled(here, batch)
        return loss

    return Candidate(run, compiled, seconds, state_bytes)


def bytes_on_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def collectives(compiled: Any, kind: str = "all-[a-z-]+|reduce-scatter|collective-[a-z-]+") -> tuple[int, float]:
    """How many collectives a program has, and the bytes that they give each device."""
    count, total = 0, 0.0
    for shapes in re.findall(rf"= (.*?) (?:{kind})\(", compiled.as_text()):
        count += 1
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = _WIDTHS.get(dtype, 4)
            for each in filter(None, dims.split(",")):
                size *= int(each)
            total += size
    return count, total


class ByHand(NamedTuple):
    """A step that one jits over a layout, donating its state of params and optimizer state, and where these lie."""

    jitted: Any
    init: Callable[[Any], Any]
    shardings: Any

    def state(self, params: Any) -> Any:
        return jax.device_put(self.init(copied(params)), self.shardings)

    def abstract(self, params: Any) -> Any:
        shapes = jax.eval_shape(self.init, params)
        return jax.tree.map(
            lambda leaf, here: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes, self.shardings
        )


def by_hand(model: Model, layout: ft.Layout, *, clip_norm: float | None = None) -> ByHand:
    """Gradients and moments are cut as the layout says; the norm is optax's, whose sums the partitioner is left to."""
    tx = optax.adamw(1e-3)

    def init(params: Any) -> Any:
        return params, tx.init(params)

    def beside(path: Any, _: Any) -> Any:
        return layout.of_state("/".join(key.key for key in path))

    moments = jax.tree_util.tree_map_with_path(beside, model.params)
    everywhere = jax.NamedSharding(layout.mesh, jax.P())
    of_state = optax.tree_map_params(
        tx,
        lambda _, here: here,
        jax.eval_shape(tx.init, model.params),
        moments,
        transform_non_params=lambda _: everywhere,
    )
    shardings = (layout.shardings(model.params), of_state)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(model.loss)(params, batch)
        grads = jax.lax.with_sharding_constraint(grads, moments)
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / optax.global_norm(grads))
            grads = jax.tree.map(lambda leaf: leaf * scale, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return ByHand(jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)), init, shardings)


def update_over(model: Model, layout: ft.Layout, **options: Any) -> ft.Update:
    """The same update, with options of the optimizer."""
    parts = ft.partition(model.params, {"all": ...})
    return ft.make_update(model.loss, ft.Optimizer(parts, {"all": optax.adamw(1e-3)}, layout=layout, **options))


def updating(update: ft.Update, params: Any, batch: Any) -> Candidate:
    """A candidate of an update over a layout."""
    start = time.perf_counter()
    compiled = update.lower(update.abstract(params), batch).compile()
    seconds = time.perf_counter() - start
    here = update.init(params)

    def run() -> Any:
        nonlocal here
        here, metrics = update(here, batch)
        return metrics["loss"]

    return Candidate(run, compiled, seconds, bytes_on_a_device(here.opt_state))
