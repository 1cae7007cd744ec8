"""The pieces of a page: what is around charts, tables and texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from functrain.loop.record.curves import Curve
from functrain.loop.record.report.charts import Chart, Line
from functrain.loop.record.report.figures import COLOURS, MOST_LINES, Marks, svg
from functrain.loop.record.report.tables import Table, as_html, escaped
from functrain.loop.record.words import number

_STYLE = Path(__file__).with_name("style.css")
# What a page may load: nothing, but for the pictures that it holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def document(title: str, body: str) -> str:
    """A whole page, which loads nothing and runs nothing."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{_STYLE.read_text()}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    """A headed section; nothing where it has no content."""
    inner = "".join(content)
    return f"<section>\n<h2>{escaped(title)}</h2>\n{inner}</section>\n" if inner else ""


def table(found: Table | None) -> str:
    """A table, if there is one."""
    return "" if found is None else as_html(found)


def folded(title: str, content: str) -> str:
    """What is shown when it is asked for; nothing where there is none."""
    return f"<details><summary>{escaped(title)}</summary>\n{content}</details>\n" if content else ""


def verbatim(text: str | None) -> str:
    """A text as it was printed."""
    return f"<pre>{escaped(text)}</pre>\n" if text else ""


def facts(found: Sequence[tuple[str, str]]) -> str:
    """Facts side by side."""
    inner = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>\n" for name, value in found)
    return f'<dl class="facts">\n{inner}</dl>\n' if inner else ""


def told(problems: Sequence[str]) -> str:
    """What is wrong with the files, where there is something."""
    inner = "".join(f"<li>{escaped(problem)}</li>\n" for problem in problems)
    return f'<div class="told">What could not be read, or is not there:<ul>\n{inner}</ul></div>\n' if inner else ""


def charts(found: Sequence[Chart], marks: Marks, prefix: str, *, small: bool = False) -> str:
    """Charts side by side, each with its legend; within `figures.drawing()`."""
    drawn = [_figure(chart, marks, f"{prefix}{index}") for index, chart in enumerate(found)]
    kind = "charts small" if small else "charts"
    return f'<div class="{kind}">\n{"".join(drawn)}</div>\n' if drawn else ""


def _figure(chart: Chart, marks: Marks, prefix: str) -> str:
    hidden = len(chart.lines) - MOST_LINES
    more = f'<li class="quiet">and {hidden} more, which are not drawn</li>' if hidden > 0 else ""
    legend = "".join(_entry(line, index) for index, line in enumerate(chart.lines[:MOST_LINES]))
    return (
        f'<figure>\n<h3>{escaped(chart.title)}</h3>\n<ul class="legend">{legend}{more}</ul>\n'
        f"{svg(chart, marks, prefix, escaped(chart.title))}\n</figure>\n"
    )


def _entry(line: Line, index: int) -> str:
    """A line of a legend: how it is drawn, its name, where it came to."""
    dash = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 2"')[index // COLOURS % 3]
    sample = (
        '<svg viewBox="0 0 28 12" aria-hidden="true"><path d="M1 6H27" fill="none" stroke-width="3"'
        f' stroke="var(--c{index % COLOURS + 1})"{dash}/></svg>'
    )
    return f"<li>{sample}{escaped(line.label)} <span>{escaped(_came_to(line))}</span></li>\n"


def _came_to(line: Line) -> str:
    curve: Curve = line.curve
    last = number(curve.values[-1])
    best = None if line.mode is None else curve.best(line.mode)
    return last if best is None else f"{last}, best {number(curve.values[best])} at {curve.steps[best]:,}"


def pictures(found: Mapping[str, str | None]) -> str:
    """Figures as they lie in the record, by name, each as a data URI; None is one that can't be shown."""
    drawn = "".join(
        f"<figure>\n<h3>{escaped(name)}</h3>\n"
        + (f'<img alt="{escaped(name)}" src="{uri}">' if uri else '<p class="quiet">its file can\'t be shown</p>')
        + "\n</figure>\n"
        for name, uri in found.items()
    )
    return f'<div class="charts">\n{drawn}</div>\n' if drawn else ""
