"""Evaluations as a run uses them: of whole params, on the devices of its batches, of averages if they ask for them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from functrain.errors import FitError
from functrain.loop.evaluation import Evaluation
from functrain.mesh.shares import Shardings
from functrain.update.state import TrainState
from functrain.update.update import Update


def prepared(evaluations: Evaluation | Sequence[Evaluation], update: Update, sharding: Shardings) -> list[Evaluation]:
    """The evaluations, of whole params; their batches go where those of training go unless they say otherwise.

    Raises:
      FitError: one is of averages, and the update has none.
    """
    evaluations = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    if any(each.params == "ema" for each in evaluations) and update.options.averages is None:
        raise FitError('Evaluation(..., params="ema") needs averages: make_update(..., ema={"body": 0.999})')
    if sharding:
        evaluations = [dataclasses.replace(each, sharding=each.sharding or sharding) for each in evaluations]
    if update.options.whole.partition.rest:
        put_back = update.options.whole.given_to
        evaluations = [dataclasses.replace(each, eval_step=put_back(each.eval_step)) for each in evaluations]
    return evaluations


def params_for(evaluation: Evaluation, update: Update, state: TrainState) -> Any:
    """What of a state an evaluation is of: its params, or the averages."""
    return update.options.whole.arrays(update.ema(state)) if evaluation.params == "ema" else state.params
