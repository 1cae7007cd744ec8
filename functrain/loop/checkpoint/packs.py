"""Small leaves, kept together in flat arrays: Orbax takes a millisecond or two for an array, however small it is."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.leaves import WINDOW, key_kinds
from functrain.loop.checkpoint.specs import shape_dtype
from functrain.tree.text import listed_lines

_LARGE = 1 << 20  # Bytes. Writing them takes longer than what else Orbax does for an array.
_BYTES, _LEAVES = 1 << 24, 128  # Of a pack: files are written side by side, and XLA puts so many together fast.
_UNKNOWN = ("uint2", "uint4", "float8_e4m3")  # To TensorStore.


def packs_of(leaves: Mapping[str, Any], specs: Mapping[str, str]) -> dict[str, list[str]]:
    """The leaves that are kept together, by the name of their pack; each of the others is an array of its own.

    Args:
      leaves: by name.
      specs: their shapes and dtypes.

    Raises:
      CheckpointError: leaves over several devices that can't be stored.
    """
    packs: dict[str, list[str]] = {}
    begun: dict[Any, tuple[str, int]] = {}
    refused = []
    for name, leaf in leaves.items():
        shape, dtype = _stored(specs[name])
        if not (size := math.prod(shape) * dtype.itemsize):
            continue
        is_stored_alone = _is_utf8(name) and shape_dtype(specs[name])[1] not in _UNKNOWN
        if isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated:
            refused += [] if is_stored_alone else [f"{name!r}: {specs[name]}"]
            continue
        if size >= _LARGE and is_stored_alone:
            continue
        # A window is on its own, so that it changes no other pack, whose memory is used again.
        kind = platform(leaf), dtype, name.startswith(WINDOW)
        pack, before = begun.get(kind, ("", _BYTES))
        if before + size > _BYTES or len(packs[pack]) == _LEAVES:
            pack, before = f"pack {len(packs)}", 0
        packs.setdefault(pack, []).append(name)
        begun[kind] = pack, before + size
    if refused:
        raise CheckpointError(
            f"leaves that lie in pieces over several devices can't be stored:{listed_lines(refused)}\nkeep them in a"
            f" dtype other than {', '.join(_UNKNOWN)}, under names that UTF-8 has, or whole on every device"
        )
    return packs


def platform(leaf: Any) -> str | None:
    """Where an array is, "cpu" or another kind of device; None for what is none of JAX's."""
    if not isinstance(leaf, jax.Array):
        return None
    device: Any = next(iter(leaf.sharding.device_set))
    return str(device.platform)


def target(names: Sequence[str], specs: Mapping[str, str]) -> np.ndarray:
    """What Orbax is to restore a pack as: memory of its shape and dtype."""
    forms = [_stored(specs[name]) for name in names]
    return np.empty(sum(math.prod(shape) for shape, _ in forms), forms[0][1])


# Leaves are stored bit by bit: XLA puts bfloat16 together by way of float32, where a NaN becomes another, and
# TensorStore does not know every dtype of one byte. A random key is stored as the uint32 that it consists of.


def packed(leaves: Sequence[jax.Array]) -> jax.Array:
    """The pack of some arrays; traced."""
    return jnp.concatenate([_bits(leaf).ravel() for leaf in leaves])


def packed_on_host(leaves: Sequence[Any]) -> np.ndarray:
    """The same, on the host, where the arrays are fetched together."""
    fetched = jax.device_get([jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves])
    arrays = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf, jnp.result_type(leaf)) for leaf in fetched]
    return np.concatenate([_bits_on_host(np.ravel(array)) for array in arrays])


def unpacked(pack: np.ndarray, names: Sequence[str], specs: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The inverse: the leaves by name, random keys as what they consist of."""
    leaves, end = {}, 0
    for name in names:
        shape, _ = _stored(specs[name])
        begin, end = end, end + math.prod(shape)
        leaves[name] = _of_bits(pack[begin:end], shape_dtype(specs[name])[1]).reshape(shape)
    return leaves


@functools.lru_cache(4096)
def _stored(spec: str) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype that a leaf is stored in."""
    shape, name = shape_dtype(spec)
    if name in key_kinds():
        return (*shape, *key_kinds()[name].shape), np.dtype(np.uint32)
    dtype = jnp.dtype(name)
    if dtype.itemsize == 1 or dtype == jnp.bfloat16:
        return shape, np.dtype(f"uint{8 * dtype.itemsize}")
    return shape, dtype


def _bits(leaf: jax.Array) -> jax.Array:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint8)
    if leaf.dtype.itemsize > 1 and leaf.dtype != jnp.bfloat16:
        return leaf
    if _is_short_integer(leaf.dtype):
        leaf = leaf.astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{jax.dtypes.itemsize_bits(leaf.dtype)}")
    return bits.astype(f"uint{8 * leaf.dtype.itemsize}")


def _bits_on_host(leaf: np.ndarray) -> np.ndarray:
    if _is_short_integer(leaf.dtype):
        leaf = leaf.astype(np.int8)
    return leaf.view(_stored(f"{leaf.dtype}[]")[1])


def _of_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in key_kinds():
        return bits
    return bits.view(np.int8).astype(dtype) if _is_short_integer(jnp.dtype(dtype)) else bits.view(jnp.dtype(dtype))


def _is_short_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) and jax.dtypes.itemsize_bits(dtype) < 8


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_utf8(name: str) -> bool:
    return name == name.encode(errors="ignore").decode()
