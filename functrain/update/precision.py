"""Computing in 16 bits while the parameters stay in 32: casts by part, and the scale of a float16 loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functrain.errors import UpdateError
from functrain.tree.partition import Partition
from functrain.tree.paths import PyTree


class LossScaleState(NamedTuple):
    """The state of a `DynamicScale`.

    Attributes:
      scale: float32 scalar, what the loss is multiplied by.
      good: int32 scalar, finite updates in a row since the scale last changed.
    """

    scale: jax.Array
    good: jax.Array


@dataclasses.dataclass(frozen=True)
class DynamicScale:
    """A scale for float16 losses that is halved when a gradient overflows and doubled after a row of good updates.

    >>> scale = DynamicScale(initial=8.0, period=1)
    >>> state = scale.adjusted(scale.init(), jnp.array(False))
    >>> float(state.scale), float(scale.adjusted(state, jnp.array(True)).scale)
    (4.0, 8.0)

    The semantics are those of `jmp.DynamicLossScale`. An update that overflows is left out.

    Attributes:
      initial: the first scale.
      period: good updates in a row after which the scale grows.
      factor: what it is multiplied or divided by; a power of two keeps gradients exact.
      minimum: the least scale.
    """

    initial: float = 2.0**15
    period: int = 2000
    factor: float = 2.0
    minimum: float = 1.0

    def init(self) -> LossScaleState:
        """The state before the first update."""
        return LossScaleState(jnp.asarray(self.initial, jnp.float32), jnp.zeros((), jnp.int32))

    def adjusted(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """The state after an update whose gradients were finite or not (a bool scalar)."""
        grows = finite & (state.good + 1 >= self.period)
        larger = state.scale * self.factor
        larger = jnp.where(jnp.isfinite(larger), larger, state.scale)
        smaller = jnp.maximum(state.scale / self.factor, self.minimum)
        scale = jnp.where(finite, jnp.where(grows, larger, state.scale), smaller)
        return LossScaleState(scale, jnp.where(finite & ~grows, state.good + 1, 0))


def caster(parts: Partition, compute_dtype: Any) -> Callable[[PyTree], PyTree]:
    """Makes the function that casts the floating-point leaves of whole params, all or those of some parts.

    Args:
      parts: the partition of the params.
      compute_dtype: a dtype, `{part: dtype}`, or None. Complex leaves stay as they are.

    Raises:
      PartitionError: an unknown part.
      UpdateError: a dtype that is not floating point.
    """
    if compute_dtype is None:
        return lambda params: params
    if not isinstance(compute_dtype, Mapping):
        compute_dtype = dict.fromkeys(parts.names, compute_dtype)
    parts.check_names(compute_dtype, "compute_dtype")
    for part, dtype in compute_dtype.items():
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise UpdateError(f"compute_dtype of part {part!r} is {dtype}: give a floating-point dtype, jnp.bfloat16")
    dtypes = [compute_dtype.get(leaf.part) for leaf in parts.leaves]

    def cast(params: PyTree) -> PyTree:
        leaves = zip(dtypes, jax.tree.leaves(params), strict=True)
        narrowed = [leaf if dtype is None or not _is_real(leaf) else leaf.astype(dtype) for dtype, leaf in leaves]
        return jax.tree.unflatten(parts.treedef, narrowed)

    return cast


def _is_real(leaf: Any) -> bool:
    """Whether a leaf can be of a narrower floating-point dtype: no dtype of 16 bits is complex."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))
