"""The loop: epochs of updates, with evaluation, checkpoints and logs between them."""

import contextlib
import dataclasses
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import FitError
from functrain.loop.checkpoints import Checkpoints
from functrain.loop.evaluation import Evaluation, placed
from functrain.loop.every import Every
from functrain.loop.hooks import EarlyStopping, Hook
from functrain.loop.logs import JsonLines, Logger, read_json_lines
from functrain.loop.run import Run
from functrain.loop.signals import StopSignals
from functrain.optim.learning_rate import rates_in
from functrain.update.state import TrainState
from functrain.update.update import Update

_LOG = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
      state: the last state, or with `load_best_on_end` the best.
      history: what was logged, a dict for each row, with "step" and "epoch".
      results: the newest results of each evaluation, by name: "valid/loss".
      stopped: why it ended before its end, None if it did not.
      epochs: finished epochs.
    """

    state: TrainState
    history: list[dict[str, Any]]
    results: dict[str, Any]
    stopped: str | None
    epochs: int


def fit(
    update: Update,
    state: TrainState,
    data: Iterable[Any],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    evaluation: Evaluation | Sequence[Evaluation] = (),
    checkpoints: Checkpoints | None = None,
    loggers: Sequence[Logger] = (),
    log: Every | None = None,
    progress: bool | None = None,
    stop: EarlyStopping | None = None,
    hooks: Sequence[Hook] = (),
    unroll: int = 1,
    sharding: jax.sharding.Sharding | None = None,
    load_best_on_end: bool = False,
    regroup: bool = False,
) -> Result:
    """Trains; the same call starts a run and goes on with it.

    >>> import functrain as ft, jax.numpy as jnp, optax
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
      loggers: more places for the numbers.
      log: how often to log, by default every 100 updates; what is not logged is not read from the device.
      progress: a progress bar; by default where there is a terminal.
      stop: when to stop early.
      hooks: more that is done in a run.
      unroll: turns of the update (windows, and with phases whole cycles) in one dispatch, `update.scan`; logs then have
        no norms by part.
      sharding: where batches go, those of evaluations too; by default as `jax.jit` has it.
      load_best_on_end: return the state of the best checkpoint, by its `keep_best`.
      regroup: take a checkpoint of other parts or optimizers; see `Checkpoints.restore`.

    Returns:
      A `Result`.

    Raises:
      FitError: neither epochs nor steps, or an option without what it needs.
      CheckpointError: the checkpoints are of another update, or another process writes to them.
      SaveError: the last save of the run failed.
      NonFiniteError: a loss that was logged, or a parameter that was to be saved, is NaN or infinite.
      SystemExit: 143 or 130 after SIGTERM or SIGINT: the update was finished and saved.
    """
    evaluations = [evaluation] if isinstance(evaluation, Evaluation) else list(evaluation)
    if sharding is not None:
        evaluations = [dataclasses.replace(each, sharding=each.sharding or sharding) for each in evaluations]
    _check(epochs, steps, evaluations, checkpoints, unroll, load_best_on_end)
    all_loggers = [*loggers]
    path = None if checkpoints is None else checkpoints.directory / _LOG
    if jax.process_index():
        all_loggers = []
    elif path is not None:
        all_loggers.insert(0, JsonLines(path))
    run = Run(
        update, state, evaluations=evaluations, checkpoints=checkpoints, loggers=all_loggers,
        hooks=[*([stop] if stop else []), *hooks], log=log or Every(updates=100),
    )  # fmt: skip
    error: BaseException | None = None
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        for logger in all_loggers:
            stack.callback(logger.close)
        position = None
        if checkpoints is not None:
            checkpoints.open()
            stack.push(checkpoints.__exit__)
            position = _restored(run, checkpoints, regroup)
        for logger in all_loggers:
            logger.resume(run.step or -1)
        if path is not None and position is not None:
            run.has_logged(_rows_until(run.step, path))
        show = stack.enter_context(_progress_bar(run, epochs, steps, data, progress))
        try:
            run.tell("run_started")
            _train(run, signals, data, position, epochs, steps, unroll, sharding, show)
            run.save()
        except BaseException as raised:
            error = raised
            raise
        finally:
            run.tell("run_ended", error)
        if checkpoints is not None:
            checkpoints.wait()
        if signals.received is not None:
            raise SystemExit(signals.exit_code)
        if load_best_on_end and checkpoints is not None and (best := checkpoints.best()) is not None:
            restored = checkpoints.restore(like=run.state, step=best, regroup=regroup)
            assert restored is not None
            run.state = restored.state
    return Result(run.state, run.history, run.results, run.stopped, run.epoch)


def _check(
    epochs: int | None,
    steps: int | None,
    evaluations: Sequence[Evaluation],
    checkpoints: Checkpoints | None,
    unroll: int,
    load_best_on_end: bool,
) -> None:
    if epochs is None and steps is None:
        raise FitError("fit needs an end: give epochs= or steps=")
    if not isinstance(unroll, int) or unroll < 1:
        raise FitError(f"unroll={unroll!r}: give a whole number of at least 1")
    names = [evaluation.name for evaluation in evaluations]
    if len({*names}) < len(names):
        raise FitError(f"two evaluations have one name: {names}; give each its own, Evaluation(..., name=)")
    best = None if checkpoints is None else checkpoints.keep_best
    if best is not None and best.partition("/")[0] not in names:
        raise FitError(f"keep_best={best!r}: the evaluations are {names}; name a result of one, 'valid/loss'")
    if load_best_on_end and best is None:
        raise FitError("load_best_on_end=True needs checkpoints=ft.Checkpoints(..., keep_best='valid/loss')")
    everies = [evaluation.every for evaluation in evaluations] + ([checkpoints.every] if checkpoints else [])
    if jax.process_count() > 1 and any(every.minutes is not None for every in everies):
        raise FitError("the clocks of several processes differ: write Every(updates=) or Every(epochs=), not minutes=")


def _restored(run: Run, checkpoints: Checkpoints, regroup: bool) -> tuple[Any] | None:
    """Takes the newest checkpoint; returns the position in the data in a tuple, None if there is no checkpoint."""
    given = _constant_rates(run.state)
    restored = checkpoints.restore(like=run.state, regroup=regroup)
    if restored is None:
        return None
    for part, rate in _constant_rates(restored.state).items():
        if given.get(part, rate) != rate:
            warnings.warn(
                f"part {part!r} goes on with the learning rate {rate:g} of the checkpoint, not with the {given[part]:g}"
                " that its optimizer was made with; to change it within a run, have a hook do so in run_started:"
                " run.state = dataclasses.replace(run.state, opt_state="
                f"optim.with_learning_rates(run.state.opt_state, {{{part!r}: {given[part]:g}}}))",
                stacklevel=3,
            )
    run.restored(restored.state, restored.extra)
    return (restored.data,)


def _constant_rates(state: TrainState) -> dict[str, float]:
    """The learning rates that no schedule says, by part."""
    found = {part: rates_in(opt_state) for part, opt_state in state.opt_state.items()}
    return {part: float(rates[0].setting) for part, rates in found.items() if rates and rates[0].setting is not None}


def _rows_until(step: int, path: Path) -> list[dict[str, Any]]:
    return [row for row in read_json_lines(path) if row["step"] <= step] if path.exists() else []


def _train(
    run: Run,
    signals: StopSignals,
    data: Iterable[Any],
    position: tuple[Any] | None,
    epochs: int | None,
    steps: int | None,
    unroll: int,
    sharding: jax.sharding.Sharding | None,
    show: Callable[[], None],
) -> None:
    is_cut_short = position is not None and run.read > 0
    while (epochs is None or run.epoch < epochs) and (is_cut_short or not _over(run, signals, steps)):
        batches = _batches(data, run, position)
        position, is_cut_short = None, False
        # A run that was killed at its last step may have its epoch's end before it.
        is_over = _over(run, signals, steps)
        for chunk in () if is_over else _chunks(batches, run, steps, unroll):
            _advance(run, chunk, sharding)
            show()
            is_over = _over(run, signals, steps)
            if is_over:
                break
        if is_over and not _ends_here(batches, run, signals):
            return
        if not run.read:
            raise FitError(
                f"the data gave no batch in epoch {run.epoch}: an iterator can be read only once, give an iterable that"
                " begins anew, or end after one epoch"
            )
        run.reads_from(lambda: None)
        run.advanced(*run.update.flush(run.state), epoch_ended=True)
        show()


def _ends_here(batches: Iterator[Any], run: Run, signals: StopSignals) -> bool:
    """Whether a run that is over has come to its epoch's end as well, whose evaluation is due then."""
    if run.stopped is not None or signals.received is not None:
        return False
    run.reads_from(functools.partial(_same, run.position()))  # The look ahead reads a batch.
    return next(batches, None) is None


def _over(run: Run, signals: StopSignals, steps: int | None) -> bool:
    if signals.should_stop(int(run.state.batches)) and run.stopped is None and signals.received is not None:
        run.stop(f"it was sent {signals.received.name}")
    return run.stopped is not None or (steps is not None and run.step >= steps)


def _batches(data: Any, run: Run, position: tuple[Any] | None) -> Iterator[Any]:
    """The batches of the epoch, from where the run stands in it."""
    batches = iter(data.epoch(run.epoch) if callable(getattr(data, "epoch", None)) else data)
    is_resumable = hasattr(batches, "get_state") and hasattr(batches, "set_state")
    if position is not None and run.read:
        if is_resumable:
            batches.set_state(position[0])
        else:
            warnings.warn(
                f"the data can't be resumed: epoch {run.epoch} starts again at its beginning, after {run.read} batches"
                " of it; give data whose iterator has get_state and set_state, such as ft.from_arrays or Grain's",
                stacklevel=4,
            )
            run.read = 0
    run.reads_from(batches.get_state if is_resumable else lambda: None)
    iterator: Iterator[Any] = batches
    return iterator


def _chunks(batches: Iterator[Any], run: Run, steps: int | None, unroll: int) -> Iterator[list[Any]]:
    """The batches one by one, or as many as a scan takes wherever it can take them."""
    if unroll == 1:
        for batch in batches:
            run.read += 1
            yield [batch]
        return
    position = run.position
    while True:
        chunk, positions = [], []
        for batch in itertools.islice(batches, _scanned(run, steps, unroll)):
            chunk.append(batch)
            positions.append(position())
        if not chunk:
            return
        if len(chunk) > 1 and len(chunk) == _scanned(run, steps, unroll) and len({*map(_form, chunk)}) == 1:
            run.read += len(chunk)
            yield chunk
            continue
        for batch, after in zip(chunk, positions, strict=True):
            run.read += 1
            run.reads_from(functools.partial(_same, after))
            yield [batch]
        run.reads_from(position)


def _scanned(run: Run, steps: int | None, unroll: int) -> int:
    """How many batches the next scan takes; 1 where a window is pending, or the end comes first."""
    count = run.update.cycle * unroll
    turns = run.update.schedule.turns(run.step, count // run.update.accumulate)
    if int(run.state.pending) or (steps is not None and run.step + sum(map(len, turns)) > steps):
        return 1
    return count


def _same(value: Any) -> Any:
    return value


def _form(batch: Any) -> Any:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _advance(run: Run, chunk: list[Any], sharding: jax.sharding.Sharding | None) -> None:
    """One update, or one scan of many."""
    update, state = run.update, run.state
    if len(chunk) > 1:
        stacked = jax.tree.map(_stacked, *chunk)
        if isinstance(sharding, jax.NamedSharding):
            sharding = jax.NamedSharding(sharding.mesh, jax.P(None, *sharding.spec))
        state, metrics = update.scan(state, placed(stacked, sharding))
        run.advanced(state, metrics, stacked=True)
        return
    batch = placed(chunk[0], sharding)
    ends = int(state.pending) + 1 == update.accumulate
    if ends and run.is_logged_at(run.step + len(update.schedule.turn(run.step))):
        run.advanced(*update.measured(state, batch))
    else:
        run.advanced(*update(state, batch))


def _stacked(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


@contextlib.contextmanager
def _progress_bar(
    run: Run, epochs: int | None, steps: int | None, data: Any, progress: bool | None
) -> Iterator[Callable[[], None]]:
    """A bar of optimizer steps on the terminal, or none; gives the function that brings it up to date."""
    if jax.process_index() or not (sys.stderr.isatty() if progress is None else progress):
        yield lambda: None
        return
    from tqdm import tqdm

    total, shown = steps, 0
    if total is None and epochs is not None and hasattr(data, "__len__"):
        batches, k = len(data), run.update.accumulate
        windows = {"flush": epochs * -(-batches // k), "drop": epochs * (batches // k), "carry": epochs * batches // k}
        total = sum(map(len, run.update.schedule.turns(0, windows[run.update.options.remainder])))
    with tqdm(total=total, initial=run.step, unit="step") as bar:

        def show() -> None:
            nonlocal shown
            bar.update(run.step - bar.n)
            if len(run.history) != shown:
                shown = len(run.history)
                bar.set_postfix({name: value for name, value in run.history[-1].items() if name.endswith("/loss")})

        yield show
