"""Which checkpoints are kept: a function of their names in order of time, and of their metrics."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from functrain.errors import CheckpointError

Metrics = Mapping[str, Mapping[str, float]]
"""The metrics of each checkpoint by its name, oldest first."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """The newest, and the best by a metric.

    >>> retention = Retention(last=1, best="loss")
    >>> sorted(retention.kept({"1": {"loss": 3.0}, "2": {"loss": 1.0}, "3": {"loss": 2.0}}))
    ['2', '3']

    Attributes:
      last: how many of the newest are kept.
      best: the metric of which the best is kept too; NaN is never best.
      mode: "min" if smaller is better, "max" if larger.

    Raises:
      CheckpointError: an option that is none of these.
    """

    last: int = 2
    best: str | None = None
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.last, int) or self.last < 1:
            raise CheckpointError(f"keep_last={self.last!r}: give a whole number of at least 1")
        if self.mode not in ("min", "max"):
            raise CheckpointError(f"mode={self.mode!r}: write 'min' or 'max'")

    def kept(self, checkpoints: Metrics) -> set[str]:
        """The names of those that are kept."""
        best = self.best_of(checkpoints)
        return {*[*checkpoints][-self.last :], *([] if best is None else [best])}

    def best_of(self, checkpoints: Metrics) -> str | None:
        """The name of the best; None if none has a finite value of the metric."""
        values = {name: self._value(metrics) for name, metrics in checkpoints.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return (min if self.mode == "min" else max)(finite, key=lambda name: finite[name], default=None)

    def is_best(self, metrics: Mapping[str, float], checkpoints: Metrics) -> bool:
        """Whether metrics have a finite value that is better than that of every checkpoint."""
        value, best = self._value(metrics), self.best_of(checkpoints)
        if best is None or not math.isfinite(value):
            return math.isfinite(value)
        before = self._value(checkpoints[best])
        return value < before if self.mode == "min" else value > before

    def _value(self, metrics: Mapping[str, float]) -> float:
        return math.nan if self.best is None else float(metrics.get(self.best, math.nan))
