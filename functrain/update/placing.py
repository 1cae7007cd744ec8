"""Where what an update is given lies, and where the layout of its optimizer has it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from functrain.errors import UpdateError
from functrain.mesh.layout import Layout, written
from functrain.tree.arrays import committed_sharding, shortest
from functrain.tree.paths import PyTree, flatten
from functrain.tree.warn import warn
from functrain.update.options import Options
from functrain.update.packed import as_it_was
from functrain.update.state import TrainState


def with_window_in_place(options: Options, state: TrainState) -> TrainState:
    """A state whose pending window lies where its update has it: a checkpoint knows the places of parameters alone."""
    if state.window is None:
        return state
    window = options.fitted(state.window)
    if options.places_of_sums is None:
        return dataclasses.replace(state, window=window)
    mine = next(iter(window.grads.values())) if options.by_loss else window.grads
    return dataclasses.replace(state, window=dataclasses.replace(window, grads=options.in_place(window.grads, [*mine])))


def check_places(options: Options, state: TrainState, batch: Any) -> None:
    """Raises for a batch on other devices than the layout has; warns of a state elsewhere, as one of another layout is.

    Raises:
      UpdateError: says how to bring the batch there.
    """
    layout = options.optim.layout
    if layout is None or layout.mesh.size == 1:
        return
    if jax.process_count() == 1:  # Else each has some of the devices.
        _check_devices(batch, layout)
    there = as_it_was(state)
    held = flatten({"params": there.params, "opt_state": there.opt_state, "ema": there.ema})
    for path, place in flatten(places(options, layout, there.params)).items():
        leaf: Any = held.get(path)
        lies, is_anywhere = committed_sharding(leaf), isinstance(leaf, jax.Array) and not leaf.committed
        if is_anywhere or (lies is not None and not lies.is_equivalent_to(place, np.ndim(leaf))):
            where = "on one device" if lies is None else f"in {_in_words(lies)}"
            warn(
                f"the state's {path!r} lies {where}, and the layout of the optimizer has it in"
                f" {_in_words(place)}: it stays where it is, and each update moves it there and back. Bring the state"
                " to its place, state, report = update.adopt(update, state), and a checkpoint by"
                " restore(like=update.abstract(params))"
            )
            return


def _check_devices(batch: Any, layout: Layout) -> None:
    devices = {*layout.mesh.devices.flat}
    for path, leaf in flatten(batch).items():
        lies = committed_sharding(leaf)
        if lies is not None and lies.device_set != devices:
            what = f"{path!r} of the batch" if path else "the batch"
            raise UpdateError(
                f"{what} lies on {len(lies.device_set)} device(s), and not on the {len(devices)} of the layout's mesh:"
                " write layout.batch(batch), or give arrays of NumPy"
            )


def _in_words(sharding: Any) -> str:
    if not isinstance(sharding, jax.NamedSharding):
        return str(sharding)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sharding.mesh.shape.items())
    return f"{written(sharding.spec)} over {mesh}, memory {sharding.memory_kind!r}"


def places(options: Options, layout: Layout, params: PyTree) -> dict[str, Any]:
    """Where a layout has what there is of every parameter, as the fields of a state."""
    of_params, averages = layout.shardings(params), options.averages
    return {
        "params": of_params,
        "opt_state": options.optim.shardings(of_params),
        "ema": averages and averages.shardings(of_params, jax.NamedSharding(layout.mesh, jax.P())),
    }


def in_layout(options: Options, state: TrainState) -> TrainState:
    """A state whose params lie where a layout has them, and what is of no params on the devices of its mesh."""
    layout = options.optim.layout
    if layout is None:
        return state
    devices, everywhere = {*layout.mesh.devices.flat}, jax.NamedSharding(layout.mesh, jax.P())

    def at(leaf: Any, sharding: Any) -> Any:
        return leaf if leaf.sharding.is_equivalent_to(sharding, leaf.ndim) else jax.device_put(leaf, shortest(sharding))

    def on_its_devices(leaf: Any) -> Any:
        return leaf if leaf.sharding.device_set == devices else jax.device_put(leaf, everywhere)

    others = (state.model_state, state.key, state.scale_state)
    model_state, key, scale_state = jax.tree.map(on_its_devices, others)
    params = jax.tree.map(at, state.params, layout.shardings(state.params))
    return dataclasses.replace(state, params=params, model_state=model_state, key=key, scale_state=scale_state)
