"""Where a run stands, for hooks to look at."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from functrain.loop.checkpoint.checkpoints import Checkpoints
from functrain.loop.every import Moment
from functrain.loop.finite import LastSound, Watch, is_loss, losses_of
from functrain.loop.means import Means
from functrain.loop.reader import Reader
from functrain.update.state import TrainState
from functrain.update.update import Update


class Run:
    """Where a run stands; hooks are given it.

    Attributes:
      update: the compiled update.
      state: the state after the last update; the next one consumes it.
      watch: raises for what of it is NaN.
      reader: reads the data, and knows how many batches of this epoch it gave out.
      step: finished optimizer steps.
      epoch: finished epochs.
      metrics: the last update's, on the device until something reads them.
      means: those of all updates since the last row.
      results: the newest results of each evaluation, by name: "valid/loss".
      evaluated: the results of the evaluations that ended just now.
      history: the rows that were logged.
      rows: how many of them are of this step, without those that a log has from before the run was started again, and
        that are not come to yet.
      stopped: why the run ended before its end; None while it goes on.
      compiled: the kinds of calls whose programs were compiled: "batch", "scan".
      done_until: the moment up to which all that was due is done.
      batch: the shapes and dtypes of a batch; None before the first.
      checkpoints: where it is saved; None if nowhere.
      went_on_from: the checkpoint that it goes on from; None for a new run.
      was_through: nothing was left to do when it was started.
      is_interrupted: it was stopped to be gone on with, by a signal.
    """

    def __init__(
        self, update: Update, state: TrainState, reader: Reader, write: Callable[["Run", Mapping[str, Any]], None]
    ) -> None:
        self.update, self.state, self.reader, self._write = update, state, reader, write
        self.watch = Watch(update, state)
        self.step, self.epoch = int(state.step), 0
        self.metrics: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.rows = 0
        self.stopped: str | None = None
        self.compiled: set[str] = set()
        self.batch: Any = None
        self.checkpoints: Checkpoints | None = None
        self.went_on_from: Path | None = None
        self.was_through = self.is_interrupted = False
        self.means = Means([phase.name for phase in update.schedule.phases])
        self._seconds = 0.0  # Of training, before it was started now.
        self._began: float | None = None
        self.done_until = self.now

    def log(self, numbers: Mapping[str, Any]) -> None:
        """Writes numbers of your own, by name, at this step: to the history and to all loggers.

        Raises:
          LogError: what is no number.
        """
        self._write(self, numbers)

    def stop(self, why: str) -> None:
        """Ends the run after what is under way; a hook that did so does it again in `run_started`, if it is to last."""
        self.stopped = why

    @property
    def now(self) -> Moment:
        """Where the run stands."""
        here = 0.0 if self._began is None else time.monotonic() - self._began
        return Moment(self.step, self.epoch, self._seconds + here)

    def begin(self) -> None:
        """Has its clock run: reading a checkpoint, or waiting for who writes there, is no training."""
        self._began = time.monotonic()

    @property
    def epochs_given(self) -> int:
        """Finished epochs, with the one of which all batches were given out, where the data tells how many it has."""
        count, read = self.reader.batches_an_epoch, self.reader.read
        return self.epoch + (count is not None and 0 < count <= read)

    def take(self, state: TrainState, metrics: dict[str, Any], weights: Any) -> bool:
        """Takes in what an update returned; says whether it made a step."""
        before, self.state, self.step = self.step, state, int(state.step)
        self.rows = self.rows if self.step == before else 0
        if metrics:
            self.metrics = metrics
            if self.step != before:
                self.means.add(metrics, weights)
        return self.step != before

    def check(self, last_sound: LastSound) -> None:
        """Raises for a state that must not be saved or returned, and for a loss since the last row.

        Raises:
          NonFiniteError: of either something is not finite.
        """
        self.watch.check(self.state, self._losses, last_sound)

    def _losses(self) -> dict[str, Any]:
        """The losses of the last update, of a batch within a window too, and means since the last row."""
        means = {f"train/{name}": mean for name, mean in self.means.so_far().items() if is_loss(name)}
        # A mean that is finite says less than the last loss, which may weigh nothing.
        return losses_of(self.metrics) | {name: mean for name, mean in means.items() if not np.all(np.isfinite(mean))}

    def end_epoch(self) -> None:
        """Flushes the window that is left, and counts the epoch."""
        self.reader.end_epoch()
        self.take(*self.update.flushed(self.state))
        self.epoch += 1

    def go_on(
        self,
        *,
        epoch: int,
        seconds: float,
        results: dict[str, Any],
        metrics: dict[str, Any],
        means: dict[str, Any],
        rows: int,
    ) -> None:
        """Stands where it stood when it was saved."""
        self.rows = rows
        self.step, self.epoch, self.results, self.metrics = int(self.state.step), epoch, results, metrics
        self.means.load(means, metrics)
        self._seconds = seconds
        self.done_until = self.now
