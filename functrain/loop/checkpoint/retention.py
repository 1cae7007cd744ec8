"""Which checkpoints are kept: a function of their names in order of time, and of their metrics."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from functrain.errors import CheckpointError

Metrics = Mapping[str, Mapping[str, float]]
"""The metrics of each checkpoint by its name, oldest first."""

Mode = Literal["min", "max"]

Best = Mode | int | tuple[Mode, int]
"""Which of a metric is better, how many of the best are kept, or both."""

_LOSSES = re.compile(
    r"(.*[/_. -])?(loss|losses|error|errors|nll|mse|rmse|mae|perplexity|cross.?entropy)", re.IGNORECASE
)


def mode_of(result: str, mode: Mode | None) -> Mode:
    """Whether the smaller or the larger value of a result is better; of a loss or an error it need not be said.

    >>> mode_of("valid/loss", None), mode_of("valid/accuracy", "max")
    ('min', 'max')

    Raises:
      ValueError: it has to be said, and is not.
    """
    if mode in ("min", "max"):
        return mode
    if mode is not None:
        raise ValueError(f"mode={mode!r}: write 'min' or 'max'")
    if _LOSSES.fullmatch(result):
        return "min"
    raise ValueError(f"is {result!r} better when it is larger? Write mode='max', or mode='min' if it is a loss")


@dataclasses.dataclass(frozen=True)
class Retention:
    """The newest, and the best by each of some metrics.

    >>> retention = Retention(last=1, best={"loss": "min"})
    >>> sorted(retention.kept({"1": {"loss": 3.0}, "2": {"loss": 1.0}, "3": {"loss": 2.0}}))
    ['2', '3']

    Attributes:
      last: how many of the newest are kept.
      best: the metrics of which the best is kept too, "min" or "max" by which of each is better; NaN is never best.
      counts: how many of the best are kept by a metric; one where it is not said.
    """

    last: int = 2
    best: Mapping[str, Mode] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, last: int, best: str | Mapping[str, Best] | None, mode: Mode | None) -> Self:
        """Makes one of the options of `Checkpoints`.

        Raises:
          CheckpointError: an option that is none of these.
        """
        if not isinstance(last, int) or last < 1:
            raise CheckpointError(f"keep_last={last!r}: give a whole number of at least 1")
        if mode is not None and not isinstance(best, str):
            raise CheckpointError(
                f"mode={mode!r} beside keep_best={best!r}: it is that of one metric, keep_best='loss'"
            )
        named: Mapping[str, Any] = {best: mode} if isinstance(best, str) else best or {}
        pairs = {name: _pair(each) for name, each in named.items()}
        try:
            modes = {name: mode_of(name, each) for name, (each, _) in pairs.items()}
            return cls(last, modes, {name: _count(count) for name, (_, count) in pairs.items()})
        except ValueError as error:
            raise CheckpointError(f"keep_best={best!r}: {error}") from None

    def kept(self, checkpoints: Metrics) -> set[str]:
        """The names of those that are kept."""
        best = [name for metric in self.best for name in self._best_of(checkpoints, metric)]
        return {*[*checkpoints][-self.last :], *best}

    def best_of(self, checkpoints: Metrics, metric: str) -> str | None:
        """The name of the best by a metric; None if none has a finite value of it."""
        return next(iter(self._best_of(checkpoints, metric)), None)

    def _best_of(self, checkpoints: Metrics, metric: str) -> list[str]:
        """The names of the best by a metric, as many as are kept, best first."""
        values = {name: float(metrics.get(metric, math.nan)) for name, metrics in checkpoints.items()}
        finite = [name for name, value in values.items() if math.isfinite(value)]
        ranked = sorted(finite, key=lambda name: values[name], reverse=self.best[metric] == "max")
        return ranked[: self.counts.get(metric, 1)]

    def is_best(self, metrics: Mapping[str, float], checkpoints: Metrics) -> bool:
        """Whether one of the metrics has a finite value that is among the best, as many as are kept by it."""
        return any(self._is_better(metrics, checkpoints, metric) for metric in self.best)

    def _is_better(self, metrics: Mapping[str, float], checkpoints: Metrics, metric: str) -> bool:
        value, best = float(metrics.get(metric, math.nan)), self._best_of(checkpoints, metric)
        if len(best) < self.counts.get(metric, 1) or not math.isfinite(value):
            return math.isfinite(value)
        last = float(checkpoints[best[-1]][metric])
        return value < last if self.best[metric] == "min" else value > last


def _count(count: object) -> int:
    """How many of the best are kept.

    Raises:
      ValueError: it is no number of checkpoints.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{count!r} of the best: write how many, such as {{'valid/accuracy': ('max', 3)}}")
    return count


def _pair(given: Any) -> tuple[Any, Any]:
    """Which is better, None where it is not said, and how many are kept."""
    if isinstance(given, tuple | list) and len(given) == 2:
        return given[0], given[1]
    return (None, given) if isinstance(given, int) else (given, 1)
