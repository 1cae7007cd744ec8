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
    runs, named = [place.directory for place in places], [place.address or str(place.directory) for place in places]
    out = None if arguments.out is None else absolute(arguments.out)
    if len(runs) == 1:
        if places[0].address is not None and out is None:  # Nothing is written to the address.
            out = absolute(f"{named[0].rstrip('/').rpartition('/')[2]}-report")
        written = write(runs[0], out)
        data = {"run": named[0], **_files(written)}
        return Answer(_where(written), data, notes=written.problems)
    written, found = compare(runs, out or absolute(_COMPARISON))
    data = {
        "runs": dict(zip(found.names, named, strict=True)),
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
    main, rest = found.results_tables
    told = [_table("configuration", found.configuration_table)]
    told += [f"of {listed(found.unknown)} there is no record of it"] if found.unknown else []
    told += ["", _table("results", main)]
    told += [f"... and {len(rest.rows)} more, with --json"] if rest is not None else []
    return "\n".join(told)


def _table(name: str, table: Table | None) -> str:
    if table is None:
        return f"nothing that is known differs in the {name}"
    rows: list[Sequence[str]] = [[name, *table.head[1:]], *table.rows]
    return aligned(rows, [str.ljust, *[str.rjust] * (len(table.head) - 1)])
