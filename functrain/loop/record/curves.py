"""Numbers at steps, and what is left of a million of them in a picture."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from functrain.loop.checkpoint.retention import Mode, mode_of

# Of training: what is no loss and no metric.
_OTHERS = {"learning_rate", "parts", "mean_of_updates", "steps_per_second", "nonfinite", "skipped", "last"}


class Curve(NamedTuple):
    """A number at some steps."""

    steps: Sequence[int]
    values: Sequence[float]

    def best(self, mode: Mode) -> int | None:
        """Where the first of its best values is; None where none is finite."""
        finite = [value for value in self.values if math.isfinite(value)]
        return self.values.index((min if mode == "min" else max)(finite)) if finite else None

    def thinned(self, most: int) -> "Curve":
        """A curve of at most so many points: the lowest and the highest of every stretch, the first and the last."""
        if len(self.values) <= most:
            kept = [*range(len(self.values))]
        else:
            kept = sorted({0, len(self.values) - 1, *extremes(self.values, most - 2)})
        return Curve([self.steps[index] for index in kept], [self.values[index] for index in kept])

    def stretches(self, most: int) -> "list[Stretch]":
        """The same in at most so many stretches.

        >>> Curve([1, 2, 3, 4], [1.0, 3.0, 5.0, math.nan]).stretches(2)
        [Stretch(step=2, low=1.0, mean=2.0, high=3.0, lost=None), Stretch(step=4, low=5.0, mean=5.0, high=5.0, lost=4)]
        """
        return [self._stretch(start, end) for start, end in _stretches(len(self.values), most)]

    def _stretch(self, start: int, end: int) -> "Stretch":
        values, lost = self.values[start:end], None
        if not math.isfinite(total := sum(values)):
            lost = next((index for index, value in enumerate(values, start) if not math.isfinite(value)), None)
            values = [value for value in values if math.isfinite(value)] or [math.nan]
            total = sum(value / len(values) for value in values) * len(values)
        step = self.steps[(start + end) // 2]
        return Stretch(step, min(values), total / len(values), max(values), None if lost is None else self.steps[lost])


class Stretch(NamedTuple):
    """A stretch of a curve.

    Attributes:
      step: in its middle.
      low: the lowest value; NaN where none is finite.
      mean: of those that are finite.
      high: the highest value.
      lost: the first step at which the value is not finite; None where all are.
    """

    step: int
    low: float
    mean: float
    high: float
    lost: int | None


def extremes(values: Sequence[float], most: int) -> list[int]:
    """Where at most so many values are: the lowest and the highest of every stretch, and one that is not finite.

    >>> extremes([1.0, 5.0, 0.0, 2.0, math.nan, 3.0], 6), extremes([1.0, 5.0, 0.0, 2.0], 2)
    ([0, 1, 2, 3, 4, 5], [1, 2])
    """
    if len(values) <= most:
        return [*range(len(values))]
    # A sum of finite values may overflow; that costs time alone.
    if math.isfinite(sum(values)):
        found = {start + index for start, end in _stretches(len(values), most // 2)
                 for index in _low_and_high(values[start:end])}  # fmt: skip
        return sorted(found)
    kept = set()
    for start, end in _stretches(len(values), most // 3):
        is_finite = [math.isfinite(value) for value in values[start:end]]
        finite = [start + index for index, each in enumerate(is_finite) if each]
        kept |= {finite[index] for index in _low_and_high([values[index] for index in finite])} if finite else set()
        kept |= set() if all(is_finite) else {start + is_finite.index(False)}
    return sorted(kept)


def results_in(curves: Mapping[str, Curve], *, everything: bool = False) -> dict[str, Curve]:
    """Of the numbers of a log the losses, metrics and results, those of training first; or every one of them."""
    named = {name: curve for name, curve in curves.items() if everything or not _OTHERS & {*_words(name)}}
    return dict(sorted(named.items(), key=lambda each: not each[0].startswith("train/")))


def mode_by_name(name: str) -> Mode | None:
    """Whether the smaller value of a result is better, where its name says it."""
    try:
        return mode_of(name, None)
    except ValueError:
        return None


def _low_and_high(values: Sequence[float]) -> set[int]:
    return {values.index(min(values)), values.index(max(values))}


def _stretches(count: int, most: int) -> list[tuple[int, int]]:
    """A range of so many, in at most so many stretches."""
    most = max(1, min(count, most))
    ends = [number * count // most for number in range(most + 1)]
    return [*itertools.pairwise(ends)] if count else []


def _words(name: str) -> list[str]:
    return name.split("/")[1:] if name.startswith("train/") else []
