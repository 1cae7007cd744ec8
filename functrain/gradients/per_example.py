"""The gradient of each example by itself, for what is done to it before it is one of a mean."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import LossError
from functrain.gradients.loss import Context, Loss
from functrain.tree.arrays import common_length, leading_lengths, wide
from functrain.tree.paths import flatten, structure_difference
from functrain.tree.text import listed

PerExample = Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]]
"""A function of one example's split gradients, or `{part: fn}` of its `{path: gradient}`; it returns the like."""

Summed = Callable[[Any, Any, Context], tuple[Any, tuple[Loss, Any]]]
"""From what is differentiated, a batch and a context to what is minimised, the `Loss` and what was minimised."""


def check_per_example(per_example: PerExample | None, parts: Sequence[str]) -> None:
    """Raises unless it is a function, or functions by part.

    Raises:
      LossError: it is neither, or names a part that is not among those that are differentiated.
    """
    if per_example is None or callable(per_example):
        return
    if not isinstance(per_example, Mapping) or not all(callable(fn) for fn in per_example.values()):
        raise LossError(
            f"per_example={per_example!r}: give a function of the split gradients of one example, or one for the"
            ' gradients of a part, {"body": fn}'
        )
    if unknown := [part for part in per_example if part not in parts]:
        raise LossError(
            f"per_example names {listed(unknown)}, which is not differentiated: the parts are {listed(parts, 30)}"
        )


def of_examples(
    summed: Summed,
    differentiated: Mapping[str, Any],
    batch: Any,
    context: Context,
    *,
    finished: Callable[[Any], Any],
    per_example: PerExample,
) -> tuple[dict[str, Any], Loss, Any]:
    """The weighted mean over the examples of a batch of what `per_example` makes of their gradients.

    Each example is a batch of one, with a key of its own. The gradients of parts that are not asked for come from a
    backward pass of the whole batch, and are never there by example.

    Args:
      summed: what is differentiated, of a batch.
      differentiated: split params.
      batch: leaves of one leading axis.
      context: of the whole batch.
      finished: from JAX's gradients to those that functrain gives.
      per_example: what is done to each.

    Returns:
      `(grads, loss, total)`, all means over the examples; the loss's weight is the sum of theirs.

    Raises:
      LossError: the batch has no common leading axis, the loss function changes the model state, or `per_example`
        returns gradients of another structure or shapes.
    """
    count = common_length(leading_lengths(batch).values())
    if count is None:
        raise LossError(
            f"per_example= needs a batch whose leaves have one leading axis, of examples: {leading_lengths(batch)}"
        )
    examples = jax.tree.map(lambda leaf: jnp.reshape(leaf, (count, 1, *jnp.shape(leaf)[1:])), batch)
    keys = None
    if context.key is not None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(context.key, jnp.arange(count))
    chosen = {p: flat for p, flat in differentiated.items() if callable(per_example) or p in per_example}
    others = {p: flat for p, flat in differentiated.items() if p not in chosen}

    def of_one(chosen: Any, others: Any, example: Any, key: Any) -> tuple[Any, tuple[Any, Any]]:
        value, (loss, total) = summed({**chosen, **others}, example, context._replace(key=key))
        _check_state_kept(loss.model_state, context.model_state)
        return value, ((loss.value, loss.weight, loss.metrics), total)

    def of_one_chosen(example: Any, key: Any) -> tuple[Any, Any]:
        grads, aux = jax.grad(of_one, has_aux=True)(chosen, others, example, key)
        grads = finished(grads)
        made = per_example(grads) if callable(per_example) else {p: per_example[p](grads[p]) for p in chosen}
        _check_like(made, grads)
        return made, aux

    of_each, ((values, weights, metrics), totals) = jax.vmap(of_one_chosen)(examples, keys)
    mean = _Mean(weights)
    grads = jax.tree.map(mean.of_grads, of_each)
    if others:

        def of_all(others: Any) -> Any:
            each, _ = jax.vmap(lambda example, key: of_one(chosen, others, example, key))(examples, keys)
            return jnp.sum(mean.weighted(each))

        grads |= jax.tree.map(mean.over_total, finished(jax.grad(of_all)(others)))
    loss = Loss(
        jax.tree.map(mean.of_metrics, values), mean.total, jax.tree.map(mean.of_metrics, metrics), context.model_state
    )
    return {part: grads[part] for part in differentiated}, loss, mean.of_metrics(totals)


class _Mean:
    """The weighted mean over a leading axis of examples; an example of weight 0 adds nothing, not even NaN."""

    def __init__(self, weights: Any):
        self.weights = wide(weights)
        self.total = jnp.sum(self.weights)

    def weighted(self, leaf: Any) -> jax.Array:
        weights = self.weights.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.asarray(jnp.where(weights == 0, 0, leaf * weights.astype(leaf.dtype)))

    def over_total(self, leaf: Any) -> jax.Array:
        return jnp.asarray(leaf / jnp.where(self.total == 0, 1, self.total).astype(leaf.dtype))

    def of_grads(self, leaf: Any) -> jax.Array:
        summed = jnp.sum(self.weighted(wide(leaf)), axis=0)
        return self.over_total(summed).astype(leaf.dtype)

    def of_metrics(self, leaf: Any) -> jax.Array:
        return self.over_total(jnp.sum(self.weighted(wide(leaf)), axis=0))


def _check_state_kept(new: Any, old: Any) -> None:
    if [*map(id, jax.tree.leaves(new))] != [*map(id, jax.tree.leaves(old))]:
        raise LossError(
            "per_example= and a loss function that returns a new model_state exclude each other: an example by itself"
            " has no statistics of the batch; use layers without them, such as group norm, or leave model_state out"
        )


def _check_like(made: Any, grads: Any) -> None:
    """Raises unless one example's gradients have the structure and shapes of those that were given."""
    if differs := structure_difference(made, grads):
        raise LossError(f"per_example= must return gradients like those that it is given: the tree {differs}")
    shapes = {path: jnp.shape(leaf) for path, leaf in flatten(grads).items()}
    if wrong := [path for path, leaf in flatten(made).items() if jnp.shape(leaf) != shapes[path]]:
        made_shape = jnp.shape(flatten(made)[wrong[0]])
        raise LossError(
            "per_example= must return gradients like those that it is given:"
            f" {wrong[0]!r} has shape {made_shape}, not {shapes[wrong[0]]}"
        )
