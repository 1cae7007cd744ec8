"""What the figures of packages are drawn with: matplotlib without pyplot, which would keep every figure."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from functrain.errors import EvaluationError

_COUNTED = 12  # Classes whose counts can be read in a matrix.
_LISTED = 10  # Curves that have a line in a legend.
_SMALL = {"fontsize": 7, "title_fontsize": 7}
_LONGEST = 18  # Characters of a name.
_IN_A_ROW = 40  # Characters that stand side by side below a matrix.


def blank(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A white figure of some inches at 100 pixels, and its axes: one, or an array of them.

    Raises:
      EvaluationError: matplotlib is not installed.
    """
    try:
        made = import_module("matplotlib.figure").Figure(
            figsize=(width, height), dpi=100, layout="constrained", facecolor="white"
        )
    except ImportError as error:
        raise EvaluationError(f"figure: {error}; write pip install 'functrain[record]'") from error
    return made, made.subplots(rows, columns)


def draw_confusion(axes: Any, counts: np.ndarray, names: Sequence[str]) -> None:
    """Counts of labels (rows) by predictions, (classes, classes); each row is coloured by its shares."""
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title="confusion", xlabel="predicted", ylabel="label")
    ticks = range(0, len(names), -(-len(names) // _COUNTED))
    shown = [_short(names[tick]) for tick in ticks]
    is_long = sum(map(len, shown)) > _IN_A_ROW
    axes.set_xticks(ticks, shown, rotation=90 if is_long else 0, parse_math=False, fontsize=8)
    axes.set_yticks(ticks, shown, parse_math=False, fontsize=8)
    if len(names) > _COUNTED:
        return
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            size = 8 if len(names) > 6 else 10
            axes.text(column, row, _count(count), ha="center", va="center", color=colour, fontsize=size)


def draw_curves(axes: Any, curves: Mapping[str, np.ndarray], areas: Mapping[str, float], where: str) -> None:
    """A curve of each class, rows x and y, with its area in the legend: of many classes the lowest ones."""
    lowest = sorted(curves, key=lambda name: areas[name])
    dashes = ("-", "--", ":")  # Matplotlib has ten colours.
    lines = {
        name: axes.plot(*curves[name][:2], linewidth=1.2, linestyle=dashes[nth // 10 % 3])[0]
        for nth, name in enumerate(curves)
    }
    listed = lowest[:_LISTED]
    entries = [f"{areas[name]:.3f}  {_short(name)}" for name in listed]
    title = "area" if len(listed) == len(lowest) else f"lowest {len(listed)} areas of {len(lowest)}"
    legend = axes.legend([lines[name] for name in listed], entries, loc=where, title=title, **_SMALL)
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_sorted(axes: Any, areas: Mapping[str, float]) -> None:
    """The areas of many classes, from the lowest on; the three lowest are named."""
    lowest = sorted(areas, key=lambda name: areas[name])
    axes.plot(np.arange(1, len(lowest) + 1), [areas[name] for name in lowest])
    axes.set(xlabel="classes, the lowest first", ylabel="area")
    named = "\n".join(f"{areas[name]:.3f}  {_short(name)}" for name in lowest[:3])
    axes.text(0.97, 0.05, named, transform=axes.transAxes, ha="right", fontsize=8, parse_math=False)


def draw_histogram(axes: Any, edges: np.ndarray, counts: np.ndarray) -> None:
    """Counts by value: `edges` has one more than `counts`."""
    axes.stairs(counts, edges, fill=True, alpha=0.6)
    axes.set(ylabel="examples", ylim=(0, None))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _count(count: float) -> str:
    return f"{count:.3g}" if count != round(count) else f"{count:.0f}"
