"""Numbers of many leaves from one collective: each device looks at its own slices, then all are summed once."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.mesh.constraints import brought
from functrain.mesh.layout import Layout
from functrain.mesh.specs import axes_in, size_of
from functrain.tree.arrays import is_finite, wide
from functrain.tree.partition import Split
from functrain.tree.paths import Flat


def norms(groups: Mapping[Any, Split], layout: Layout) -> dict[Any, jax.Array]:
    """The Euclidean norm of each group of leaves together, in float32 or wider.

    Left to the partitioner, each leaf's sum is a collective of its own.

    Args:
      groups: split trees by any name.
      layout: says where the slices of each leaf lie, as of what is kept beside parameters.
    """

    def squares(here: list[Flat]) -> jax.Array:
        of_groups = [sum(_square(leaf) * _part(layout, path) for path, leaf in flat.items()) for flat in here]
        return jnp.stack(of_groups)

    return dict(zip(groups, jnp.sqrt(_summed(squares, groups, layout)), strict=True))


def finite(groups: Mapping[Any, Split], layout: Layout) -> dict[Any, jax.Array]:
    """Whether every number of each group is finite, bool scalars; the arguments are those of `norms`."""

    def found(here: list[Flat]) -> jax.Array:
        return jnp.stack([1 - is_finite(flat).astype(jnp.int32) for flat in here])

    return dict(zip(groups, _summed(found, groups, layout) == 0, strict=True))


def _summed(fn: Callable[[list[Flat]], jax.Array], groups: Mapping[Any, Split], layout: Layout) -> jax.Array:
    """The sum over all devices of what a function finds in the slices of each."""
    given = [{path: leaf for flat in split.values() for path, leaf in flat.items()} for split in groups.values()]
    places = [{path: layout.of_state(path) for path in flat} for flat in given]
    axes, specs = tuple(layout.mesh.axis_names), jax.tree.map(lambda place: place.spec, places)

    @functools.partial(jax.shard_map, mesh=layout.mesh, in_specs=(specs,), out_specs=jax.P(), check_vma=False)
    def of_all(here: list[Flat]) -> jax.Array:
        total: jax.Array = jax.lax.psum(fn(here), axes)
        return total

    found: jax.Array = of_all(brought(given, places))
    return found


def _square(leaf: Any) -> jax.Array:
    return jnp.sum(jnp.square(jnp.abs(wide(leaf))))


def _part(layout: Layout, path: str) -> float:
    """What of a leaf's slice counts as a device's own: as many devices hold it alike."""
    return float(size_of(layout.mesh, axes_in(layout.of_state(path).spec)) / layout.mesh.size)
