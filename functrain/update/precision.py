"""Computing in 16 bits while the parameters stay in 32: casts by part, and the scale of a float16 loss."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functrain.errors import UpdateError
from functrain.tree.partition import Partition
from functrain.tree.paths import PyTree, flatten, unflatten
from functrain.tree.selectors import Selector, matcher, unmatched
from functrain.tree.text import listed
from functrain.tree.warn import warn
from functrain.update.widening import PRODUCTS, advice, beginning_of_first_product


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


def narrow_dtype(compute_dtype: Any, cast_batch: "bool | Selector") -> Any:
    """The dtype of less than 32 bits in a `compute_dtype` that was checked; None without one.

    Raises:
      UpdateError: there are several to cast a batch to.
    """
    given = compute_dtype.values() if isinstance(compute_dtype, Mapping) else [compute_dtype]
    for dtype in given:
        try:
            jnp.dtype(dtype)
        except TypeError:
            raise UpdateError(f"compute_dtype={dtype!r} is no dtype: write jnp.bfloat16 or 'bfloat16'") from None
    narrow = {jnp.dtype(dtype) for dtype in given if dtype is not None and jnp.dtype(dtype).itemsize < 4}
    names = sorted(map(str, narrow))
    if len(names) > 1 and cast_batch is not False:
        raise UpdateError(
            f"compute_dtype has {listed(names)}, and a batch can be cast to one alone: give one dtype of 16 bits, or"
            " cast_batch=False"
        )
    return jnp.dtype(names[0]) if names else None


def on_narrow_batches(loss_fn: Callable[..., Any], dtype: Any, cast_batch: "bool | Selector") -> Callable[..., Any]:
    """The loss function, given the floating-point leaves of its batches in a dtype.

    >>> loss_fn = on_narrow_batches(lambda params, batch: [str(leaf.dtype) for leaf in batch], jnp.bfloat16, True)
    >>> loss_fn(None, (jnp.ones(2), jnp.arange(2)))
    ['bfloat16', 'int32']

    Args:
      loss_fn: as for `make_train_step`.
      dtype: the dtype; None leaves the loss function as it is.
      cast_batch: which leaves: True for all but the "weight" of padded batches, False for none, or a selector.
    """
    if dtype is None or cast_batch is False:
        return loss_fn

    @functools.wraps(loss_fn)
    def on_narrow(params: PyTree, batch: Any, **context: Any) -> Any:
        flat = flatten(batch)
        if cast_batch is not True and (problem := unmatched(cast_batch, flat)):
            raise UpdateError(f"cast_batch: {problem}; it says which leaves of a batch are cast to {dtype}")
        takes = (lambda path, leaf: path != "weight") if cast_batch is True else matcher(cast_batch)
        cast = {
            path: jnp.asarray(leaf, dtype) if takes(path, leaf) and _is_real(leaf) else leaf
            for path, leaf in flat.items()
        }
        return loss_fn(params, unflatten(cast, like=batch), **context)

    return on_narrow


def check_products(jaxpr: Any, dtype: Any, names: Sequence[str], arguments: Callable[[], Sequence[str]]) -> None:
    """Warns if a traced program has matrix products or convolutions and none of them is narrower than 32 bits.

    Args:
      jaxpr: of losses, their gradients, and what else a step does.
      dtype: what was to be computed with.
      names: what the loss functions are called.
      arguments: says what the arguments of the program are called.
    """
    products = [equation for equation in _equations(jaxpr) if equation.primitive.name in PRODUCTS]
    operands = [[operand.aval for operand in product.invars[:2]] for product in products]
    if not products or any(all(each.dtype.itemsize < 4 for each in pair) for pair in operands):
        return
    first = " and ".join(f"{each.dtype}{list(each.shape)}" for each in operands[0])
    where = advice(beginning_of_first_product(jaxpr, arguments()))
    warn(
        f"compute_dtype={dtype} does nothing for {listed(names)}: all {len(products)} matrix products and convolutions"
        f" have an operand of 32 bits, as the first of {first}: {where}; or leave compute_dtype out"
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a traced program, those of its loops, branches and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns"))
        for each in inner:
            if hasattr(each, "eqns"):
                yield from _equations(getattr(each, "jaxpr", each))


def _is_real(leaf: Any) -> bool:
    """Whether a leaf can be of a narrower floating-point dtype: no dtype of 16 bits is complex."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))
