"""The lines of a log in JSON: which are rows, and which are torn or damaged."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from functrain.errors import LogError

LOG = "log.jsonl"  # What it is called in the folder of a run.
_BEGIN = b'{"step": '  # Of every line.
# By what Python calls them, and by what JSON's users do.
SPELLED = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
NON_FINITE = {spelled: float(name) for name, spelled in SPELLED.items()}


class Lines(NamedTuple):
    """The lines of a log: those that are rows, by its number each that is none, and what is torn of the last one."""

    rows: list[tuple[bytes, dict[str, Any]]]
    damaged: dict[int, bytes]
    torn: bytes = b""

    def told(self, path: object) -> str:
        """What is damaged, for a warning."""
        return told_of_damage(path, len(self.damaged), *next(iter(self.damaged.items())))


def lines_of(path: Path, written: bytes) -> Lines:
    """Takes a log apart; what a killed process left of its last line is none.

    Raises:
      LogError: there are lines, and none is a row.
    """
    *whole, last = written.split(b"\n")
    torn = is_torn(last)
    found = {number: (line, row_of(line)) for number, line in enumerate(whole if torn else [*whole, last], start=1)}
    rows = [(line, row) for line, row in found.values() if row is not None]
    damaged = {number: line for number, (line, row) in found.items() if row is None}
    if damaged and not rows:
        raise LogError(told_of_no_log(path, *next(iter(damaged.items()))))
    return Lines(rows, damaged, last if torn else b"")


def numbers_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with NaN and the infinities as floats."""
    return {name: NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def title(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows that say the same of the same moment have in common."""
    return row["step"], row.get("epoch"), *sorted(row.keys() - {"time"})


def told_of_damage(path: object, count: int, number: int, line: bytes) -> str:
    """How many lines are damaged, and the first of them."""
    lines = f"{count} damaged {'line is' if count == 1 else 'lines are'}"
    return f"{path}: {lines} left out, the first is line {number}, {_shown(line)}"


def told_of_no_log(path: object, number: int, line: bytes) -> str:
    """That a file has lines, of which none is a row."""
    return f"{path} is no log: line {number} is no row, {_shown(line)}; delete it, or give the logger another file"


def is_torn(last: bytes) -> bool:
    """Whether what is behind the last line break is what a killed process left of a row."""
    return row_of(last) is None and (last.startswith(_BEGIN) or _BEGIN.startswith(last))


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row that a line is; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(map(_is_number, row.values())) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value in NON_FINITE)
