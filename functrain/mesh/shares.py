"""Which rows of a batch each process reads, those that its devices hold; and one array of the rows of all."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from functrain.errors import LayoutError
from functrain.mesh.specs import axes_of, size_of
from functrain.tree.text import listed

Shardings: TypeAlias = Any
"""A sharding for all leaves of a batch, or a tree of them that begins as the batch does."""


class Share(NamedTuple):
    """The share of a process in a batch: of so many equal slices of its rows those with these numbers.

    >>> share_of(jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    Share(slices=(0,), of=1)
    """

    slices: tuple[int, ...]
    of: int


@functools.lru_cache(64)  # Of as many devices as there are each is looked at.
def share_of(sharding: jax.sharding.Sharding, axis: int = 0) -> Share:
    """The slices of an axis that the devices of this process hold."""
    count = sharding.num_devices
    rank = len(sharding.spec) if isinstance(sharding, jax.NamedSharding) else 1
    # A number of rows that any part of the devices divides.
    pieces = sharding.addressable_devices_indices_map((count,) * max(rank, axis + 1)).values()
    rows = {piece[axis].indices(count)[:2] for piece in pieces if piece is not None}
    length = next(stop - start for start, stop in rows)
    return Share(tuple(sorted(start // length for start, _ in rows)), count // length)


def first_of(sharding: Shardings) -> jax.sharding.Sharding | None:
    """The sharding by which rows are cut: of a tree of them the first."""
    return next(iter(jax.tree.leaves(sharding, is_leaf=_is_sharding)), None)


def for_rank(sharding: jax.sharding.Sharding, rank: int) -> jax.sharding.Sharding:
    """A sharding for an array of a rank: of a longer spec its beginning."""
    if isinstance(sharding, jax.NamedSharding) and len(sharding.spec) > rank:
        return sharding.update(spec=jax.P(*sharding.spec[:rank]))
    return sharding


def each_with(call: Any, sharding: Shardings, batch: Any) -> Any:
    """A batch of what a function makes of each leaf and its sharding, for the leaf's rank.

    Raises:
      LayoutError: shardings by name of other names than those of the batch.
    """
    _check_names(sharding, batch)

    def of_branch(here: Any, branch: Any) -> Any:
        return jax.tree.map(lambda leaf: call(leaf, for_rank(here, np.ndim(leaf))), branch)

    return jax.tree.map(of_branch, sharding, batch, is_leaf=_is_sharding)


def assembled(leaf: Any, sharding: jax.sharding.Sharding, axis: int = 0) -> jax.Array:
    """An array of all processes, of which each gives the rows of its share along an axis, and other axes whole."""
    given = np.asarray(leaf)
    if given.ndim <= axis:
        return jax.make_array_from_callback(given.shape, sharding, lambda index: given[index or ()])
    share = share_of(sharding, axis)
    length, rest = divmod(given.shape[axis], len(share.slices))
    if rest:
        raise LayoutError(
            f"this process holds {len(share.slices)} of the {share.of} slices of a batch, and was given"
            f" {given.shape[axis]} rows: give a multiple of {len(share.slices)}"
        )
    whole = length * share.of

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[axis].indices(whole)
        first = share.slices.index(start // length) * length if length else 0
        return np.asarray(given[*index[:axis], first : first + stop - start, *index[axis + 1 :]])

    shape = (*given.shape[:axis], whole, *given.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, piece)


def put(batch: Any, sharding: Shardings) -> Any:
    """A batch where a sharding says; of several processes each gives the rows of its share, and what is there stays.

    Raises:
      LayoutError: shardings by name of other names than those of the batch; rows that are not divided.
    """
    if sharding is None:
        return batch
    if jax.process_count() == 1:
        places = each_with(lambda leaf, here: here, sharding, batch)
        try:
            return jax.device_put(batch, places)
        except ValueError:
            each_with(check_divided, sharding, batch)
            raise
    return each_with(lambda leaf, here: leaf if _lies(leaf, here) else assembled(leaf, here), sharding, batch)


def check_divided(leaf: Any, sharding: jax.sharding.Sharding) -> None:
    """Raises unless the devices that a dimension of an array is cut over divide it.

    Raises:
      LayoutError: says of which rows batches may be.
    """
    if not isinstance(sharding, jax.NamedSharding):
        return
    for number, (length, axes) in enumerate(zip(np.shape(leaf), map(axes_of, sharding.spec), strict=False)):
        if length % (count := size_of(sharding.mesh, axes)):
            raise LayoutError(
                f"a leaf of the batch has the shape {np.shape(leaf)}, of which {listed(axes)} of {count} does not"
                f" divide dimension {number}: give batches of a multiple of {count} rows; a short last one is filled up"
                " with ft.from_arrays(..., last='pad'), which adds weights, and left out with last='drop'"
            )


def after_one_axis(sharding: jax.sharding.Sharding, rank: int) -> jax.sharding.Sharding:
    """A sharding for arrays of a rank that have a new leading axis, which is not cut."""
    if not isinstance(sharding, jax.NamedSharding):
        return sharding
    return sharding.update(spec=jax.P(None, *sharding.spec[: rank - 1]))


def _check_names(sharding: Shardings, batch: Any) -> None:
    if not isinstance(sharding, Mapping):
        return
    if not isinstance(batch, Mapping):
        raise LayoutError(
            f"batches are laid out by name, {listed(sharding)}, and this one is no dict ({type(batch).__name__}): give"
            " one for all arrays, batch=P('data')"
        )
    untold, absent = [name for name in batch if name not in sharding], [name for name in sharding if name not in batch]
    if untold or absent:
        has = [f"has {listed(untold)}, which they do not name"] if untold else []
        lacks = [f"lacks {listed(absent)}"] if absent else []
        raise LayoutError(
            f"batches are laid out by name, {listed(sharding)}, and this one {' and '.join(has + lacks)}: name exactly"
            " what a batch has ('weight' with last='pad'), or give one for all arrays, batch=P('data')"
        )
    for name, of_name in sharding.items():
        _check_names(of_name, batch[name])


def _lies(leaf: Any, sharding: jax.sharding.Sharding) -> bool:
    return isinstance(leaf, jax.Array) and leaf.sharding == sharding


def _is_sharding(value: Any) -> bool:
    return isinstance(value, jax.sharding.Sharding)
