"""report.md: what one puts into a pull request."""

from functrain.loop.record.left import Left
from functrain.loop.record.report import summary
from functrain.loop.record.report.tables import Table, as_markdown, code


def markdown(left: Left) -> str:
    """The summary, the final numbers, the parts, what changed."""
    _, ended = summary.status(left)
    main, rest = summary.final(left)
    facts = Table(["", ""], summary.facts(left), words=2)
    pieces = [
        f"## {code(left.name)}\n",
        f"{code(ended)}\n",
        f"{code(lead)}\n" if (lead := summary.lead(left)) else "",
        as_markdown(facts) if facts.rows else "",
        _headed("Results", main) + (_folded(rest) if rest is not None else ""),
        _headed("Parts", summary.parts(left)),
        _headed("What changed on the way", summary.changes(left)),
        _headed("Warnings", summary.warnings(left)),
        "".join(f"- {code(problem)}\n" for problem in summary.problems(left)),
    ]
    return "\n".join(piece for piece in pieces if piece)


def _headed(title: str, table: Table | None) -> str:
    return "" if table is None else f"### {title}\n\n{as_markdown(table)}"


def _folded(table: Table) -> str:
    return f"\n<details><summary>{len(table.rows)} more numbers</summary>\n\n{as_markdown(table)}\n</details>\n"
