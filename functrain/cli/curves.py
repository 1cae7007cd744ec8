"""The numbers of a log as curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from functrain.errors import LogError
from functrain.loop.checkpoint.retention import Mode
from functrain.loop.lines import lines_of, numbers_of, title

_BARS, _NOT_FINITE = "▁▂▃▄▅▆▇█", "!"
# Of training: what is no loss and no metric.
_OTHERS = {"learning_rate", "parts", "mean_of_updates", "steps_per_second", "nonfinite", "skipped", "last"}


class Log(NamedTuple):
    """What can be read of a log: its rows in the order of their steps, and what is wrong with it."""

    rows: list[dict[str, Any]]
    damaged: int
    repeated: int
    problems: list[str]


class Curve(NamedTuple):
    """A number at some steps."""

    steps: list[int]
    values: list[float]

    def best(self, mode: Mode) -> int | None:
        """Where the first of its best values is; None where none is finite."""
        sign = 1 if mode == "min" else -1
        finite = [index for index, value in enumerate(self.values) if math.isfinite(value)]
        return min(finite, key=lambda index: sign * self.values[index], default=None)

    def thinned(self, most: int) -> "Curve":
        """A curve of at most so many points, in which the lowest and the highest of every stretch are left."""
        kept = _thinned(self.values, most)
        return Curve([self.steps[index] for index in kept], [self.values[index] for index in kept])


def log_of(path: Path) -> Log:
    """Reads a log as far as it can be read. A row that a run wrote again, when it was started again, counts once.

    Raises:
      OSError: it can't be read at all.
    """
    try:
        lines = lines_of(path, path.read_bytes())
    except LogError as error:
        return Log([], 0, 0, [str(error)])
    problems = [lines.told(path)] if lines.damaged else []
    if lines.torn:
        problems.append(f"{path}: the last line is torn, or is being written, and is left out")
    latest = {title(row): numbers_of(row) for _, row in lines.rows}
    rows = sorted(latest.values(), key=lambda row: row["step"])
    return Log(rows, len(lines.damaged), len(lines.rows) - len(rows), problems)


def curves_of(rows: Sequence[dict[str, Any]], *, everything: bool) -> dict[str, Curve]:
    """Each loss, metric and result as a curve, those of training first; with `everything`, each number of the log."""
    curves: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time", "epoch") and (everything or not _OTHERS & {*_words(name)}):
                curve = curves.setdefault(name, Curve([], []))
                curve.steps.append(row["step"])
                curve.values.append(float(value))
    return dict(sorted(curves.items(), key=lambda each: not each[0].startswith("train/")))


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a line of bars, the lowest and the highest of every stretch among them; "!" is what is not finite.

    >>> sparkline([0.0, 1.0, 7.0, math.nan])
    '▁▂█!'
    >>> len(sparkline([*range(1000)]))
    40
    """
    shown = [values[index] for index in _thinned(values, width)]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high / 2 - low / 2  # In halves, as all of it can be too large for a float.

    def bar(value: float) -> str:
        return _BARS[round((value / 2 - low / 2) / span * (len(_BARS) - 1)) if span else 0]

    return "".join(bar(value) if math.isfinite(value) else _NOT_FINITE for value in shown)


def _thinned(values: Sequence[float], most: int) -> list[int]:
    if len(values) <= most:
        return [*range(len(values))]
    stretches = most // 2
    height = [value if math.isfinite(value) else math.inf for value in values]  # What is not finite is shown above all.
    kept = set()
    for number in range(stretches):
        stretch = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        kept |= {min(stretch, key=height.__getitem__), max(stretch, key=height.__getitem__)}
    return sorted(kept)


def _words(name: str) -> list[str]:
    return name.split("/")[1:] if name.startswith("train/") else []
