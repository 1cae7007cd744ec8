"""Where optimizer state and updates lie, as a layout has it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from functrain.errors import OptimizerError, PartitionError
from functrain.mesh.constraints import brought
from functrain.mesh.layout import Layout
from functrain.tree.arrays import committed_sharding
from functrain.tree.partition import Partition, taken_by
from functrain.tree.paths import Flat, difference

Places = dict[str, dict[str, Any]]
"""`{part: {path: sharding}}`."""


def check_layout(layout: Any, parts: Partition, trained: Sequence[str]) -> None:
    """Raises unless a layout is of the leaves of a partition, and says of trained ones where their state lies.

    Raises:
      OptimizerError: it is no layout, or of other leaves or shapes; or its `memory` names what has no state.
    """
    if layout is None:
        return
    if not isinstance(layout, Layout):
        raise OptimizerError(f"layout={layout!r}: write ft.layout(params, mesh, rules)")
    shapes = {leaf.path: leaf.shape for leaf in parts.leaves if leaf.path not in parts.rest}
    if differs := difference(layout.specs, shapes):
        raise OptimizerError(f"the layout {differs}, of the leaves that were partitioned: make both of the same params")
    for path, shape in shapes.items():
        if shape != layout.shapes[path].shape:
            raise OptimizerError(
                f"{path!r} was laid out with shape {layout.shapes[path].shape}, and partitioned with {shape}: make both"
                " of the same params"
            )
    for key in layout.memory:
        try:
            taken = taken_by(parts, key)
        except PartitionError as error:
            raise OptimizerError(f"the layout's memory=: {error}") from None
        if frozen := [path for path, part in taken.items() if part not in trained]:
            raise OptimizerError(
                f"the layout's memory= names {key!r}, with {frozen[0]!r}, which is frozen and has no optimizer state:"
                " leave it out"
            )


def check_devices(layout: Layout | None, params: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises for split params that were put on other devices than those of the layout.

    Raises:
      OptimizerError: says how to put them there.
    """
    if layout is None or not isinstance(layout.mesh, jax.sharding.Mesh):
        return
    devices = {*layout.mesh.devices.flat}
    for flat in params.values():
        for path, leaf in flat.items():
            lies = committed_sharding(leaf) if not isinstance(leaf, jax.core.Tracer) else None
            if lies is not None and lies.device_set != devices:
                raise OptimizerError(
                    f"{path!r} lies on {len(lies.device_set)} device(s), and not on the {len(devices)} of the layout's"
                    " mesh: write params = layout.put(params)"
                )


def places_of(layout: Layout, parts: Partition, trained: Sequence[str]) -> Places:
    """Where the state of each trained leaf lies between two steps."""
    kinds = {path: kind for key, kind in layout.memory.items() for path in taken_by(parts, key)}

    def place(path: str) -> Any:
        of_state = layout.of_state(path)
        return of_state.with_memory_kind(kinds[path]) if path in kinds else of_state

    return {part: {path: place(path) for path in parts.paths(part)} for part in trained}


def on_device(places: Mapping[str, Any]) -> dict[str, Any]:
    """The same places in the memory that programs compute in."""
    return {path: place.with_memory_kind("device") for path, place in places.items()}


def with_updates(layout: Layout, params: Mapping[str, Any], updates: Mapping[str, Any]) -> Flat:
    """Parameters with updates added, by path: each slice where its moments lie, which is then sent to where it is used.

    So what ZeRO gathers are parameters, in their dtype, and not updates in a wider one.
    """
    new: Flat = {}
    for path, update in updates.items():
        here = layout.of_state(path)
        stepped = optax.apply_updates(brought(params[path], here), brought(update, here))
        new[path] = brought(stepped, layout.sharding(path))
    return new
