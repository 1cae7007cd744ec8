"""A log as columns: a million rows are read in seconds."""

import json
import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from functrain.loop.lines import NON_FINITE, is_torn, row_of, told_of_damage, told_of_no_log
from functrain.loop.record.curves import Curve

_BLOCK = 1 << 20  # Bytes that are parsed at once.


class Log(NamedTuple):
    """What can be read of a log, in the order of its steps.

    Attributes:
      curves: every number by name.
      epochs: at each step.
      last: step, epoch and time of the last row, as far as it has them; empty if there is none.
      rows: how many there are.
      damaged: how many lines are no rows.
      repeated: how many rows were written again, after the run was started again; they count once.
      problems: what is wrong with it.
    """

    curves: Mapping[str, Curve] = {}
    epochs: Curve = Curve([], [])
    last: Mapping[str, Any] = {}
    rows: int = 0
    damaged: int = 0
    repeated: int = 0
    problems: tuple[str, ...] = ()


def read_log(path: Path) -> Log:
    """Reads a log as far as it can be read.

    Raises:
      OSError: it can't be read at all.
    """
    reading, torn = _Reading(), b""
    with path.open("rb") as file:
        while lines := file.readlines(_BLOCK):
            if not lines[-1].endswith(b"\n") and is_torn(lines[-1]):
                torn = lines.pop()
            reading.add([line.removesuffix(b"\n") for line in lines])
    problems = []
    if reading.first_damaged is not None:
        if not reading.count:
            return Log(damaged=reading.damaged, problems=(told_of_no_log(path, *reading.first_damaged),))
        problems.append(told_of_damage(path, reading.damaged, *reading.first_damaged))
    if torn:
        problems.append(f"{path}: the last line is torn, or is being written, and is left out")
    return reading.log(problems)


class _Table:
    """Rows of one form, as columns.

    Attributes:
      steps: of the rows.
      numbers: of the rows in the log, counted from 1.
      columns: the values by name; NaN where a row has no time.
    """

    def __init__(self) -> None:
        self.steps, self.numbers = array("q"), array("q")
        self.columns: dict[str, array[float]] = {}

    def add(self, numbers: Sequence[int], steps: Sequence[int], columns: Mapping[str, Sequence[float]]) -> None:
        """Adds rows."""
        self.numbers.extend(numbers)
        self.steps.extend(steps)
        for name, values in {"time": [float("nan")] * len(steps), **columns}.items():
            self.columns.setdefault(name, array("d")).extend(values)

    def in_order(self) -> "_Table":
        """The same by steps; of rows that say the same of the same moment the last one."""
        if all(map(operator.lt, self.steps, islice(self.steps, 1, None))):
            return self
        epochs = self.columns.get("epoch", array("d", bytes(8 * len(self.steps))))
        latest = {moment: index for index, moment in enumerate(zip(self.steps, epochs, strict=True))}
        kept, table = sorted(latest.values(), key=self.steps.__getitem__), _Table()
        columns = {name: [values[index] for index in kept] for name, values in self.columns.items()}
        table.add([self.numbers[index] for index in kept], [self.steps[index] for index in kept], columns)
        return table


class _Reading:
    """Rows as they are read."""

    def __init__(self) -> None:
        self.count, self.damaged = 0, 0
        self.first_damaged: tuple[int, bytes] | None = None
        self._lines = 0
        self._tables: dict[frozenset[str], _Table] = {}

    def add(self, lines: Sequence[bytes]) -> None:
        """Adds lines; each by itself where one of them is no row."""
        try:
            self._add(_parsed(lines))
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            self._add(self._each(lines))
        self._lines += len(lines)

    def log(self, problems: Sequence[str]) -> Log:
        """What was read."""
        tables = [table.in_order() for table in self._tables.values()]
        of_name: dict[str, list[_Table]] = {}
        for table in tables:
            for name in table.columns:
                of_name.setdefault(name, []).append(table)
        orders: dict[tuple[int, ...], list[int]] = {}
        curves = {name: _curve(name, of, orders) for name, of in of_name.items() if name != "time"}
        epochs = curves.pop("epoch", Curve([], []))
        rows = sum(len(table.steps) for table in tables)
        return Log(curves, epochs, _last(tables), rows, self.damaged, self.count - rows, tuple(problems))

    def _each(self, lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, self._lines + 1):
            row = row_of(line)
            try:
                _columns(tuple(row or ()), [row or {}])
            except (TypeError, OverflowError):
                self.damaged += 1
                self.first_damaged = self.first_damaged or (number, line)
            else:
                yield row or {}

    def _add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds all rows, or fails and adds none."""
        of_form: dict[tuple[str, ...], tuple[list[int], list[dict[str, Any]]]] = {}
        number = self.count
        for number, row in enumerate(rows, self.count + 1):
            form = tuple(row)
            if form not in of_form:
                of_form[form] = ([], [])
            numbers, found = of_form[form]
            numbers.append(number)
            found.append(row)
        read = [(numbers, *_columns(form, found)) for form, (numbers, found) in of_form.items()]
        for numbers, steps, columns in read:
            self._tables.setdefault(frozenset(columns.keys() - {"time"}), _Table()).add(numbers, steps, columns)
        self.count = number


def _parsed(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    joined = b"[\n" + b",\n".join(lines) + b"]"
    rows: list[dict[str, Any]] = json.loads(joined)
    # Torn lines can make whole ones where they are put together, but for what begins with a brace.
    if len(rows) != len(lines) or joined.count(b"\n{") != len(lines):
        raise ValueError("a line is no row")
    return rows


def _columns(
    form: tuple[str, ...], rows: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[int], dict[str, Sequence[float]]]:
    """The steps of rows, and their other values as columns.

    Raises:
      TypeError: there are no steps, or what is no number.
      OverflowError: a number is too large.
    """
    columns = dict(zip(form, zip(*(row.values() for row in rows), strict=True), strict=True))
    steps = columns.pop("step", ())
    if {*map(type, steps)} != {int}:
        raise TypeError("a row has no step")
    return array("q", steps), {name: _floats(values) for name, values in columns.items()}


def _floats(values: Sequence[Any]) -> Sequence[float]:
    if str in {*map(type, values)}:
        values = [NON_FINITE.get(value, value) if isinstance(value, str) else value for value in values]
    return array("d", values)


def _curve(name: str, tables: Sequence[_Table], orders: dict[tuple[int, ...], list[int]]) -> Curve:
    """The values of a name, of all tables that have it; tables of which the order is known are not sorted again."""
    if len(tables) == 1:
        return Curve(tables[0].steps, tables[0].columns[name])
    steps, values, numbers = array("q"), array("d"), array("q")
    for table in tables:
        steps.extend(table.steps)
        values.extend(table.columns[name])
        numbers.extend(table.numbers)
    key = tuple(map(id, tables))
    if key not in orders:
        orders[key] = sorted(sorted(range(len(steps)), key=numbers.__getitem__), key=steps.__getitem__)
    order = orders[key]
    return Curve(array("q", [steps[index] for index in order]), array("d", [values[index] for index in order]))


def _last(tables: Sequence[_Table]) -> dict[str, Any]:
    if not tables:
        return {}
    table = max(tables, key=lambda table: (table.steps[-1], table.numbers[-1]))
    about = {name: table.columns[name][-1] for name in ("time", "epoch") if name in table.columns}
    said: dict[str, Any] = {"step": table.steps[-1]}
    said |= {name: value for name, value in about.items() if abs(value) < float("inf")}
    return said | ({"epoch": int(said["epoch"])} if "epoch" in said else {})
