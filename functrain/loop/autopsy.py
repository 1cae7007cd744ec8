"""The autopsy: a run that ended for NaN is replayed from a checkpoint, to the operation of which it came."""

import contextlib
import linecache
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from functrain.auditing.origin import Known, Origin, walk
from functrain.loop.checkpoint.reading import Restored
from functrain.loop.finite import is_loss
from functrain.loop.run import Run
from functrain.loop.signals import StopSignals
from functrain.loop.training import Plan
from functrain.mesh.shares import put
from functrain.tree.arrays import replicated_over
from functrain.tree.paths import flatten
from functrain.tree.text import listed
from functrain.update.anatomy import Output, taken_apart
from functrain.update.state import TrainState
from functrain.update.update import Update

_KINDS = {"loss": "loss", "gradient": "gradients", "parameter": "parameters", "pending gradient": "pending gradients",
          "model state": "model state"}  # fmt: skip


class _Turn(NamedTuple):
    """A call of the update in a replay.

    Attributes:
      epoch: the number of the epoch.
      number: the batch's within it; None for the flush at its end.
      batch: what the call is given.
    """

    epoch: int
    number: int | None
    batch: Any


class _Ended(Exception):  # noqa: N818  It is no error: it says why there is no more to say.
    """There is no more to find, for the reason that it gives."""


def autopsy_of(run: Run, plan: Plan, signals: StopSignals, *, regroup: bool) -> str:
    """What there is to say of why a run with checkpoints ended for NaN, in lines; no error leaves it.

    Nothing of the run is touched: the checkpoint is read anew, and so is the data.
    """
    said: list[str] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # They were told when the run began.
            for line in _Replay(run, plan, signals, regroup=regroup).said():
                said.append(line)
    except _Ended as end:
        said.append(str(end))
    except Exception as error:  # The error that ended the run is the one to tell.
        said.append(f"it got no further: {type(error).__name__}: {str(error) or 'no more is known'}")
    return "\n  ".join(["the autopsy:", *said])


class _Replay:
    """A run again, from its newest sound checkpoint to where it ended."""

    def __init__(self, run: Run, plan: Plan, signals: StopSignals, *, regroup: bool) -> None:
        self._run, self._plan, self._signals, self._regroup = run, plan, signals, regroup
        self._update: Update = run.update

    def said(self) -> Iterator[str]:
        """What is found, line by line.

        Raises:
          _Ended: there is no more to find.
        """
        self._goes_on()
        restored = self._restored()
        print(f"step {self._run.step} is not finite: it is replayed from {restored.path} to find why", file=sys.stderr)
        suspects = dict(self._suspects(restored))
        if not suspects:
            raise _Ended(
                f"the replay from {restored.path} stayed finite: what was not is not of the update and its data alone,"
                " but of a hook that changes the state, or of data that is another each time"
            )
        state = self._restored().state
        for number, turn in enumerate(self._turns(restored)):
            if number in suspects:
                is_found = False
                for line in self._looked_into(state, turn, suspects[number]):
                    is_found = True
                    yield line
                if is_found:
                    return
            state, _ = self._taken(state, turn)

    def _looked_into(self, state: TrainState, turn: _Turn, what: str) -> Iterator[str]:
        """What is found of one update, of which it is known what of it is not finite; nothing if all is.

        Raises:
          _Ended: there is no more to find.
        """
        bad: list[tuple[Output, Origin]] = []
        try:
            anatomy = taken_apart(self._update, state, turn.batch, flushes=turn.number is None)
            with _mesh_of(state):
                walked = walk(anatomy.program, anatomy.values, anatomy.names)
            bad = self._bad(anatomy.outputs, walked)
        finally:
            if bad or what:
                where = self._place(turn, state, bad)
                yield f"{where} is the first that is not finite, in {_in_words(bad) or what}"
        if bad:
            yield from _told(bad)
        elif what:
            raise _Ended("operation by operation all of it is finite: XLA computes in another order or precision")

    def _restored(self) -> Restored:
        """The newest sound checkpoint.

        Raises:
          _Ended: there can be no replay; says why.
        """
        if jax.process_count() > 1:
            raise _Ended("there is none of a run of several processes; go on with it in one, to have one")
        saver = self._plan.saver
        restored = None if saver is None else saver.read(self._run, regroup=self._regroup)
        if restored is None:
            raise _Ended(
                "no checkpoint was saved before it, from which to replay: save what the run begins with,"
                " checkpoints.save(state) before ft.fit(...)"
            )
        return restored

    def _suspects(self, restored: Restored) -> Iterator[tuple[int, str]]:
        """The numbers of the turns that may be the first, in order; of the last one, which is, what is not finite."""
        state = restored.state
        for number, turn in enumerate(self._turns(restored)):
            if turn.number is not None and int(state.batches) >= int(self._run.state.batches):
                return
            state, metrics = self._taken(state, turn)
            found, bad = self._run.watch.found(state), self._bad_metrics(metrics)
            losses = [name for name in bad if is_loss(name)]
            if losses or any(found):
                yield number, " and ".join([*losses, *([str(found)] if any(found) else [])])
                return
            if bad:  # A norm, which can overflow where no gradient does.
                yield number, ""

    def _bad_metrics(self, metrics: Any) -> list[str]:
        """The losses and norms of gradients that are not finite."""
        if self._update.options.skips:
            return []
        asked = {
            name: value for name, value in flatten(metrics).items() if is_loss(name) or name.endswith("/grad_norm")
        }
        return [name for name, value in jax.device_get(asked).items() if not np.all(np.isfinite(value))]

    def _turns(self, restored: Restored) -> Iterator[_Turn]:
        """The calls of the update from a checkpoint on, for ever.

        Raises:
          _Ended: a signal came, or the data can't be read again.
        """
        extra = restored.extra or {"epoch": 0, "read": 0}
        reader, epoch = self._run.reader.again(restored.data, extra["read"]), extra["epoch"]
        if reader is None:
            raise _Ended(
                "the data can't be resumed, and so not replayed: give data whose iterator has get_state and set_state,"
                " such as ft.from_arrays or Grain's, or a list"
            )
        try:
            while True:
                reader.begin(epoch, self._signals.awaited)
                while self._goes_on() and (chunk := reader.next_chunk(wait=self._signals.awaited)):
                    yield _Turn(epoch, reader.read - 1, put(chunk[0], self._plan.sharding))
                self._goes_on()
                if not reader.read:
                    return
                yield _Turn(epoch, None, None)
                reader.end_epoch()
                epoch += 1
        finally:
            reader.close()

    def _goes_on(self) -> bool:
        if self._signals.received is not None:
            raise _Ended(f"{self._signals.received.name} ended it: start the run again to have one")
        return True

    def _taken(self, state: TrainState, turn: _Turn) -> tuple[TrainState, Any]:
        if turn.number is None:
            return self._update.flush(state)
        return self._update.measured(state, turn.batch)

    def _place(self, turn: _Turn, state: TrainState, bad: Sequence[tuple[Output, Origin]]) -> str:
        """Which update, and which batch, in words."""
        phases = [self._update.schedule.phases[index].name for index in self._update.schedule.turn(int(state.step))]
        phase = next((output.phase for output, _ in bad if output.phase), phases[0] if len(phases) == 1 else "")
        update = f"update {int(state.step) + 1 + (phases.index(phase) if phase in phases else 0)}"
        if phase:
            update += f", of phase {phase!r}"
        if turn.number is None:
            return f"{update}, with the window that the end of epoch {turn.epoch} cuts short,"
        of_window, count = "", self._update.accumulate
        if count > 1:
            of_window = f", number {int(state.pending)} of the {count} of its window"
        return f"{update}, with batch {turn.number} of epoch {turn.epoch}{of_window} (counted from 0),"

    def _bad(self, outputs: Sequence[Output], walked: Sequence[Known]) -> list[tuple[Output, Origin]]:
        """What is not finite of the first phase that has something, else of what the update leaves."""
        changed = ("parameter", "model state")
        bad = [
            (output, known.origin)
            for output, known in zip(outputs, walked, strict=True)
            if known.origin is not None and (output.kind in changed or not self._update.options.skips)
        ]
        users = self._run.watch.users()
        bad = [each for each in bad if each[0].kind != "model state" or each[0].name not in users]
        on_its_way = [each for each in bad if each[0].kind in ("loss", "gradient")]
        return [each for each in on_its_way if each[0].phase == on_its_way[0][0].phase] or bad


def _mesh_of(state: TrainState) -> contextlib.AbstractContextManager[Any]:
    """The mesh over which params lie, for operations that say where their result goes and have no operand there."""
    replicated = replicated_over(state.params)
    return jax.set_mesh(replicated.mesh) if replicated is not None else contextlib.nullcontext()


def _in_words(bad: Sequence[tuple[Output, Origin]]) -> str:
    """What is not finite: losses by name, leaves by part."""
    found: dict[str, list[str]] = {}
    for output, _ in bad:
        of_part = f" of part {output.part!r}" if output.part else ""
        found.setdefault(f"the {_KINDS[output.kind]}{of_part}", []).append(output.name)
    said = [f"{what} ({listed(names)})" for what, names in found.items()]
    return ", ".join(said[:-1]) + (" and " if said[1:] else "") + "".join(said[-1:])


def _told(bad: Sequence[tuple[Output, Origin]]) -> Iterator[str]:
    """The operation of which it came, and its line."""
    origin = min(origin for _, origin in bad)
    file, line, function = origin.place
    where = f"{_shortened(file)}:{line}, in {function}" if file else "a line that is not known"
    if all(output.kind == "gradient" for output, _ in bad) and not origin.source:
        where += ", or in its derivative"  # The loss is finite.
    if origin.turn is not None:
        where += f", in turn {origin.turn} of its loop"
    yield f"it {'enters' if origin.source else 'is made'} at {where}: {origin.text}"
    # Python's own lookup of a relative path takes any file of that name that it can import from.
    if (os.path.isabs(file) or file.startswith("<")) and (text := linecache.getline(file, line).strip()):
        yield f"  {text}"


def _shortened(file: str) -> str:
    """The path of a file, from here if it is below."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here)
