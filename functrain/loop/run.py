"""Where a run stands, for hooks to look at."""

import time
from typing import Any

import jax

from functrain.loop.every import Moment
from functrain.loop.finite import Watch
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
      results: the newest results of each evaluation, by name: "valid/loss".
      evaluated: the results of the evaluations that ended just now.
      history: the rows that were logged.
      stopped: why the run ended before its end; None while it goes on.
      compiled: the kinds of calls whose programs were compiled: "batch", "scan".
      done_until: the moment up to which all that was due is done.
    """

    def __init__(self, update: Update, state: TrainState, reader: Reader) -> None:
        self.update, self.state, self.reader = update, state, reader
        self.watch = Watch(update, state)
        self.step, self.epoch = int(state.step), 0
        self.metrics: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self.compiled: set[str] = set()
        self._are_stacked = False
        self._began = time.monotonic()
        self.done_until = self.now

    def stop(self, why: str) -> None:
        """Ends the run after what is under way; a hook that did so does it again in `run_started`, if it is to last."""
        self.stopped = why

    @property
    def now(self) -> Moment:
        """Where the run stands."""
        return Moment(self.step, self.epoch, time.monotonic() - self._began)

    def take(self, state: TrainState, metrics: dict[str, Any], *, stacked: bool = False) -> bool:
        """Takes in what an update returned; says whether it made a step. Stacked: of several, on a leading axis."""
        before, self.state, self.step = self.step, state, int(state.step)
        if metrics:
            self.metrics, self._are_stacked = metrics, stacked
        return self.step != before

    def last_metrics(self) -> dict[str, Any]:
        """The metrics of the last update alone."""
        if not self._are_stacked:
            return self.metrics
        last: dict[str, Any] = jax.tree.map(lambda leaf: leaf[-1], self.metrics)
        return last

    def end_epoch(self) -> None:
        """Flushes the window that is left, and counts the epoch."""
        self.reader.end_epoch()
        self.take(*self.update.flush(self.state))
        self.epoch += 1

    def go_on(self, *, epoch: int, seconds: float, results: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Stands where it stood when it was saved."""
        self.step, self.epoch, self.results, self.metrics = int(self.state.step), epoch, results, metrics
        self._began -= seconds
        self.done_until = self.now
