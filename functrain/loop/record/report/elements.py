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
        f"<title>{escaped(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
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


def folded_table(found: Table | None) -> str:
    """A table that is shown when it is asked for."""
    return "" if found is None else folded(f"{len(found.rows):,} more", as_html(found))


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
    drawn = [_figure(chart, marks, f"{prefix}{index}", small=small) for index, chart in enumerate(found)]
    kind = "charts small" if small else "charts"
    return f'<div class="{kind}">\n{"".join(drawn)}</div>\n' if drawn else ""


def _figure(chart: Chart, marks: Marks, prefix: str, *, small: bool) -> str:
    hidden = len(chart.lines) - MOST_LINES
    more = f'<li class="quiet">and {hidden} more, which are not drawn</li>' if hidden > 0 else ""
    is_alone = len(chart.lines) == 1 and chart.lines[0].number == 0
    title = chart.lines[0].label if is_alone else chart.title
    legend = "".join(_entry(line, named=not is_alone) for line in chart.lines[:MOST_LINES])
    return (
        f'<figure>\n<h3>{escaped(title)}</h3>\n<ul class="legend">{legend}{more}</ul>\n'
        f"{svg(chart, marks, prefix, escaped(chart.title), small=small)}\n</figure>\n"
    )


def _entry(line: Line, *, named: bool) -> str:
    """A line of a legend: how it is drawn, its name, where it came to."""
    dash = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 2"')[line.number // COLOURS % 3]
    sample = (
        '<svg viewBox="0 0 28 12" aria-hidden="true"><path d="M1 6H27" fill="none" stroke-width="3"'
        f' stroke="var(--c{line.number % COLOURS + 1})"{dash}/></svg>'
    )
    name = f"{sample}{escaped(line.label)} " if named else ""
    return f"<li>{name}<span>{escaped(_came_to(line))}</span></li>\n"


def _came_to(line: Line) -> str:
    curve: Curve = line.curve
    last = number(curve.values[-1])
    best = None if line.mode is None else curve.best(line.mode)
    return last if best is None else f"{last}, best {number(curve.values[best])} at {curve.steps[best]:,}"


def picture(name: str, uri: str | None) -> str:
    """A picture as it lies in the record, as a data URI; None is one that can't be shown."""
    return f'<img alt="{escaped(name)}" src="{uri}">' if uri else '<p class="quiet">Its file can\'t be shown.</p>'


def figures(found: Mapping[str, str]) -> str:
    """Elements side by side, each under its name."""
    drawn = "".join(f"<figure>\n<h3>{escaped(name)}</h3>\n{each}\n</figure>\n" for name, each in found.items())
    return f'<div class="charts">\n{drawn}</div>\n' if drawn else ""
