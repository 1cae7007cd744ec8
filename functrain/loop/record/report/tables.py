"""Tables of words and numbers, and how they are written as HTML and as Markdown; whatever a file says is text."""

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

# What moves a cursor, turns the direction of text, or is half a character.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MOMENT = re.compile(r"[-\d]{10} [:\d]{8} UTC")
_PLAIN = re.compile(r"[-+\w .,:%()]*")  # In Markdown.


class Table(NamedTuple):
    """A table.

    Attributes:
      head: of its columns.
      rows: of as many cells.
      words: how many columns from the left are words; those behind are numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def escaped(text: str) -> str:
    r"""A text as HTML, also within quotes.

    >>> escaped('<b title="x">\x1b')
    '&lt;b title=&quot;x&quot;&gt;\\x1b'
    """
    return html.escape(seen(text))


def seen(text: str) -> str:
    """A text in which nothing is hidden."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def as_html(table: Table) -> str:
    """A table as an element."""
    kinds = ["" if column < table.words else ' class="n"' for column in range(len(table.head))]
    head = "".join(f"<th{kind}>{escaped(cell)}</th>" for kind, cell in zip(kinds, table.head, strict=True))
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.head) else ""
    rows = ""
    for row in table.rows:
        of_cells = [' class="d"' if _MOMENT.fullmatch(cell) else kind for kind, cell in zip(kinds, row, strict=True)]
        cells = (f"<td{kind}>{escaped(cell)}</td>" for kind, cell in zip(of_cells, row, strict=True))
        rows += f"<tr>{''.join(cells)}</tr>\n"
    around = "scroll pairs" if table.words == 2 == len(table.head) else "scroll"
    return f'<div class="{around}"><table>{head}<tbody>\n{rows}</tbody></table></div>\n'


def as_markdown(table: Table) -> str:
    """A table as GitHub has it."""
    rules = ["---" if column < table.words else "---:" for column in range(len(table.head))]
    rows = [[code(cell).replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rules, *rows[1:]))


def code(text: str) -> str:
    """A text in Markdown, as code where it could be more than words.

    >>> code("12.5 s"), code("valid/loss"), code("a ` <b>")
    ('12.5 s', '`valid/loss`', '`` a ` <b> ``')
    """
    line = " ".join(seen(text).split())
    if _PLAIN.fullmatch(line) and "_" not in line:
        return line
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"
