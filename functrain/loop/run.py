"""Where a run stands, for hooks to look at."""

import time
from collections.abc import Callable, Mapping
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
        self.stopped: str | None = None
        self.compiled: set[str] = set()
        self._has_phases = any(phase.name for phase in update.schedule.phases)
        self._newest: dict[str, tuple[Any, bool]] = {}  # By phase, and whether they are of several updates.
        self._saved: dict[str, float] = {}  # What a checkpoint has of phases that have not come since.
        self._began = time.monotonic()
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
        return Moment(self.step, self.epoch, time.monotonic() - self._began)

    def take(self, state: TrainState, metrics: dict[str, Any], *, stacked: bool = False) -> bool:
        """Takes in what an update returned; says whether it made a step. Stacked: of several, on a leading axis."""
        before, self.state, self.step = self.step, state, int(state.step)
        if metrics:
            self.metrics = metrics
            for name, of_phase in (metrics if self._has_phases else {"": metrics}).items():
                self._newest[name] = of_phase, stacked
                self._saved = {key: value for key, value in self._saved.items() if not key.startswith(f"{name}/")}
        return self.step != before

    def newest_metrics(self) -> dict[str, Any]:
        """The metrics of the last update, of every phase of the last one in which it stepped, by name."""
        last: dict[str, Any] = {
            name: jax.tree.map(lambda leaf: leaf[-1], metrics) if stacked else metrics
            for name, (metrics, stacked) in self._newest.items()
        }
        return {**(self._saved if self._has_phases or not last else {}), **last.get("", last)}

    def all_metrics(self) -> dict[str, Any]:
        """As `newest_metrics`, and of several updates in one those of all."""
        newest: dict[str, Any] = {name: metrics for name, (metrics, _) in self._newest.items()}
        return dict(newest.get("", newest))

    def end_epoch(self) -> None:
        """Flushes the window that is left, and counts the epoch."""
        self.reader.end_epoch()
        self.take(*self.update.flush(self.state))
        self.epoch += 1

    def go_on(self, *, epoch: int, seconds: float, results: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Stands where it stood when it was saved."""
        self.step, self.epoch, self.results, self.metrics = int(self.state.step), epoch, results, metrics
        self._saved = metrics
        self._began -= seconds
        self.done_until = self.now
