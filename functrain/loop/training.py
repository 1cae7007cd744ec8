"""A run, from where it stands to its end: read, update, log, evaluate, save."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax

from functrain.errors import FitError
from functrain.loop.batches import put_stacked
from functrain.loop.compiling import compile_for, most_steps
from functrain.loop.evaluation import Evaluation
from functrain.loop.evaluations import params_for
from functrain.loop.every import Every
from functrain.loop.hooks import Hooks
from functrain.loop.record.record import Record
from functrain.loop.rows import Rows
from functrain.loop.run import Run
from functrain.loop.saving import Saver, scalars
from functrain.loop.signals import StopSignals
from functrain.mesh.shares import Shardings, put
from functrain.update.phases import Turn
from functrain.update.stages import joins_within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done in a run, how often, and when it ends; the options are those of `fit`.

    Raises:
      FitError: neither epochs nor steps, or an option without what it needs.
    """

    epochs: int | None
    steps: int | None
    unroll: int
    sharding: Shardings
    log: Every
    rows: Rows
    hooks: Hooks
    evaluations: Sequence[Evaluation]
    saver: Saver | None
    load_best_on_end: bool | str
    record: Record | None

    @property
    def kept_best(self) -> Sequence[str]:
        """The results of which the best checkpoint is kept."""
        return [*self.saver.checkpoints.retention.best] if self.saver else []

    @property
    def best_at_end(self) -> str | None:
        """The result by which the best state is returned; None where that is not asked for, or can't be told."""
        if isinstance(self.load_best_on_end, str):
            return self.load_best_on_end if self.load_best_on_end in self.kept_best else None
        return self.kept_best[0] if self.load_best_on_end and len(self.kept_best) == 1 else None

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            raise FitError("fit needs an end: give epochs= or steps=")
        if not isinstance(self.unroll, int) or self.unroll < 1:
            raise FitError(f"unroll={self.unroll!r}: give a whole number of at least 1")
        names = [evaluation.name for evaluation in self.evaluations]
        if len({*names}) < len(names):
            raise FitError(f"two evaluations have one name: {names}; give each its own, Evaluation(..., name=)")
        for best in self.kept_best:
            if best.partition("/")[0] not in names:
                raise FitError(f"keep_best={best!r}: the evaluations are {names}; name a result of one, 'valid/loss'")
        if self.load_best_on_end and self.best_at_end is None:
            raise FitError(
                "load_best_on_end=True needs checkpoints=ft.Checkpoints(..., keep_best='valid/loss'); of several, name"
                " the one to go by, load_best_on_end='valid/loss'"
            )
        everies = [evaluation.every for evaluation in self.evaluations]
        everies += [self.saver.checkpoints.every] if self.saver else []
        if jax.process_count() > 1 and any(every.minutes is not None for every in everies):
            raise FitError(
                "the clocks of several processes differ: write Every(updates=) or Every(epochs=), not minutes="
            )


def train(run: Run, plan: Plan, signals: StopSignals, show: Callable[[], None]) -> None:
    """Goes on with a run to its end.

    Raises:
      FitError: the data gives no batch, or a result that is asked for is not there.
      NonFiniteError: a loss, or what of the state was logged, to be evaluated, saved or returned, or at an epoch's end,
        is NaN or infinite.
    """
    run.watch.begin(run.state)
    run.begin()
    saver = plan.saver
    last_sound = saver.last_sound if saver else None
    for _ in _advances(run, plan, signals):
        if run.step != run.done_until.step:
            plan.hooks.tell("update_ended", run)
        before, now = run.done_until, run.now
        run.done_until, run.evaluated = now, {}
        ends_epoch = now.epoch != before.epoch
        logs = run.metrics and (plan.log.due(before, now) or (ends_epoch and run.means.has_new))
        evaluations = [evaluation for evaluation in plan.evaluations if evaluation.every.due(before, now)]
        saves = saver is not None and saver.checkpoints.every.due(before, now)
        if logs or evaluations or ends_epoch:
            run.check(last_sound)
        if logs:
            plan.rows.add(run, plan.rows.training(run, now))
        if evaluations:
            _evaluate(run, plan, evaluations)
        if ends_epoch:
            plan.hooks.tell("epoch_ended", run)
        if saver and (saves or (evaluations and saver.checkpoints.is_best(run.evaluated))):
            plan.rows.flush()
            saver.save(run)
        if saver and logs:
            plan.rows.settle(saver.settled())
        show()
    run.check(last_sound)
    if saver:
        plan.rows.flush()
        saver.save(run)
    if signals.received is not None:
        run.reader.close()


def _advances(run: Run, plan: Plan, signals: StopSignals) -> Iterator[None]:
    """Reads and updates; lets the caller go on after each optimizer step, or scan, and at each epoch's end."""
    is_over, reader = functools.partial(_is_over, run, plan, signals), run.reader
    # A run that was killed at its last step may have its epoch's end before it.
    while (plan.epochs is None or run.epoch < plan.epochs) and (reader.read or not is_over()):
        reader.begin(run.epoch, signals.awaited)
        ends = is_over()
        while not ends and (batches := reader.next_chunk(_next_count(run, plan), signals.awaited)):
            if _update(run, plan, batches):
                yield
            ends = is_over()
        ends = ends or (batches is None and is_over())  # A signal ended the wait for them.
        # What is due at an epoch's end is done by a run that has come to it with its last step.
        is_cut_off = run.stopped is not None or signals.received is not None
        if ends and (is_cut_off or not reader.is_at_end(signals.awaited)):
            return
        if not reader.read:
            raise FitError(
                f"the data gave no batch in epoch {run.epoch}: an iterator can be read only once, give an iterable that"
                " begins anew, or end after one epoch"
            )
        run.end_epoch()
        yield


def _is_over(run: Run, plan: Plan, signals: StopSignals) -> bool:
    if signals.should_stop(int(run.state.batches)) and run.stopped is None and signals.received is not None:
        run.stop(f"it was sent {signals.received.name}")
        run.is_interrupted = True
    return run.stopped is not None or (plan.steps is not None and run.step >= plan.steps)


def is_through(run: Run, plan: Plan) -> bool:
    """Whether a run that stands here has nothing more to train."""
    is_last_epoch = plan.epochs is not None and run.epoch >= plan.epochs
    return run.stopped is not None or is_last_epoch or (plan.steps is not None and run.step >= plan.steps)


def _next_count(run: Run, plan: Plan) -> int:
    """How many batches the next update takes: of a scan all; 1 if a window is pending, or the end or a stage before.

    A scan begins with a cycle of phases, so that there is one program of it.
    """
    schedule = run.update.schedule
    is_within = schedule.alternates and run.step % sum(map(len, schedule.cycle)) > 0
    if plan.unroll == 1 or int(run.state.pending) or is_within:
        return 1
    count = run.update.cycle * plan.unroll
    turns = schedule.turns(run.step, count // run.update.accumulate)
    is_too_far = plan.steps is not None and run.step + sum(map(len, turns)) > plan.steps
    return 1 if is_too_far or joins_within(run.update.optim, run.step, turns) is not None else count


def _update(run: Run, plan: Plan, batches: Sequence[object]) -> bool:
    """One update, or one scan of many; says whether a step was made."""
    update, state = run.update, run.state
    compile_first = functools.partial(compile_for, run, log=plan.log, epochs=plan.epochs, steps=plan.steps)
    if len(batches) > 1:
        stacked = put_stacked(batches, plan.sharding)
        compile_first(scan=stacked)
        turns = update.schedule.turns(run.step, len(batches) // update.accumulate)
        is_measured = _will_log(run, plan, turns)
        return run.take(*update.scanned(state, stacked, measured=is_measured))
    batch = put(batches[0], plan.sharding)
    compile_first(batch=batch)
    ends_window = int(state.pending) + 1 == update.accumulate
    is_measured = ends_window and _will_be_shown(run, plan, update.schedule.turn(run.step))
    return run.take(*update.taken(state, batch, measured=is_measured))


def _will_log(run: Run, plan: Plan, turns: Sequence[Turn]) -> bool:
    """Whether it is time to log after these turns."""
    return plan.log.due(run.done_until, run.now._replace(step=run.step + sum(map(len, turns))))


def _will_be_shown(run: Run, plan: Plan, turn: Turn) -> bool:
    """Whether it is time to log after this turn, or before all its phases step again: a row has the norms of each."""
    schedule, log = run.update.schedule, plan.log
    if not schedule.alternates or log.updates is None:
        return _will_log(run, plan, [turn])
    following = step = run.step + len(turn)
    waiting = {*turn}
    while waiting := waiting - {*(other := schedule.turn(step))}:
        step += len(other)
    end = most_steps(run, epochs=plan.epochs, steps=plan.steps)
    last = step if end is None else max(following, min(step, end))
    return log.due(run.done_until, run.now._replace(step=last))


def _evaluate(run: Run, plan: Plan, due: Sequence[Evaluation]) -> None:
    """Evaluates, logs, and asks the hooks."""
    for evaluation in due:
        found = evaluation(params_for(evaluation, run.update, run.state), run.state.model_state)
        run.evaluated |= {f"{evaluation.name}/{name}": value for name, value in found.items()}
    run.watch.tell_results(run.step, run.evaluated)
    run.results |= run.evaluated
    missing = [best for best in plan.kept_best if best not in run.results]
    if missing and all(each in due for each in plan.evaluations):
        raise FitError(f"keep_best={missing[0]!r}: the results are {sorted(run.results)}; name one of them")
    plan.rows.add(run, scalars(run.evaluated))
    plan.hooks.tell("evaluation_ended", run)
