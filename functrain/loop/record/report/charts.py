"""Which numbers of a log stand together in which chart."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from functrain.loop.checkpoint.retention import Mode
from functrain.loop.record.curves import Curve, results_in
from functrain.loop.record.left import Left

_BY_PART = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "update_ratio": "update-to-weight ratio",
}
_OF_PART = re.compile(r"train/(?:(?P<phase>.+?)/)?parts/(?P<part>.+)/(?P<number>[^/]+)", re.DOTALL)


class Line(NamedTuple):
    """A curve of a chart.

    Attributes:
      label: for the legend.
      curve: its numbers.
      number: of the run or the part, by which it has its colour.
      mode: whether the smaller or the larger is better; None where it is not known, or its best is not marked.
    """

    label: str
    curve: Curve
    number: int
    mode: Mode | None = None


class Chart(NamedTuple):
    """Curves that share their axes."""

    title: str
    lines: Sequence[Line]


def results_of(left: Left) -> list[Chart]:
    """The losses and results: of each metric those of training and of evaluations in one chart; losses first."""
    lines: dict[str, list[Line]] = {}
    for name, curve in results_in(left.log.curves).items():
        _, _, metric = name.partition("/")
        mode = None if name.startswith("train/") else left.mode(name)
        of_metric = lines.setdefault(metric or name, [])
        of_metric.append(Line(name, curve, len(of_metric), mode))
    charts = [Chart(metric, found) for metric, found in lines.items()]
    return sorted(charts, key=lambda chart: (chart.title.rpartition("/")[2] != "loss", len(chart.lines) == 1))


def by_part(left: Left) -> list[Chart]:
    """Rates, gradient norms and update-to-weight ratios, with a line for each part."""
    found: dict[str, dict[tuple[str, str], Curve]] = {number: {} for number in _BY_PART}
    for name, curve in left.log.curves.items():
        if (match := _OF_PART.fullmatch(name)) and match["number"] in found:
            found[match["number"]][match["part"], match["phase"] or ""] = curve
    for name, curve in left.log.curves.items():
        if name.startswith("train/learning_rate/"):
            part = name.removeprefix("train/learning_rate/")
            if not any(of == part for of, _ in found["learning_rate"]):
                found["learning_rate"][part, ""] = curve
    order = [*left.recorded.parts]
    charts = []
    for number, curves in found.items():
        of_parts = sorted(curves, key=lambda of: order.index(of[0]) if of[0] in order else len(order))
        lines = [Line(_label(*of, curves), curves[of], index) for index, of in enumerate(of_parts)]
        charts += [Chart(_BY_PART[number], lines)] if lines else []
    return charts


def speed(log: Mapping[str, Curve]) -> list[Chart]:
    """How many steps were made in a second."""
    curve = log.get("train/steps_per_second")
    return [] if curve is None else [Chart("steps per second", [Line("steps per second", curve, 0)])]


def compared(names: Sequence[str], runs: Sequence[Left]) -> list[Chart]:
    """The losses and results of several runs, each in a chart of its own, with a line for each run."""
    found = [results_in(left.log.curves) for left in runs]
    metrics = dict.fromkeys(metric for curves in found for metric in curves)
    return [
        Chart(
            metric,
            [
                Line(name, curves[metric], index, None if metric.startswith("train/") else left.mode(metric))
                for index, (name, left, curves) in enumerate(zip(names, runs, found, strict=True))
                if metric in curves
            ],
        )
        for metric in sorted(metrics, key=lambda metric: not metric.startswith("train/"))
    ]


def ends_of(runs: Sequence[Left]) -> tuple[int, int] | None:
    """The first and the last step, from 0; None where there are none."""
    curves = [curve for left in runs for curve in left.log.curves.values()]
    ends = [step for curve in curves for step in (curve.steps[0], curve.steps[-1])]
    return (min(0, *ends), max(ends)) if ends else None


def _label(part: str, phase: str, curves: Mapping[tuple[str, str], Curve]) -> str:
    return f"{part} ({phase})" if sum(other == part for other, _ in curves) > 1 else part
