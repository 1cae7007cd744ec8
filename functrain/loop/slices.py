"""Whether slices, or single examples, have the loss of their batch: found out with the first batch of a run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.gradients.loss import Context, accepted_context, name_of
from functrain.mesh.constraints import is_explicit
from functrain.mesh.layout import Layout
from functrain.mesh.shares import each_with
from functrain.tree.warn import warn
from functrain.update.microbatches import sliced
from functrain.update.state import TrainState
from functrain.update.step import Step
from functrain.update.update import Update


def tell_of_no_mean(update: Update, state: TrainState, batch: Any) -> None:
    """Warns of a loss that is another for the same examples given twice, where a batch is taken apart.

    A mean over examples has the same, whatever its weights are. Of a loss that draws random numbers it can't be told.

    Args:
      update: of the run.
      state: any of the run.
      batch: what the update is given.
    """
    options = update.options
    by_example, by_shard = options.per_example is not None, options.by_shard
    if not by_example and by_shard is not None and is_explicit(by_shard.layout.mesh):
        return  # There a slice of rows that are cut has no type.
    count = len(jax.tree.leaves(batch)[0]) if by_example else options.microbatches
    layout = None if by_example or by_shard is None else by_shard.layout
    halves = (
        functools.partial(_slice_and_twice, count) if layout is None else functools.partial(_shard_and_twice, layout)
    )
    for step, phase in zip(update.stages[-1], update.schedule.phases, strict=True):
        is_random = state.key is not None and "key" in accepted_context(phase.loss_fn)
        if is_random:
            continue
        values = functools.partial(_once_and_twice, step, halves)
        once, twice = jax.jit(values)(state.params, state.model_state, np.int32(state.step), batch)
        for name, value in once.items():
            of, of_both = float(value), float(twice[name])
            # Means of the same numbers differ by rounding alone, also in 16 bits.
            if np.isfinite([of, of_both]).all() and not np.isclose(of, of_both, rtol=1e-2, atol=1e-4):
                what, advice = (
                    _of_example(count) if by_example else _of_slice(count) if layout is None else _of_shard(layout)
                )
                warn(
                    f"{what} {name_of(phase.loss_fn)} returns the {name!r} {of:.6g}, of the same twice {of_both:.6g},"
                    f" so that it is no mean over examples; {advice}, or return a sum as a mean,"
                    " ft.Loss(sum / count, weight=count)"
                )


def _of_slice(count: int) -> tuple[str, str]:
    return f"microbatches={count} computes another loss than the whole batch has: of a slice", "write microbatches=1"


def _of_shard(layout: Layout) -> tuple[str, str]:
    return (
        "reduce='window' computes another loss than the whole batch has, the mean of those of"
        f" {layout.data_shards} shards: of one",
        "leave reduce='window' out",
    )


def _of_example(count: int) -> tuple[str, str]:
    return (
        f"per_example= has the loss of each of the {count} examples by itself, which is not that of the batch: of one",
        "give each example what it is compared with (its own negatives) in the batch, or leave per_example= out",
    )


def _slice_and_twice(count: int, batch: Any) -> tuple[Any, Any]:
    """A slice of a batch, and its examples twice."""
    one = jax.tree.map(lambda leaf: leaf[0], sliced(batch, count))
    return one, jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)


def _shard_and_twice(layout: Layout, batch: Any) -> tuple[Any, Any]:
    """The rows of a shard, and these twice; what is not cut is the same in both."""

    def rows(times: int) -> Any:
        def of(leaf: Any, here: Any) -> Any:
            is_cut = len(here.spec) > 0 and here.spec[0] is not None
            return jnp.concatenate([leaf[: len(leaf) // layout.data_shards]] * times) if is_cut else leaf

        return each_with(of, layout.batch_shardings, batch)

    return rows(1), rows(2)


def _once_and_twice(
    step: Step, halves: Callable[[Any], tuple[Any, Any]], params: Any, model_state: Any, number: Any, batch: Any
) -> Any:
    """The losses of a part of the batch, and of its examples twice."""
    context, cast = Context(model_state=model_state, step=number), step.objective.cast(params)
    return [step.objective.losses(cast, each, context)[0] for each in halves(batch)]
