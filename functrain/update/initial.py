"""How a state starts: every buffer its own, laid out as params are; and its shapes, without computing anything."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import UpdateError
from functrain.optim.adoption import Adoption
from functrain.tree.arrays import as_array, committed_sharding, placed, replicated_over, shortest
from functrain.tree.paths import PyTree, flatten
from functrain.tree.text import listed
from functrain.update.ema import adopted_ema
from functrain.update.options import Options
from functrain.update.placing import in_layout, places
from functrain.update.state import TrainState


def initial_state(
    options: Options, params: PyTree, *, model_state: Any, key: Any, configuration: str, copy: bool
) -> TrainState:
    """A state whose every buffer is its own, so that all of it can be donated."""
    check_key(key)
    params = options.whole.arrays(params)
    arrays = jax.Array | np.ndarray | np.generic | int | float | complex
    if bad := [path for path, leaf in flatten(params).items() if not isinstance(leaf, arrays)]:
        raise UpdateError(
            f"params hold {listed(bad)}, which is no array, and was one when they were partitioned: give params like"
            " those, or make a partition of these"
        )
    taken = {id(leaf) for leaf in jax.tree.leaves((params, model_state))} if copy else set()
    if options.optim.layout is not None:
        params = options.optim.layout.put(params)
    params, model_state = jax.tree.map(as_array, (params, model_state))
    replicated = replicated_over(params)

    def in_its_own_buffer(leaf: Any) -> Any:
        if id(leaf) in taken:
            leaf = jnp.array(leaf, copy=True)
        taken.add(id(leaf))
        sharding = None if isinstance(leaf, jax.core.Tracer) else committed_sharding(leaf)
        if sharding is not (short := shortest(sharding)):
            leaf = jax.device_put(leaf, short)
        return leaf if replicated is None or committed_sharding(leaf) else placed(leaf, replicated)

    counter = np.zeros((), np.int64)
    on_device = {
        "params": params,
        "model_state": model_state,
        "key": key,
        **_made_of(options, params),
    }
    return TrainState(
        **jax.tree.map(in_its_own_buffer, on_device),
        step=counter,
        batches=counter,
        pending=counter,
        window=None,
        configuration=configuration,
    )


def check_key(key: Any) -> None:
    """Raises for what is no random key.

    Raises:
      UpdateError: says how to make one.
    """
    if isinstance(key, int | np.integer):
        raise UpdateError(f"key={key}: give a random key, key=jax.random.key({key})")


def abstract_state(options: Options, params: PyTree, *, model_state: Any, key: Any, configuration: str) -> TrainState:
    """The shapes, dtypes and shardings of an initial state, from arrays or shapes, without computing anything."""
    counter = jax.ShapeDtypeStruct((), np.dtype(np.int64))
    params = options.whole.arrays(params)
    if options.optim.layout is not None:
        params = options.optim.layout.abstract(params)

    def initial(params: PyTree, model_state: Any, key: Any) -> TrainState:
        return TrainState(
            params=params,
            model_state=model_state,
            key=key,
            **_made_of(options, params),
            step=None,
            batches=None,
            pending=None,
            window=None,
            configuration=configuration,
        )

    shapes = jax.eval_shape(initial, params, model_state, key)
    replicated = replicated_over(params)
    if replicated is not None:
        as_given = (params, model_state, key)
        of_params, of_model, of_key = jax.tree.map(
            lambda leaf: shortest(committed_sharding(leaf) or replicated), as_given
        )
        shardings = dataclasses.replace(
            shapes,
            params=of_params,
            opt_state=options.optim.shardings(of_params),
            model_state=of_model,
            scale_state=jax.tree.map(lambda _: replicated, shapes.scale_state),
            ema=options.averages and options.averages.shardings(of_params, replicated),
            key=of_key,
        )
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )
    state: TrainState = dataclasses.replace(shapes, step=counter, batches=counter, pending=counter)
    return state


def adopted_state(
    options: Options, other: Options, state: TrainState, *, configuration: str
) -> tuple[TrainState, Adoption]:
    """A state with what fits of that of other options, and what became of the rest."""
    state = in_layout(options, state)
    opt_state, report = options.optim.adopt(other.optim, state.opt_state, state.params)
    scale_state, ema = None, None
    if options.loss_scale is not None:
        scale_state = options.loss_scale.init() if state.scale_state is None else state.scale_state
    mine, its = options.averages, other.averages
    if mine is not None or its is not None:
        fresh, decays = (mine.init(state.params), mine.decays) if mine else ({}, {})
        found, report = adopted_ema(fresh, decays, state.ema or {}, its.decays if its else {}, report)
        ema = found or None
        if mine is not None and options.optim.layout is not None:
            ema = jax.device_put(ema, places(options, options.optim.layout, state.params)["ema"])
    new = dataclasses.replace(state, opt_state=opt_state, scale_state=scale_state, ema=ema, configuration=configuration)
    return new, report


def _made_of(options: Options, params: PyTree) -> dict[str, Any]:
    """The fields that begin with what the options and the params say."""
    return {
        "opt_state": options.optim.init(params),
        "scale_state": options.loss_scale and options.loss_scale.init(),
        "ema": options.averages and options.averages.init(params),
    }
