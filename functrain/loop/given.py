"""What `fit` is given in the place of what it takes, said before anything runs."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np

from functrain.errors import FitError
from functrain.loop.checkpoint.checkpoints import Checkpoints
from functrain.loop.data import Data
from functrain.loop.evaluation import Evaluation
from functrain.loop.every import Every
from functrain.loop.hooks import EarlyStopping, Hook, OnResult
from functrain.loop.record.record import Record
from functrain.loop.saving import Rates
from functrain.mesh.shares import Shardings, check_divided, first_of, for_rank
from functrain.tree.arrays import is_here
from functrain.tree.text import listed
from functrain.update.state import TrainState
from functrain.update.update import Update


def check_given(options: Mapping[str, Any]) -> None:
    """Raises for an argument of `fit` that is of another kind; they are given by name.

    Raises:
      FitError: says what was given, and what to write.
    """
    _is(options["update"], Update, "update", "ft.make_update(loss_fn, optim)")
    _is(options["state"], TrainState, "state", "update.init(params)")
    check_data(options["data"])
    if options["log"] is not None:
        _is(options["log"], Every, "log=", f"ft.Every(updates={_number(options['log'])})")
    if options["checkpoints"] is not None:
        _is(options["checkpoints"], Checkpoints, "checkpoints=", f"ft.Checkpoints({str(options['checkpoints'])!r})")
    if options["record"] is not None:
        _is(options["record"], Record, "record=", f"ft.Record({str(options['record'])!r})")
    if options["stop"] is not None:
        _is(options["stop"], EarlyStopping, "stop=", "ft.EarlyStopping('valid/loss', patience=3)")
    evaluations = options["evaluation"]
    for each in [evaluations] if not isinstance(evaluations, Sequence) else evaluations:
        _is(each, Evaluation, "evaluation=", "ft.Evaluation(eval_step, data)")
    for name, example in (("hooks", "[hook]"), ("loggers", "[ft.JsonLines(path)]")):
        if isinstance(options[name], str) or not isinstance(options[name], Iterable):
            raise FitError(f"{name}={options[name]!r}: give a list, {name}={example}")
    if options["rates"] not in get_args(Rates):
        raise FitError(f"rates={options['rates']!r}: write rates='program' or rates='checkpoint'")
    for logger in options["loggers"]:
        _is_logger(logger)
    for hook in options["hooks"]:
        if isinstance(hook, Record):
            raise FitError("hooks= has a Record, which would keep no log: write fit(..., record=record)")
        _is(hook, Hook, "hooks=", "a class with the base ft.Hook")


def check_results(
    evaluations: Sequence[Evaluation], hooks: Sequence[Hook], kept_best: Sequence[str], state: TrainState
) -> None:
    """Raises for an evaluation that can't be computed, and for a result that is asked for and that none gives.

    Raises:
      EvaluationError: an `eval_step`, a metric or data that do not fit each other.
      FitError: the name of a result in `EarlyStopping`, `ReduceOnPlateau` or `keep_best`.
    """
    known = []
    for each in evaluations:
        names = each.names(state.params, state.model_state)
        known += [each.name] if names is None else [f"{each.name}/{name}" for name in names]
    watching = [each for each in hooks if type(each).evaluation_ended is OnResult.evaluation_ended]
    asked = {f"keep_best={best!r}": best for best in kept_best}
    asked |= {f"{each.name}({each.result!r})": each.result for each in watching if isinstance(each, OnResult)}
    for what, result in asked.items():
        if not evaluations:
            raise FitError(f"{what}: no evaluation gives a result: fit(..., evaluation=ft.Evaluation(eval_step, data))")
        # A metric may compute numbers by name, and data that is read only once was not looked at.
        if not any(f"{result}/".startswith(f"{name}/") for name in known):
            raise FitError(f"{what}: the results are {sorted(known)}; name one of them")


def check_of_all(state: TrainState) -> None:
    """Raises for a state of this process alone in a run of several: each would train its own.

    Raises:
      FitError: says so, and how to place it.
    """
    if jax.process_count() > 1 and all(map(is_here, jax.tree.leaves(state.params))):
        raise FitError(
            f"the params lie in this process alone, and each of the {jax.process_count()} would train its own: place"
            " them over all, params = jax.device_put(params, jax.NamedSharding(mesh, jax.P())), before update.init"
        )


def _is(given: Any, kind: type, name: str, example: str) -> None:
    if not isinstance(given, kind):
        has_arrays = any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(given))
        shown = given.__name__ if callable(given) and hasattr(given, "__name__") else "" if has_arrays else repr(given)
        what = f"{shown[:100]} ({type(given).__name__})" if shown else type(given).__name__
        raise FitError(f"{name} takes {kind.__name__}, not {what}: write {example}")


def _is_logger(given: Any) -> None:
    absent = [name for name in ("log", "resume", "close") if not callable(getattr(given, name, None))]
    if absent:
        is_path = isinstance(given, str | os.PathLike)
        write = f"ft.JsonLines({os.fspath(given)!r})" if is_path else "ft.JsonLines(path), or an object that has them"
        raise FitError(f"loggers=: {given!r:.100} is no logger, as it has no {listed(absent)}: write {write}")


def check_rows(data: Any, sharding: Shardings, *, ends_early: bool) -> None:
    """Raises for batches that the devices do not divide, before the first and not after the last whole one.

    Args:
      data: of functrain, whose last batch is known; of other data each batch is told of when it comes.
      sharding: where batches go.
      ends_early: whether the run may end before the short last one.

    Raises:
      LayoutError: says what to write.
    """
    if not isinstance(data, Data) or (first := first_of(sharding)) is None:
        return
    short = data.examples % data.batch_size
    lengths = [data.batch_size] if data.examples >= data.batch_size or data.last == "pad" else []
    if short and data.last == "keep" and not ends_early:
        lengths.append(short)
    for length in lengths:
        check_divided(np.broadcast_to(0, (length,)), for_rank(first, 1))


def check_data(data: Any) -> None:
    """Raises for what gives no batches.

    Raises:
      FitError: says what was given, and what to write.
    """
    if inspect.isgeneratorfunction(data) or (
        callable(data) and not hasattr(data, "__iter__") and not _has_epochs(data)
    ):
        raise FitError(
            f"the data is the function {getattr(data, '__name__', data)!r}: give what it returns, or an object whose"
            " epoch(number) returns the batches of an epoch"
        )
    if isinstance(data, dict | jax.Array) or hasattr(data, "__array__") or isinstance(data, TrainState):
        raise FitError(
            f"the data is one {type(data).__name__}: give batches, ft.from_arrays(data, batch_size=32), or a list"
        )
    if isinstance(data, list | tuple) and not data:
        raise FitError("the data is an empty list: give at least one batch")
    if not hasattr(data, "__iter__") and not _has_epochs(data):
        raise FitError(f"the data is {data!r}: give an iterable of batches, such as ft.from_arrays(...)")


def _has_epochs(data: Any) -> bool:
    return callable(getattr(data, "epoch", None))


def _number(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 100
