"""Charts as inline SVG, drawn with matplotlib; their colours are those of the page, light or dark."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from functrain.errors import LogError
from functrain.loop.record.curves import Stretch
from functrain.loop.record.report.charts import Chart, Line
from functrain.loop.record.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 8  # The page's, --c1 to --c8; then with another dash.
MOST_LINES = 3 * COLOURS
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
# What matplotlib is told, by the variable of the page that takes its place.
_STANDS_FOR = {f"c{index}": f"#0000{index:02x}" for index in range(1, COLOURS + 1)} | {
    "ink": "#000100", "quiet": "#000200", "rule": "#000300", "paper": "#000400",
}  # fmt: skip
_STRETCHES = 150  # Of a curve of many points.
_RATIO = 30  # Values that differ by more are drawn on a log scale.
_REFERENCE = re.compile(r"(?<=url\(#)\w+|(?<=href=\"#)\w+")
_LARGEST = 1e200  # Beyond, matplotlib's axes overflow.


class Marks(NamedTuple):
    """What is marked along the steps.

    Attributes:
      restarts: where the run was started again.
      epochs: where which epoch begins.
      ends: the first and the last step of all charts; None for those of each.
    """

    restarts: Sequence[int] = ()
    epochs: Sequence[tuple[int, int]] = ()
    ends: tuple[int, int] | None = None


@contextmanager
def drawing() -> Iterator[None]:
    """Within, matplotlib has its own defaults, whatever the program has set; they come back.

    Raises:
      LogError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise LogError(f"a report needs matplotlib: {error}; write pip install 'functrain[record]'") from error
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.fonttype": "none", "font.size": 10.5})
        yield


def svg(chart: Chart, marks: Marks, prefix: str, title: str, *, small: bool = False) -> str:
    """Draws a chart as an `<svg>` element. Within `drawing()`.

    Args:
      chart: what to draw; its names are not drawn but in the page, beside it.
      marks: along the steps.
      prefix: of the ids in it, which no other chart of the page may have.
      title: for who can't see it, escaped.
      small: it is one of three in a row, rather than of two.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = (4.0, 2.3) if small else (5.0, 2.6)
    figure = Figure(figsize=(width, height), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.14 / width, bottom=0.3 / height, top=1 - 0.26 / height)
    _draw(axes, chart.lines[:MOST_LINES], marks)
    written = StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(written, metadata={"Date": None, "Creator": None})
    return _inline(written.getvalue(), prefix, title)


def is_noisy(line: Line) -> bool:
    """Whether a line has so many points that its extremes and its means are drawn."""
    return len(line.curve.values) > 2 * _STRETCHES


def _draw(axes: "Axes", lines: Sequence[Line], marks: Marks) -> None:
    drawn = [line.curve.stretches(_STRETCHES if is_noisy(line) else len(line.curve.values)) for line in lines]
    is_log = _spans_decades(drawn)
    if is_log:
        axes.set_yscale("log")
    for step in marks.restarts:
        axes.axvline(step, color=_STANDS_FOR["quiet"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for line, stretches in zip(lines, drawn, strict=True):
        _draw_line(axes, line, stretches)
    _style(axes, is_log=is_log)
    if marks.ends is not None and marks.ends[0] < marks.ends[1]:
        axes.set_xlim(*marks.ends)
    _epochs(axes, marks.epochs)


def _spans_decades(drawn: Sequence[Sequence[Stretch]]) -> bool:
    """Whether values, but for a few that are small, differ so much that a log scale shows more of them."""
    finite = [sorted(each.low for each in stretches if math.isfinite(each.low)) for stretches in drawn]
    lows = [values[len(values) // 10] for values in finite if values]
    high = max((each.high for stretches in drawn for each in stretches if each.high <= _LARGEST), default=0.0)
    return bool(lows) and min(values[0] for values in finite if values) > 1 / _LARGEST and high / min(lows) > _RATIO


def _draw_line(axes: "Axes", line: Line, stretches: Sequence[Stretch]) -> None:
    colour = _STANDS_FOR[f"c{line.number % COLOURS + 1}"]
    steps, means = [each.step for each in stretches], [_drawable(each.mean) for each in stretches]
    alone: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(steps) == 1 else {}
    axes.plot(steps, means, color=colour, linewidth=1.6, linestyle=_DASHES[line.number // COLOURS % len(_DASHES)],
              solid_capstyle="round", solid_joinstyle="round", zorder=3, **alone)  # fmt: skip
    if is_noisy(line):
        lows, highs = [_drawable(each.low) for each in stretches], [_drawable(each.high) for each in stretches]
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.22, linewidth=0, zorder=2)
    lost = [each.step if each.lost is None else each.lost for each in stretches
            if each.lost is not None or math.isnan(_drawable(each.mean))]  # fmt: skip
    if lost:
        axes.plot(lost, [0.97] * len(lost), "x", color=colour, markersize=5, markeredgewidth=1.4, clip_on=False,
                  transform=axes.get_xaxis_transform(), zorder=5)  # fmt: skip
    best = None if line.mode is None else line.curve.best(line.mode)
    if best is not None and math.isfinite(_drawable(line.curve.values[best])):
        axes.plot([line.curve.steps[best]], [line.curve.values[best]], "o", markersize=6, zorder=4, clip_on=False,
                  markerfacecolor=_STANDS_FOR["paper"], markeredgecolor=colour, markeredgewidth=1.6)  # fmt: skip


def _drawable(value: float) -> float:
    return value if abs(value) <= _LARGEST else math.nan


def _style(axes: "Axes", *, is_log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_STANDS_FOR["rule"])
    axes.grid(visible=True, axis="y", color=_STANDS_FOR["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=_STANDS_FOR["quiet"], length=0, pad=5)
    axes.margins(x=0.01, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _count(step)))
    axes.yaxis.set_major_locator(LogLocator(numticks=5) if is_log else MaxNLocator(4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _epochs(axes: "Axes", epochs: Sequence[tuple[int, int]]) -> None:
    """Small numbers along the top, as many as there is room for."""
    low, high = axes.get_xlim()
    within = [(step, epoch) for step, epoch in epochs if low <= step <= high]
    apart = next(size * 10**power for power in range(20) for size in (1, 2, 5) if size * 10**power * 8 >= len(within))
    for step, epoch in within:
        if epoch % apart:
            continue
        axes.annotate(f"{epoch}", (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), fontsize=9.0,
                      textcoords="offset points", ha="center", color=_STANDS_FOR["quiet"])  # fmt: skip
        axes.plot([step, step], [1, 0.98], transform=axes.get_xaxis_transform(), color=_STANDS_FOR["quiet"],
                  linewidth=0.7, clip_on=False)  # fmt: skip


def _count(step: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(step) >= size:
            return f"{step / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{step:,.10g}"


def _inline(written: str, prefix: str, title: str) -> str:
    """An SVG file as an element: no prologue, ids of its own, the colours and letters of the page."""
    text = written[written.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    names = {name: f"{prefix}-{index}" for index, name in enumerate(dict.fromkeys(_REFERENCE.findall(text)))}
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{names[found[1]]}"' if found[1] in names else "", text)
    text = _REFERENCE.sub(lambda found: names[found[0]], text)
    for name, colour in _STANDS_FOR.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None
    text = f'<svg role="img" aria-label="{title}" {head[0]}{text[text.index(">") :]}'
    return re.sub(r"\s*\n\s*", "\n", text).strip()
