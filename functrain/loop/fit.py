"""The loop: `fit` starts a run, or goes on with it."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from functrain.errors import FitError
from functrain.loop.autopsy import autopsy_of
from functrain.loop.batches import put_ahead
from functrain.loop.checkpoint.checkpoints import Checkpoints
from functrain.loop.checkpoint.reading import Restored
from functrain.loop.compiling import keep_programs
from functrain.loop.evaluation import Evaluation
from functrain.loop.evaluations import prepared
from functrain.loop.every import Every
from functrain.loop.given import check_given, check_of_all, check_results, check_rows
from functrain.loop.hooks import EarlyStopping, Hook, Hooks
from functrain.loop.lines import LOG
from functrain.loop.logs import JsonLines, Logger
from functrain.loop.progress import Shown, nothing_to_do, progress_shown, stopped_by, went_on
from functrain.loop.reader import Reader
from functrain.loop.record.record import Record
from functrain.loop.rows import Rows
from functrain.loop.run import Run
from functrain.loop.saving import Rates, Saver
from functrain.loop.shares import shared, where_batches_lie
from functrain.loop.signals import StopSignals
from functrain.loop.start import end_together
from functrain.loop.training import Plan, is_through, train
from functrain.mesh.shares import Shardings
from functrain.update.consumed import check_not_deleted
from functrain.update.packed import as_it_was
from functrain.update.state import TrainState
from functrain.update.update import Update


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
      state: the last state, or with `load_best_on_end` the best.
      ema: the params with the averages of that state in place, `update.ema(state)`; None without averages.
      history: what was logged, a dict for each row, with "step" and "epoch".
      results: the newest results of each evaluation, by name: "valid/loss".
      stopped: why it ended before its end, None if it did not.
      epochs: finished epochs.
      final: of a run with a record, the numbers of its final evaluation: {"last": {"test/loss": ...}, ...}.
    """

    state: TrainState
    ema: Any
    history: list[dict[str, Any]]
    results: dict[str, Any]
    stopped: str | None
    epochs: int
    final: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


def fit(
    update: Update,
    state: TrainState,
    data: Iterable[Any],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    evaluation: Evaluation | Sequence[Evaluation] = (),
    checkpoints: Checkpoints | None = None,
    record: Record | None = None,
    loggers: Sequence[Logger] = (),
    log: Every | None = None,
    log_last: bool = False,
    progress: bool | None = None,
    stop: EarlyStopping | None = None,
    hooks: Sequence[Hook] = (),
    unroll: int = 1,
    prefetch: int = 0,
    sharding: Shardings = None,
    load_best_on_end: bool | str = False,
    regroup: bool = False,
    fresh: bool = False,
    autopsy: bool = True,
    compilation_cache: str | os.PathLike[str] | None = None,
    rates: Rates = "program",
) -> Result:
    """Trains; the same call starts a run and goes on with it.

    >>> import functrain as ft, jax.numpy as jnp, numpy as np, optax
    >>> params = {"w": jnp.zeros(())}
    >>> optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    >>> update = ft.make_update(lambda params, batch: jnp.mean((params["w"] - batch["x"]) ** 2), optim)
    >>> data = ft.from_arrays({"x": np.ones(8, np.float32)}, batch_size=2)
    >>> result = fit(update, update.init(params), data, epochs=5)
    >>> int(result.state.step), round(float(result.state.params["w"]), 2)
    (20, 0.99)

    With checkpoints, a run that was killed at any instant goes on from the newest sound one, and ends with the bits
    with which it would have ended: parameters, optimizer state, pending window, data position, patience.

    Args:
      update: from `make_update`.
      state: what a new run starts with: `update.init(...)`.
      data: batches: an iterable that is read once an epoch, or one with `epoch(number)`, such as `ft.from_arrays`. An
        iterator that has `get_state` and `set_state`, as Grain's have, is resumed where it stood; else an epoch that
        was cut short starts again at its beginning.
      epochs: how often to go through the data.
      steps: optimizer steps after which to end; one of the two, or the first that is reached.
      evaluation: one, or several with different names.
      checkpoints: where to save, how often, and what to keep. A log in JSON lines is kept beside them.
      record: what is kept of the run for people, the log among it: how it went, its source, results and a report.
      loggers: more places for the numbers.
      log: how often to log, by default every 100 updates; the last step of every epoch is logged too. What is logged
        of the updates are weighted means since the last row, summed on the device, which is not read in between.
      log_last: log the metrics of the last update alone as well, under "train/last".
      progress: a progress bar; by default where there is a terminal, and where there is none a line at each evaluation
        and at each epoch's end, and where a run goes on from; False for none.
      stop: when to stop early.
      hooks: more that is done in a run.
      unroll: turns of the update (windows, and with phases whole cycles) in one dispatch, `update.scan`.
      prefetch: batches that a thread reads, and sends to the device, while the one before is computed; for data that
        is slow beside updates that something waits for, such as a log of each. The data must not depend on the run, and
        give each batch memory of its own; what is read in advance when a run ends is lost to an iterator without state.
      sharding: where batches go, those of evaluations too; by default as the optimizer's layout says, without one as
        `jax.jit` has it. One for all arrays of a batch, of which those of fewer axes take the beginning, or a dict of
        them by name. Of several processes each reads the rows that its devices hold; data that is not `from_arrays`' or
        `from_tfds`' or `from_source`'s gives these rows itself.
      load_best_on_end: return the state of the best checkpoint, by its `keep_best`; of several, the name of one.
      regroup: take a checkpoint of other parts or optimizers, and print what became of their state; see
        `Checkpoints.restore`.
      fresh: start a new run where there are checkpoints; they and their log are moved to a folder beside, and kept.
      autopsy: a run with checkpoints that ends for NaN is replayed from the last one, to say which batch and which
        operation it was; False leaves that out.
      compilation_cache: a folder in which JAX keeps what it compiles, so that a run that is started again compiles
        nothing. It is set for the process, as by `jax.config`, and stays so after the run.
      rates: with whose learning rates, and other hyperparameters, a run goes on where a constant of a part's `with_lr`
        or `with_state` was changed since it was saved: the "program"'s or the "checkpoint"'s, with a warning of both.
        What a hook has set stays where the program says what it said. What is no state (schedules,
        `optax.adam(1e-3)`) is always the program's.

    Returns:
      A `Result`.

    Raises:
      FitError: neither epochs nor steps, or an option without what it needs.
      CheckpointError: the checkpoints are of another update, none of them is sound, one can't be read, or another
        process writes to them.
      SaveError: the last save of the run failed.
      NonFiniteError: a loss, a parameter or model state is NaN or infinite, at a log, an evaluation, an epoch's end, a
        save, or the end of the run.
      UpdateError: an update has consumed the state, and there is no checkpoint to go on from.
      SystemExit: 143 or 130 after SIGTERM or SIGINT: the update was finished and saved, data was not waited for.
    """
    # Not locals(), by which the frame would keep the state as long as the run lasts.
    check_given({
        "update": update, "state": state, "data": data, "log": log, "checkpoints": checkpoints, "record": record,
        "stop": stop, "evaluation": evaluation, "hooks": hooks, "loggers": loggers, "rates": rates,
    })  # fmt: skip
    sharding = where_batches_lie(sharding, update)
    watching = [*([stop] if stop else []), *hooks, *([record] if record else [])]
    log, all_hooks = log or Every(updates=100), Hooks(watching)
    plan = Plan(
        epochs=epochs,
        steps=steps,
        unroll=unroll,
        sharding=sharding,
        log=log,
        rows=_rows(loggers, checkpoints, record, log_last=log_last),
        hooks=all_hooks,
        evaluations=prepared(evaluation, update, sharding),
        saver=Saver(checkpoints, all_hooks, rates) if checkpoints else None,
        load_best_on_end=load_best_on_end,
        record=record,
    )
    check_results(plan.evaluations, watching, plan.kept_best, as_it_was(state))
    run = _run(update, state, data, plan, prefetch, compilation_cache)
    del state  # A run that goes on has another one, and memory for no more than that.
    return _ended(run, plan, progress=progress, regroup=regroup, fresh=fresh, autopsy=autopsy)


def _run(
    update: Update, state: TrainState, data: Iterable[Any], plan: Plan, prefetch: int, compilation_cache: Any
) -> Run:
    """Where a run stands before it begins."""
    keep_programs(compilation_cache)
    # What is read in advance goes to the device at once, but for a scan, which stacks it first.
    place = functools.partial(put_ahead, sharding=plan.sharding) if plan.unroll == 1 else None
    state = as_it_was(state)  # Where there is a checkpoint, the run goes on from that.
    check_of_all(state)
    check_rows(data, plan.sharding, ends_early=plan.steps is not None)
    if plan.record:
        plan.record.prepare(update, state, plan.sharding)
    run = Run(update, state, Reader(shared(data, plan.sharding), prefetch, place), plan.rows.add)
    run.checkpoints = plan.saver.checkpoints if plan.saver else None
    return run


def _ended(run: Run, plan: Plan, *, progress: bool | None, regroup: bool, fresh: bool, autopsy: bool) -> Result:
    """Has a run go on to its end; returns what it leaves."""
    end_together()
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        restored = _begin(run, plan, stack, regroup=regroup, fresh=fresh)
        shown = progress_shown(run, epochs=plan.epochs, steps=plan.steps, data=run.reader.data, wanted=progress)
        _go_through(run, plan, signals, stack.enter_context(shown), restored, regroup=regroup, autopsy=autopsy)
        _take_best(run, plan, regroup=regroup)
    return _result(run, plan.record)


def _begin(run: Run, plan: Plan, stack: contextlib.ExitStack, *, regroup: bool, fresh: bool) -> Restored | None:
    """Has a run go on where it stood, or begin, None; what is opened for it, the stack closes."""
    if plan.record:
        stack.callback(plan.record.close)
    stack.callback(plan.rows.close)
    if plan.saver:
        stack.callback(lambda saver: plan.rows.settle(saver.settled()), plan.saver)  # When the last save has ended.
        plan.saver.checkpoints.open()
        stack.push(plan.saver.checkpoints.__exit__)
    aside = _start_anew(plan) if fresh else None
    restored = plan.saver.restore(run, regroup=regroup) if plan.saver else None
    if restored is None:
        check_not_deleted(jax.tree.leaves(run.state))
    _tell_regrouped(restored)
    run.went_on_from = None if restored is None else restored.path
    if plan.record:
        plan.record.open(goes_on=restored is not None or (run.step > 0 and not fresh), aside=aside)
        plan.rows.start(plan.record.config)
        if plan.saver and plan.record.sent is not None:
            plan.saver.checkpoints.send_first(plan.record.sent)  # A row is there before what a run goes on from.
    plan.rows.resume(run, is_restored=restored is not None)
    if plan.saver:
        plan.rows.settle(plan.saver.settled())
    return restored


def _start_anew(plan: Plan) -> Path | None:
    """Moves what an earlier run left out of the way; returns where, if its record was among it."""
    if plan.saver is None:
        if plan.record is None:
            raise FitError("fresh=True starts anew where there are checkpoints: give checkpoints=, or leave it out")
        return None
    checkpoints = plan.saver.checkpoints
    if (aside := checkpoints.start_anew()) is None:
        return None
    if jax.process_index() == 0:
        if (log := checkpoints.directory / LOG).exists():
            log.rename(aside / LOG)
        where = checkpoints.where
        print(f"a new run begins; what was in {where} is kept in {where}/{aside.name}")
    return aside if plan.record is not None and plan.record.directory == checkpoints.directory else None


def _go_through(
    run: Run,
    plan: Plan,
    signals: StopSignals,
    shown: Shown,
    restored: Restored | None,
    *,
    regroup: bool,
    autopsy: bool,
) -> None:
    """Trains, saves, and tells the hooks how it begins and ends; the error of a NaN says what there is to say."""
    error: BaseException | None = None
    run.was_through = is_through(run, plan)
    try:
        plan.hooks.tell("run_started", run)
        try:
            _train(run, plan, signals, shown, restored)
        finally:
            run.reader.rest()
    except BaseException as raised:
        error = raised
        if autopsy and plan.saver and raised is run.watch.raised:
            raised.args = (f"{raised}\n{autopsy_of(run, plan, signals, regroup=regroup)}",)
        raise
    finally:
        plan.hooks.tell("run_ended", run, error)
        for path in plan.record.files if plan.record else []:
            plan.rows.artifact(path)
    if plan.saver:
        plan.saver.checkpoints.wait()
    if signals.received is not None:
        shown.say(stopped_by(run, signals.received.name))
        raise SystemExit(signals.exit_code)


def _train(run: Run, plan: Plan, signals: StopSignals, shown: Shown, restored: Restored | None) -> None:
    """Trains, and says of a run that was there before where it goes on, or that nothing is left of it."""
    is_over, stood = is_through(run, plan), (run.step, run.epoch)
    where = plan.saver.checkpoints.where if plan.saver else ""
    if restored is not None and not is_over:
        shown.say(went_on(run, f"{where}/{restored.path.name}"))
    train(run, plan, signals, shown.update)
    if restored is not None and is_over and (run.step, run.epoch) == stood:
        shown.say(nothing_to_do(run, where))


def _take_best(run: Run, plan: Plan, *, regroup: bool) -> None:
    """Gives the run the state of the best checkpoint, if it is asked for and there is one."""
    if plan.best_at_end is None or plan.saver is None:
        return
    checkpoints = plan.saver.checkpoints
    if (best := checkpoints.best(plan.best_at_end)) is not None:
        restored = checkpoints.restore(like=run.state, step=best, regroup=regroup)
        assert restored is not None
        _tell_regrouped(restored)
        run.state = restored.state


def _result(run: Run, record: Record | None) -> Result:
    ema = run.update.ema(run.state) if run.update.options.averages else None
    final = record.results if record else {}
    return Result(run.state, ema, run.history, run.results, run.stopped, run.epoch, final)


def _tell_regrouped(restored: Restored | None) -> None:
    if restored is not None and restored.report is not None:
        print(restored.report)


def _rows(loggers: Sequence[Logger], checkpoints: Checkpoints | None, record: Record | None, *, log_last: bool) -> Rows:
    """Where numbers go: the first process writes them, to the log of the run too; all find them there."""
    path = record.log_file if record else checkpoints.directory / LOG if checkpoints else None
    # It says what a run that goes on has logged: last, so that no other logger lacks what it has.
    of_first = [*loggers, *([] if path is None else [JsonLines(path)])]
    return Rows([] if jax.process_index() else of_first, path, log_last=log_last)
