"""What a backward pass needs of its forward pass: the residuals that JAX keeps between the two."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from functrain.gradients.loss import Context
from functrain.planning.compiling import FAST
from functrain.update.metrics import metrics_of
from functrain.update.state import TrainState
from functrain.update.step import Step
from functrain.update.update import Update


def bytes_of_residuals(update: Update, state: TrainState, batch: Any) -> int:
    """The bytes of each device's residuals, in the phase that has the most; parameters and the batch are none.

    Over several devices they lie as XLA lays them out in the forward pass, which is compiled for that.

    >>> import functrain as ft, optax
    >>> params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 1))}
    >>> optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    >>> update = ft.make_update(lambda params, x: jnp.mean(x @ params["w"] @ params["v"]), optim)
    >>> bytes_of_residuals(update, update.abstract(params), jnp.ones((8, 4)))  # What comes before v: 8 x 4 float32.
    128

    Args:
      update: the update.
      state: of `update.abstract`.
      batch: of one call, in shapes with shardings; of microbatches each is taken by itself.
    """
    steps = update.stages[update.optim.stage(max(update.optim.frozen_until.values(), default=0))]
    batch, before, most = _slice(batch, update.options.microbatches), dict[str, Any](), 0
    for step in steps:
        context = Context(state.key, state.model_state, jax.ShapeDtypeStruct((), jnp.int32), before or None)
        most = max(most, _bytes(jax.jit(_forward(step)), state.params, batch, context))
        if len(steps) > 1:
            before[step.name] = jax.eval_shape(_metrics(step), state.params, batch, context)
    return most


def _forward(step: Step) -> Any:
    """From what a step takes to the residuals of its losses."""
    parts = step.options.optim.parts

    def forward(params: Any, batch: Any, context: Context) -> list[jax.Array]:
        def losses(mine: Any) -> Any:
            return step.objective.losses(step.objective.cast(parts.merge(mine, into=params)), batch, context)[0]

        split = parts.split(params)
        _, backward = jax.vjp(losses, {part: split[part] for part in step.parts})
        given = {id(leaf) for leaf in jax.tree.leaves((params, batch, context))}
        found = {id(leaf): leaf for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array)}
        return [leaf for key, leaf in found.items() if key not in given]

    return forward


def _metrics(step: Step) -> Any:
    def metrics(params: Any, batch: Any, context: Context) -> Any:
        _, loss = step.objective.losses(step.objective.cast(params), batch, context)
        return metrics_of(loss, loss.total)

    return metrics


def _bytes(forward: Any, *arguments: Any) -> int:
    lowered = forward.lower(*arguments)
    leaves = jax.tree.leaves(lowered.out_info)
    shapes = [leaf.shape for leaf in leaves]
    if any(getattr(leaf, "sharding", None) is not None for leaf in jax.tree.leaves(arguments)):
        places = jax.tree.leaves(lowered.compile(compiler_options=FAST).output_shardings)
        shapes = [place.shard_shape(leaf.shape) for place, leaf in zip(places, leaves, strict=True)]
    return sum(math.prod(shape) * int(leaf.dtype.itemsize) for shape, leaf in zip(shapes, leaves, strict=True))


def _slice(batch: Any, count: int) -> Any:
    """The shapes of a microbatch."""

    def of(leaf: Any) -> Any:
        shape, sharding = jnp.shape(leaf), getattr(leaf, "sharding", None)
        first = (shape[0] // count, *shape[1:]) if shape else shape
        return jax.ShapeDtypeStruct(first, jnp.result_type(leaf), sharding=sharding)

    return batch if count == 1 else jax.tree.map(of, batch)
