"""A run while it goes on: where it stands, and what is done between two updates."""

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from functrain.errors import NonFiniteError, SaveError
from functrain.loop.checkpoints import Checkpoints
from functrain.loop.evaluation import Evaluation
from functrain.loop.every import Every, Moment
from functrain.loop.hooks import Hook
from functrain.loop.logs import Logger, flattened
from functrain.tree.arrays import is_finite
from functrain.tree.text import listed
from functrain.update.state import TrainState
from functrain.update.update import Update


class Run:
    """Where a run stands; hooks are given it.

    Attributes:
      update: the compiled update.
      state: the state after the last update; the next one consumes it.
      step: finished optimizer steps.
      epoch: finished epochs.
      read: batches read in this epoch.
      position: a function that returns the position in the data.
      metrics: the last update's, on the device until something reads them.
      results: the newest results of each evaluation, by name: "valid/loss".
      evaluated: the results of the evaluations that ended just now.
      history: the rows that were logged.
      stopped: why the run ended before its end; None while it goes on.
    """

    def __init__(
        self,
        update: Update,
        state: TrainState,
        *,
        evaluations: Sequence[Evaluation],
        checkpoints: Checkpoints | None,
        loggers: Sequence[Logger],
        hooks: Sequence[Hook],
        log: Every,
    ) -> None:
        self.update, self.state = update, state
        self.step, self.epoch, self.read = int(state.step), 0, 0
        self.metrics: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self.log_every = log
        self._evaluations, self._checkpoints, self._loggers, self._hooks = evaluations, checkpoints, loggers, hooks
        self._watching = [hook for hook in hooks if type(hook).update_ended is not Hook.update_ended]
        self._before = self._looked = Moment(self.step)
        self._began = time.monotonic()
        self.position: Callable[[], Any] = lambda: None
        self._stacked = False
        self._saved: tuple[int, ...] | None = None
        self._logged: set[tuple[Any, ...]] = set()
        self._skips = update.options.skips

    def stop(self, why: str) -> None:
        """Ends the run after what is under way; a hook that did so does it again in `run_started`, if it is to last."""
        self.stopped = why

    def now(self) -> Moment:
        """Where the run stands."""
        return Moment(self.step, self.epoch, time.monotonic() - self._began)

    def reads_from(self, position: Callable[[], Any]) -> None:
        """Says how to ask for the position in the data."""
        self.position = position

    def restored(self, state: TrainState, extra: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint; one that was saved without `fit` has nothing but the state."""
        self.state = state
        extra = extra or {"epoch": 0, "read": 0, "results": {}, "seconds": 0.0, "hooks": []}
        self.step, self.epoch, self.read = int(self.state.step), extra["epoch"], extra["read"]
        self.results = {
            name: np.asarray(value) if isinstance(value, list) else value for name, value in extra["results"].items()
        }
        self.metrics = dict(extra.get("metrics", {}))
        self._began -= extra["seconds"]
        self._before = self._looked = Moment(self.step, self.epoch, extra["seconds"])
        saved = list(extra["hooks"])
        for hook in self._hooks:
            # The first of its kind that is left: a hook that is new has none, and takes none from another.
            mine = next((each for each in saved if each["of"] == _kind(hook)), None)
            if mine is not None:
                saved.remove(mine)
                hook.load(mine["state"])
        self._saved = self._counters()

    def has_logged(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the history of a checkpoint that it goes on from."""
        self.history = [{name: value for name, value in row.items() if name != "time"} for row in rows]
        # An epoch's end is no step: of its last step, the log may have what came after the checkpoint.
        self._logged = {_title(row) for row in self.history if row["step"] == self.step}

    def tell(self, event: str, *details: Any) -> None:
        """Calls every hook for an event."""
        for hook in self._hooks:
            getattr(hook, event)(self, *details)

    def is_logged_at(self, step: int) -> bool:
        """Whether an update that leads to this step will be logged."""
        return self.log_every.due(self._before, Moment(step, self.epoch, time.monotonic() - self._began))

    def advanced(
        self, state: TrainState, metrics: dict[str, Any], *, stacked: bool = False, epoch_ended: bool = False
    ) -> None:
        """Takes in an update, or the end of an epoch, and does what is due after it."""
        self.state = state
        if metrics:
            self.metrics, self._stacked = metrics, stacked
        step = int(state.step)
        if step == self.step and not epoch_ended:
            return
        has_stepped, self.step, self.evaluated = step != self.step, step, {}
        if epoch_ended:
            self.epoch, self.read = self.epoch + 1, 0
        if has_stepped:
            for hook in self._watching:
                hook.update_ended(self)
        before, self._before = self._before, self.now()
        if self.metrics and self.log_every.due(before, self._before):
            self._log_training()
        due = [evaluation for evaluation in self._evaluations if evaluation.every.due(before, self._before)]
        if due:
            self.evaluate(due)
        if self._checkpoints is not None and self._checkpoints.every.due(before, self._before):
            self.save()

    def evaluate(self, evaluations: Sequence[Evaluation]) -> None:
        """Evaluates, logs, asks the hooks, and saves what is best."""
        self.evaluated = {}
        for evaluation in evaluations:
            found = evaluation(self.state.params, self.state.model_state)
            self.evaluated |= {f"{evaluation.name}/{name}": value for name, value in found.items()}
        self.results |= self.evaluated
        best = None if self._checkpoints is None else self._checkpoints.keep_best
        if best is not None and best not in self.results and all(e in evaluations for e in self._evaluations):
            raise ValueError(f"keep_best={best!r}: the results are {sorted(self.results)}; name one of them")
        self._log({name: value for name, value in self.evaluated.items() if np.ndim(value) == 0})
        self.tell("evaluation_ended")
        if self._checkpoints is not None and self._checkpoints.is_best(self.evaluated):
            self.save()

    def save(self) -> None:
        """Starts to save, unless this moment is saved already.

        Raises:
          NonFiniteError: a parameter, or a gradient of a pending window, is not finite, and would be saved as good.
        """
        if self._checkpoints is None or self._saved == self._counters():
            return
        if bad := self._not_finite_parts():
            what = f"the parameters or the pending gradients of part {listed(bad)} are not finite"
            raise NonFiniteError(self._told(what))
        extra = {
            "epoch": self.epoch,
            "read": self.read,
            "seconds": self.now().seconds,
            "results": {name: np.asarray(value).tolist() for name, value in self.results.items() if _is_numeric(value)},
            # Without an update after it, an epoch's end logs those of the update before it.
            "metrics": flattened(self._last_metrics()) if self.log_every.epochs is not None else {},
            "hooks": [{"of": _kind(hook), "state": hook.state()} for hook in self._hooks],
        }
        fresh = {name: value for name, value in self.evaluated.items() if np.ndim(value) == 0}
        try:
            self._checkpoints.save(self.state, data=self.position(), metrics=fresh, extra=extra)
        except SaveError as error:
            warnings.warn(str(error), stacklevel=2)
            return
        self._saved = self._counters()
        self.tell("checkpoint_saved")

    def _log_training(self) -> None:
        now = self.now()
        row = flattened({"train": self._last_metrics()})
        losses = [name for name, value in row.items() if "loss" in name.split("/") and not np.isfinite(value)]
        if losses and not self._skips:
            bad = self._not_finite_parts()
            where = f", nor are the parameters of part {listed(bad)}" if bad else ""
            raise NonFiniteError(self._told(f"{listed(losses)} is not finite{where}"))
        elapsed = now.seconds - self._looked.seconds
        if elapsed > 0:
            row["train/steps_per_second"] = (now.step - self._looked.step) / elapsed
        rates = self.update.optim.learning_rates(self.state.opt_state)
        row |= {f"train/learning_rate/{part}": float(rate) for part, rate in rates.items()}
        self._looked = now
        self._log(row)

    def _log(self, row: Mapping[str, Any]) -> None:
        whole = {"step": self.step, "epoch": self.epoch, **row}
        if _title(whole) in self._logged:
            return
        self.history.append(whole)
        for logger in self._loggers:
            logger.log(self.step, {"epoch": self.epoch, **row})

    def _last_metrics(self) -> dict[str, Any]:
        last: dict[str, Any] = jax.tree.map(lambda leaf: leaf[-1], self.metrics) if self._stacked else self.metrics
        return last

    def _not_finite_parts(self) -> list[str]:
        split = self.update.optim.parts.split(self.state.params)
        leaves = {part: [*split[part].values()] for part in self.update.optim.trained}
        if self.state.window is not None and not self._skips:
            grads = self.state.window.grads
            for part, sums in grads.items():
                leaves[part] += sums.values()
        finite = jax.device_get(_finite(leaves))
        return [part for part, is_finite in finite.items() if not is_finite]

    def _told(self, what: str) -> str:
        last = []
        if self._checkpoints is not None:
            with contextlib.suppress(SaveError):
                self._checkpoints.wait()
            last = self._checkpoints.steps()[-1:]
        return (
            f"step {self.step}: {what}; the last sound checkpoint is {last[0] if last else 'none'}; restore it"
            ' and lower the rate, or leave such updates out: make_update(..., nonfinite="skip")'
        )

    def _counters(self) -> tuple[int, ...]:
        return int(self.state.step), int(self.state.batches), int(self.state.pending), self.epoch


def _is_numeric(value: Any) -> bool:
    return np.asarray(value).dtype.kind in "biuf"


def _kind(hook: Hook) -> str:
    return f"{type(hook).__module__}.{type(hook).__qualname__}"


def _title(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["step"], row["epoch"], *sorted(row.keys() - {"time"})


@jax.jit
def _finite(leaves: dict[str, list[Any]]) -> dict[str, Any]:
    """Whether every number of each part is finite."""
    return {part: is_finite(each) for part, each in leaves.items()}
