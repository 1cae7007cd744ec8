"""Where the leaves of a checkpoint go: from the devices to Orbax while training goes on, and back to the devices."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.loop.checkpoint.leaves import COUNTERS, shape_dtype

_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")


def to_write(leaves: dict[str, Any], spare: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The leaves for Orbax to read while training goes on, and those of them that are copies.

    On a CPU Orbax reads JAX's own buffers, which an update can't write into meanwhile: it would take new ones for the
    whole state, five times as slow as a copy for Orbax. From an accelerator Orbax copies by itself.

    Args:
      leaves: by name.
      spare: copies that nobody reads any more, to be written over: memory that is new costs more than the copying.
    """
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    if any(device.platform != "cpu" for leaf in arrays.values() for device in leaf.devices()):
        return leaves, {}
    fits = {name: old for name, old in spare.items() if name in arrays and _alike(old, arrays[name])}
    copies: dict[str, jax.Array] = _copied(arrays, fits)
    return leaves | copies, copies


def to_read(name: str, spec: str, place: Any) -> Any:
    """What Orbax is to restore a leaf as: with its saved shape and dtype."""
    shape, dtype = shape_dtype(spec)
    if name in COUNTERS:
        return np.zeros(shape, dtype)
    of_dtype = _key_dtypes()[dtype] if dtype.startswith("key<") else dtype
    somewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(shape, of_dtype, sharding=place or somewhere)


def owned(leaf: Any, place: Any) -> Any:
    """A leaf in memory that is JAX's own, as the first update overwrites it; on no device for good without a place."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if place is not None:
        return jnp.array(leaf, copy=True)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jnp.array(np.asarray(jax.random.key_data(leaf)), copy=True)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.array(np.asarray(leaf), copy=True)


def _alike(one: jax.Array, other: jax.Array) -> bool:
    return (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copied(arrays: dict[str, jax.Array], spare: dict[str, jax.Array]) -> dict[str, jax.Array]:
    del spare  # Donated: the copies are written in its place.
    return {name: jnp.copy(array) for name, array in arrays.items()}


@functools.cache
def _key_dtypes() -> dict[str, Any]:
    """The dtypes of random keys by name: 'key<fry>'."""
    made = [jax.eval_shape(functools.partial(jax.random.key, 0, impl=impl)) for impl in _KEYS]
    return {str(key.dtype): key.dtype for key in made}
