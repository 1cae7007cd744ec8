"""Gradients summed over several batches, weighted by what each batch's mean is over."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import AccumulationError
from functrain.gradients.loss import check_weight
from functrain.tree.paths import PyTree, flatten, structure_difference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulated:
    """A weighted sum of gradients; made by `accumulate` and `zeros`, and a pytree that a `scan` can carry.

    Attributes:
      sums: sum of weight * gradient, a tree like the gradients; float32 for 16-bit gradients.
      weights: sum of the weights, a floating-point scalar; for a dict of gradients `{part: scalar}`.
    """

    sums: Any
    weights: Any

    def mean(self) -> PyTree:
        """The weighted mean, `sum(weight * grads) / sum(weight)`: the gradient of the union of the batches.

        >>> acc = accumulate(None, jnp.float32(1.0), weight=3)
        >>> float(accumulate(acc, jnp.float32(5.0), weight=1).mean())
        2.0

        Where the total weight is 0 it is zero, not NaN.
        """

        def mean(sums: PyTree, weight: jax.Array) -> PyTree:
            divisor = jnp.where(weight == 0, 1, weight)  # Sums of weight 0 are 0.
            return jax.tree.map(lambda total: total / divisor.astype(total.dtype), sums)

        if isinstance(self.sums, dict):
            return {part: mean(sums, self.weights[part]) for part, sums in self.sums.items()}
        return mean(self.sums, self.weights)

    def total(self) -> PyTree:
        """The sum of weight * gradient: where every weight is 1, the plain sum."""
        return self.sums


def accumulate(acc: Accumulated | None, grads: PyTree, *, weight: Any = 1) -> Accumulated:
    """Adds a batch's gradients to those of the batches before it.

    >>> acc = accumulate(None, {"head": jnp.float32(2.0), "body": jnp.float32(4.0)})
    >>> acc = accumulate(acc, {"head": jnp.float32(4.0)})
    >>> {part: float(mean) for part, mean in acc.mean().items()}
    {'body': 4.0, 'head': 3.0}

    Args:
      acc: what has been accumulated; None for the first batch of a window, which then costs no addition.
      grads: any pytree. For a dict, such as split gradients, each part has its own weight, a part that is not given
        keeps its sum, and one that comes for the first time begins with this batch. What a `scan` carries can't grow:
        begin it with `zeros` of all parts.
      weight: a scalar >= 0: the number of examples or tokens that the gradients are a mean over (`loss.weight`). A
        batch of weight 0 adds nothing, even if its gradients are NaN.

    Raises:
      AccumulationError: the gradients are of another structure or other shapes.
      LossError: the weight is no scalar, or known to be negative.
    """
    check_weight(weight)
    total = jnp.asarray(weight, _weight_dtype())
    sums = jax.tree.map(lambda grad: _weighted(grad, weight), grads)
    new = Accumulated(sums, dict.fromkeys(sums, total) if isinstance(sums, dict) else total)
    return new if acc is None else _added(acc, new)


def zeros(grads: PyTree) -> Accumulated:
    """An empty accumulator for such gradients, to carry through a `scan`.

    >>> zeros({"head": jnp.ones(2, jnp.bfloat16)}).sums["head"].dtype
    dtype('float32')

    Args:
      grads: gradients, parameters or `jax.ShapeDtypeStruct`s; only shapes, dtypes and shardings are used.
    """

    def empty(leaf: Any) -> jax.Array:
        dtype = _sum_dtype(leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, dtype, device=leaf.sharding)
        return jnp.zeros_like(leaf, dtype=dtype)

    sums = jax.tree.map(empty, grads)
    no_weight = jnp.zeros((), _weight_dtype())
    return Accumulated(sums, dict.fromkeys(sums, no_weight) if isinstance(sums, dict) else no_weight)


def _weighted(grad: Any, weight: Any) -> jax.Array:
    wide = jnp.asarray(grad, _sum_dtype(grad))
    if isinstance(weight, int | float) and weight == 1:
        return wide
    return jnp.where(weight == 0, 0, wide * jnp.asarray(weight, wide.dtype))


def _added(acc: Accumulated, new: Accumulated) -> Accumulated:
    if not isinstance(new.sums, dict) or not isinstance(acc.sums, dict):
        return Accumulated(_add(acc.sums, new.sums), acc.weights + new.weights)
    sums, weights = acc.sums | new.sums, acc.weights | new.weights
    for part in new.sums:
        if part in acc.sums:
            sums[part] = _add(acc.sums[part], new.sums[part], f" of part {part!r}")
            weights[part] = acc.weights[part] + new.weights[part]
    return Accumulated(sums, weights)


def _add(sums: PyTree, new: PyTree, where: str = "") -> PyTree:
    if differs := structure_difference(new, sums):
        raise AccumulationError(f"the gradients{where} do not fit the accumulator: the tree {differs}")
    shapes = {path: jnp.shape(leaf) for path, leaf in flatten(sums).items()}
    wrong = {path: jnp.shape(leaf) for path, leaf in flatten(new).items() if jnp.shape(leaf) != shapes[path]}
    if wrong:
        path, shape = next(iter(wrong.items()))
        raise AccumulationError(
            f"the gradients{where} do not fit the accumulator: {path!r} has shape {shape}, its sum {shapes[path]}"
        )
    return jax.tree.map(jnp.add, sums, new)


def _sum_dtype(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    return jnp.promote_types(dtype, jnp.float32) if dtype.itemsize < 4 else dtype


def _weight_dtype() -> Any:
    return jnp.result_type(float)
