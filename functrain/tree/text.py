"""Words for messages and tables."""

import difflib
from collections.abc import Callable, Iterable, Sequence


def listed(names: Iterable[str], most: int = 10) -> str:
    """At most ten names in quotes, then a count of the others.

    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    quoted = [repr(name) for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """Of misspelt names the known ones that are nearest, as the end of a sentence; "" where none is near.

    >>> did_you_mean(["haed"], ["body", "head"])
    "; did you mean 'head'?"
    """
    known = [*known]
    near = [found[0] for name in names if (found := difflib.get_close_matches(str(name), known, 1))]
    return f"; did you mean {listed(dict.fromkeys(near))}?" if near else ""


def listed_lines(lines: Sequence[str], most: int = 10) -> str:
    """At most ten lines, each on a line of its own and indented, then a count of the others."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])


def leaves_in_words(count: int) -> str:
    """A number of leaves in words.

    >>> leaves_in_words(1), leaves_in_words(1200)
    ('1 leaf', '1,200 leaves')
    """
    return f"{count:,} {'leaf' if count == 1 else 'leaves'}"


def bytes_in_words(count: float) -> str:
    """A number of bytes for a reader.

    >>> bytes_in_words(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def aligned(rows: Sequence[Sequence[str]], aligns: Sequence[Callable[[str, int], str]]) -> str:
    """Rows of cells as lines of text; each column as wide as its widest cell.

    >>> print(aligned([("a", "1"), ("bcd", "23")], (str.ljust, str.rjust)))
    a     1
    bcd  23
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([align(cell, width) for align, cell, width in zip(aligns, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def around_first_difference(one: object, other: object, margin: int = 40) -> tuple[str, str]:
    """What two things that look alike say where they first differ, in quotes."""
    texts = (str(one), str(other))
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    window = slice(max(0, same - margin), same + margin)
    return f"'...{texts[0][window]}...'", f"'...{texts[1][window]}...'"
