"""`functrain report`: the report of a run, or of several beside each other."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from functrain.cli.answer import Answer
from functrain.cli.place import absolute, place_of
from functrain.loop.record.report import Written, compare, write
from functrain.loop.record.report.comparing import Differences
from functrain.loop.record.report.tables import Table
from functrain.tree.text import aligned, listed

_COMPARISON = "comparison"


def run(arguments: Namespace) -> Answer:
    """Writes a report, and says where.

    Raises:
      CheckpointError: there is nothing of a run in one of the folders.
      LogError: matplotlib is not installed.
      OSError: it can't be written.
    """
    places = [place_of(each) for each in arguments.runs]
    runs = [place.directory for place in places]
    out = None if arguments.out is None else absolute(arguments.out)
    if len(runs) == 1:
        # What was brought from an address is deleted when the command ends.
        written = write(runs[0], absolute(runs[0].name) if out is None and places[0].address else out)
        data = {"run": places[0].address or str(runs[0]), **_files(written)}
        return Answer(_where(written), data, notes=written.problems)
    written, found = compare(runs, out or absolute(_COMPARISON))
    data = {
        "runs": dict(zip(found.names, (place.address or str(place.directory) for place in places), strict=True)),
        "configuration": found.configuration,
        "results": found.results,
        **_files(written),
    }
    return Answer(f"{_text(found)}\n\n{_where(written)}", data, notes=written.problems)


def _files(written: Written) -> dict[str, object]:
    return {"html": str(written.html), "markdown": str(written.markdown), "problems": [*written.problems]}


def _where(written: Written) -> str:
    return "\n".join(map(_from_here, (written.html, written.markdown)))


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _text(found: Differences) -> str:
    told = [_tables("configuration", *found.configuration_tables)]
    told += [f"of {listed(found.unknown)} there is no record of it"] if found.unknown else []
    return "\n".join([*told, "", _tables("results", *found.results_tables)])


def _tables(name: str, main: Table | None, rest: Table | None) -> str:
    if main is None:
        return f"nothing that is known differs in the {name}" + ("" if rest is None else f" but {_more(rest)}")
    rows: list[Sequence[str]] = [[name, *main.head[1:]], *main.rows]
    aligns = [str.ljust if column < main.words else str.rjust for column in range(len(main.head))]
    return aligned(rows, aligns) + ("" if rest is None else f"\n... and {_more(rest)}")


def _more(rest: Table) -> str:
    return f"{len(rest.rows)} more, with --json"
