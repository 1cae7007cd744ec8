"""The report of several runs: their curves laid over each other, and what differs."""

from collections.abc import Sequence

from functrain.loop.record.left import Left
from functrain.loop.record.report import charts, elements, summary
from functrain.loop.record.report.comparing import Differences
from functrain.loop.record.report.figures import Marks, drawing
from functrain.loop.record.report.tables import Table, as_markdown, escaped
from functrain.tree.text import listed


def page(runs: Sequence[Left], found: Differences) -> str:
    """The page of several runs.

    Raises:
      LogError: matplotlib is not installed.
    """
    with drawing():
        curves = elements.charts(charts.compared(found.names, runs), Marks(ends=charts.ends_of(runs)), "c")
    problems = [
        f"{name}: {told}" for name, left in zip(found.names, runs, strict=True) for told in summary.problems(left)
    ]
    title = f"{len(runs)} runs"
    (made, versions), (main, rest) = found.configuration_tables, found.results_tables
    configuration = (elements.table(made), elements.folded_table(versions))
    body = (
        f"<header>\n<h1>{title}</h1>\n{elements.table(_runs(runs, found))}{elements.told(problems)}</header>\n",
        elements.section("What differs in the configuration", *configuration, _same(found)),
        elements.section("What differs in the results", elements.table(main), elements.folded_table(rest)),
        elements.section("Losses and results", curves),
        "<footer>Written by functrain from the files of the runs.</footer>\n",
    )
    return elements.document(title, "".join(body))


def markdown(runs: Sequence[Left], found: Differences) -> str:
    """The same for a pull request, without curves."""
    tables = [
        ("What differs in the configuration", found.configuration_tables[0]),
        ("What differs in the results", found.results_tables[0]),
    ]
    pieces = [f"## {len(runs)} runs\n", as_markdown(_runs(runs, found))]
    pieces += [f"### {title}\n\n{as_markdown(table) if table else 'Nothing.'}" for title, table in tables]
    return "\n".join(pieces)


def _runs(runs: Sequence[Left], found: Differences) -> Table:
    rows = [[name, summary.status(left)[1], summary.lead(left)] for name, left in zip(found.names, runs, strict=True)]
    return Table(["run", "ended", "trained"], rows, words=3)


def _same(found: Differences) -> str:
    told = [] if found.configuration else ["Nothing that is recorded"]
    told += [f"The same in all: {found.same:,} keys"] if found.same else []
    told += [f"Not recorded of {listed(found.unknown)}"] if found.unknown else []
    return f'<p class="quiet">{escaped(". ".join(told))}.</p>\n' if told else ""
