"""Whether slices, or single examples, have the loss of their batch: found out with the first batch of a run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functrain.gradients.loss import Context, accepted_context, name_of
from functrain.mesh.constraints import is_explicit
from functrain.mesh.layout import Layout
from functrain.mesh.shares import each_with
from functrain.tree.warn import warn
from functrain.update.microbatches import sliced
from functrain.update.options import Options
from functrain.update.state import TrainState
from functrain.update.step import Step
from functrain.update.update import Update

_PAIRS = 16  # Of parts that are compared, at most: a mask may leave the same of some.


class _Apart(NamedTuple):
    """How a batch is taken apart.

    Attributes:
      parts: how many there are.
      two: from a batch and a number to its part of that number, and the one after it.
      joined: from two parts to a batch of both.
      what: what is said of it.
      part: what a part is called.
      advice: what to write instead.
    """

    parts: int
    two: Callable[[Any, Any], tuple[Any, Any]]
    joined: Callable[[Any, Any], Any]
    what: str
    part: str
    advice: str


def tell_of_no_mean(update: Update, state: TrainState, batch: Any) -> None:
    """Warns of a loss of a batch that is not the mean of those of its parts, where a batch is taken apart.

    It is another for the same examples given twice, or its weight is not what its mean is over. Of a loss that draws
    random numbers neither can be told, of one that changes the model's state, as statistics of a batch do, not the
    latter.

    Args:
      update: of the run.
      state: any of the run.
      batch: what the update is given.
    """
    apart = _apart(update.options, batch)
    if apart is None:
        return
    for step, phase in zip(update.stages[-1], update.schedule.phases, strict=True):
        is_random = state.key is not None and "key" in accepted_context(phase.loss_fn)
        if is_random:
            continue
        compared, told = jax.jit(functools.partial(_compared, step, apart)), set[str]()
        for number in range(min(max(apart.parts - 1, 1), _PAIRS)):
            found = compared(state.params, state.model_state, np.int32(state.step), batch, np.int32(number))
            for name, values in found.items():
                message = _message(apart, name_of(phase.loss_fn), name, *map(float, values))
                if message and name not in told:
                    told.add(name)
                    warn(message)


def _message(
    apart: _Apart, loss_fn: str, name: str, once: float, twice: float, mean: float, together: float
) -> str | None:
    if _differ(once, twice):
        return (
            f"{apart.what}: of {apart.part} {loss_fn} returns the {name!r} {once:.6g}, of the same twice {twice:.6g},"
            f" so that it is no mean over examples; {apart.advice}, or return a sum as a mean, ft.Loss(sum / count,"
            " weight=count)"
        )
    if _differ(mean, together):
        return (
            f"{apart.what}: {loss_fn} returns the {name!r} {together:.6g} of two parts of it together, and of each by"
            f" itself such that their mean, by its weight, is {mean:.6g}; return what its mean is over, such as"
            f" unmasked tokens, ft.Loss(mean, weight=mask.sum()), or {apart.advice}"
        )
    return None


def _apart(options: Options, batch: Any) -> _Apart | None:
    """How an update takes a batch apart; None where it can't be done here."""
    if options.per_example is not None:
        count = len(jax.tree.leaves(batch)[0])
        return _Apart(
            count,
            functools.partial(_two_slices, count),
            _joined,
            f"per_example= has the loss of each of the {count} examples by itself, which is not that of the batch",
            "one",
            "give each example what it is compared with (its own negatives) in the batch, or leave per_example= out",
        )
    if options.by_shard is None:
        return _Apart(
            options.microbatches,
            functools.partial(_two_slices, options.microbatches),
            _joined,
            f"microbatches={options.microbatches} computes another loss than the whole batch has",
            "a slice",
            "write microbatches=1",
        )
    layout = options.by_shard.layout
    if is_explicit(layout.mesh):
        return None  # There a slice of rows that are cut has no type.
    return _Apart(
        layout.data_shards,
        functools.partial(_two_shards, layout),
        functools.partial(_joined_shards, layout),
        "reduce='window' computes another loss than the whole batch has, the mean of those of"
        f" {layout.data_shards} shards",
        "one",
        "leave reduce='window' out",
    )


def _differ(one: float, other: float) -> bool:
    """Whether two losses are not the same; means of the same numbers differ by rounding alone, also in 16 bits."""
    return bool(np.isfinite([one, other]).all() and not np.isclose(one, other, rtol=1e-2, atol=1e-4))


def _two_slices(count: int, batch: Any, number: Any) -> tuple[Any, Any]:
    slices = sliced(batch, count)
    one, other = (jax.tree.map(lambda leaf, at=at: leaf[at % count], slices) for at in (number, number + 1))
    return one, other


def _joined(one: Any, other: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), one, other)


def _two_shards(layout: Layout, batch: Any, number: Any) -> tuple[Any, Any]:
    """The rows of two shards; what is not cut is the same in both."""

    def rows(number: Any) -> Any:
        def of(leaf: Any, here: Any) -> Any:
            length = len(leaf) // layout.data_shards if _is_cut(here) else 0
            return jax.lax.dynamic_slice_in_dim(leaf, number * length, length) if length else leaf

        return each_with(of, layout.batch_shardings, batch)

    return rows(number % layout.data_shards), rows((number + 1) % layout.data_shards)


def _joined_shards(layout: Layout, one: Any, other: Any) -> Any:
    is_cut = jax.tree.leaves(each_with(lambda leaf, here: _is_cut(here), layout.batch_shardings, one))
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), is_cut, strict=True)
    return jax.tree.unflatten(jax.tree.structure(one), [jnp.concatenate([a, b]) if both else a for a, b, both in pairs])


def _is_cut(here: Any) -> bool:
    return len(here.spec) > 0 and here.spec[0] is not None


def _compared(step: Step, apart: _Apart, params: Any, model_state: Any, count: Any, batch: Any, number: Any) -> Any:
    """By name: the loss of a part, of it twice; the mean of two parts', that of both, if no state changes."""
    context, cast = Context(model_state=model_state, step=count), step.objective.cast(params)
    one, other = apart.two(batch, number)
    once, of_one = step.objective.losses(cast, one, context)
    twice, _ = step.objective.losses(cast, apart.joined(one, one), context)
    if [*map(id, jax.tree.leaves(of_one.model_state))] != [*map(id, jax.tree.leaves(model_state))]:
        return {name: (once[name], twice[name], 0.0, 0.0) for name in once}
    values, of_other = step.objective.losses(cast, other, context)
    together, _ = step.objective.losses(cast, apart.joined(one, other), context)
    weights = [jnp.asarray(loss.weight, jnp.float32) for loss in (of_one, of_other)]
    means = {name: (once[name] * weights[0] + values[name] * weights[1]) / sum(weights) for name in once}
    return {name: (once[name], twice[name], means[name], together[name]) for name in once}
