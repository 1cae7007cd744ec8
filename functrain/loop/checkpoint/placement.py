"""Where the leaves of a checkpoint go: from the devices to Orbax while training goes on, and back to the devices."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functrain.loop.checkpoint.leaves import COUNTERS, key_kinds
from functrain.loop.checkpoint.packs import packed, packed_on_host, platform
from functrain.loop.checkpoint.specs import shape_dtype

HOST = "host"  # A place: a leaf as NumPy has it, in whichever dtype, and on no device.


class Copy(NamedTuple):
    """What Orbax reads in the place of what an update overwrites.

    Attributes:
      array: the copy.
      of: shape, dtype and sharding of each leaf that it was made of.
    """

    array: jax.Array
    of: list[tuple[Any, ...]]


def to_write(
    leaves: Mapping[str, Any], packs: Mapping[str, Sequence[str]], spare: Mapping[str, Copy]
) -> tuple[dict[str, Any], dict[str, Copy]]:
    """The arrays for Orbax to read while training goes on, and those of them that are copies.

    On a CPU Orbax reads JAX's own buffers, which an update can't write into meanwhile: it would take new ones for the
    whole state, five times as slow as a copy for Orbax. From an accelerator Orbax copies by itself.

    Args:
      leaves: by name, none of them empty.
      packs: the names of those that are kept together, by the name of their pack.
      spare: copies that nobody reads any more, to be written over: memory that is new costs more than the copying.
    """
    in_packs = {name for names in packs.values() for name in names}
    sources = {name: leaf for name, leaf in leaves.items() if name not in in_packs}
    sources |= {pack: [leaves[name] for name in names] for pack, names in packs.items()}
    of = {name: _forms(source) for name, source in sources.items() if _is_on_cpu(source)}
    fits = {name: old.array for name, old in spare.items() if of.get(name) == old.of}
    copies: dict[str, jax.Array] = _copied({name: sources[name] for name in of}, fits)
    others = {name: _for_orbax(source) for name, source in sources.items() if name not in of}
    return others | copies, {name: Copy(array, of[name]) for name, array in copies.items()}


def to_read(name: str, spec: str, place: Any) -> Any:
    """What Orbax is to restore a leaf as: with its saved shape and dtype."""
    shape, dtype = shape_dtype(spec)
    if name in COUNTERS:
        return np.zeros(shape, dtype)
    if place == HOST and dtype not in key_kinds():
        return np.empty(shape, jnp.dtype(dtype))
    of_dtype = key_kinds()[dtype].dtype if dtype in key_kinds() else dtype
    somewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(shape, of_dtype, sharding=somewhere if place in (None, HOST) else place)


def owned(leaf: Any, place: Any) -> Any:
    """A leaf in memory that is JAX's own, as the first update overwrites it; on no device for good without a place."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if place == HOST:
        return np.asarray(jax.random.key_data(leaf))
    if place is not None:
        return jnp.array(leaf, copy=True)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jnp.array(np.asarray(jax.random.key_data(leaf)), copy=True)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.array(np.asarray(leaf), copy=True)


def placed(leaves: Mapping[str, np.ndarray], specs: Mapping[str, str], places: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of the host where their places say, in memory as of `owned`; random keys are made of their data."""
    here = {name: np.array(leaf) for name, leaf in leaves.items() if name in COUNTERS or places[name] == HOST}
    free = [name for name in leaves if places[name] is None and name not in here]
    put = [name for name in leaves if places[name] is not None and name not in here]
    near = [name for name in put if places[name].is_fully_addressable]
    arrays = _put(leaves, free) | _put(leaves, near, [places[name] for name in near])
    arrays |= {name: _spread(leaves[name], places[name]) for name in put if name not in arrays}
    for name in arrays:
        if kind := key_kinds().get(shape_dtype(specs[name])[1]):
            arrays[name] = jax.random.wrap_key_data(arrays[name], impl=kind.implementation)
    return here | arrays


def _put(leaves: Mapping[str, np.ndarray], names: Sequence[str], where: Any = None) -> dict[str, jax.Array]:
    return dict(zip(names, jax.device_put([leaves[name] for name in names], where, may_alias=False), strict=True))


def _spread(leaf: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    """A leaf over the devices of several processes, each of which has all of it."""
    devices, pieces = zip(*place.addressable_devices_indices_map(leaf.shape).items(), strict=True)
    parts = jax.device_put([leaf[piece] for piece in pieces], list(devices), may_alias=False)
    return jax.make_array_from_single_device_arrays(leaf.shape, place, parts)


def _is_on_cpu(source: Any) -> bool:
    return platform(source[0] if isinstance(source, list) else source) == "cpu"


def _forms(source: Any) -> list[tuple[Any, ...]]:
    return [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(source)]


def _for_orbax(source: Any) -> Any:
    return packed_on_host(source) if isinstance(source, list) else source


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copied(sources: dict[str, Any], spare: dict[str, jax.Array]) -> dict[str, jax.Array]:
    del spare  # Donated: the copies are written in its place.
    return {name: packed(them) if isinstance(them, list) else jnp.copy(them) for name, them in sources.items()}
