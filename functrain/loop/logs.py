"""Where the numbers of a run go: lines of JSON, TensorBoard, or a logger of one's own."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# By what Python calls them, and by what JSON's users do.
from functrain.errors import LogError
from functrain.loop.names import named_values

_SPELLED = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_NON_FINITE = {spelled: float(name) for name, spelled in _SPELLED.items()}
_MOST_ELEMENTS = 16


class Logger(Protocol):
    """Takes the numbers of a run; `JsonLines` and `TensorBoard` are two, and yours may be any object like this."""

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Takes numbers of one step by name, such as "train/loss": floats and ints on the host."""

    def resume(self, step: int) -> None:
        """The run goes on from this step, 0 for a new run: rows past it never happened."""

    def close(self) -> None:
        """Nothing more will be logged; may be called twice."""


class _Log:
    """What the loggers share: an output that is made when it is first needed, and closed once."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self._place = Path(place)
        self._output: Any = None
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._place)!r})"

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes a row. What is not yet on the host is fetched; nested numbers are named as `flattened` names them.

        Raises:
          LogError: the logger is closed, or cannot take a number or its name.
        """
        self._check_open()
        numbers = flattened(row)
        if self._output is None:
            self._output = self._opened(None)
        self._write(int(step), numbers)

    def resume(self, step: int) -> None:
        """Goes on from a step, 0 for a new run: rows past it never happened.

        Raises:
          LogError: the logger is closed, or the file is no log.
        """
        self._check_open()
        if self._output is not None:
            self._output.close()
        self._output = None
        self._output = self._opened(int(step))

    def close(self) -> None:
        """Writes what is left and closes the output; may be called twice."""
        self._closed = True
        if self._output is not None:
            self._output.close()

    def _check_open(self) -> None:
        if self._closed:
            raise LogError(f"{self!r} is closed; make a new logger, or call close() after the last row")

    def _opened(self, step: int | None) -> Any:
        raise NotImplementedError

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        raise NotImplementedError


class JsonLines(_Log):
    """Writes a line of JSON for each row, which is in the file when `log` returns.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run" / "log.jsonl"
    >>> log = JsonLines(path)
    >>> log.log(12, {"train/loss": 0.5, "train/grad_norm": math.inf})
    >>> log.close()
    >>> path.read_text()  # doctest: +ELLIPSIS
    '{"step": 12, "time": ..., "train/loss": 0.5, "train/grad_norm": "Infinity"}\\n'

    The file is strict JSON: NaN and the infinities are strings, which `read_json_lines` turns back. What a killed
    process left of its last line is dropped. `resume` replaces the file as a whole or not at all.

    Args:
      path: the file, by custom `*.jsonl`; its folder is made. It is not touched before the first row or `resume`.
    """

    def _opened(self, step: int | None) -> BinaryIO:
        path = self._place
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_bytes() if path.exists() else b""
        rows = _rows(path, written)
        kept = b"".join(line + b"\n" for line, row in rows if step is None or row["step"] <= step)
        if kept != written:
            temporary = path.with_name(f"{path.name}.tmp")
            with temporary.open("wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        return path.open("ab")

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if taken := [name for name in ("step", "time") if name in numbers]:
            raise LogError(f"{taken[0]!r} is written with every row; name the number 'train/{taken[0]}' instead")
        finite = {name: value if math.isfinite(value) else _SPELLED[str(value)] for name, value in numbers.items()}
        row = {"step": step, "time": time.time(), **finite}
        self._output.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._output.flush()


class TensorBoard(_Log):
    """Writes TensorBoard's event files, through tensorboardX.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> board = TensorBoard(directory)
    >>> board.resume(100)  # TensorBoard hides what an earlier process logged past step 100; its file keeps it
    >>> board.log(101, {"train/loss": 0.5})
    >>> board.close()
    >>> len(list(directory.glob("events.out.tfevents.*")))
    1

    A row is in the file within ten seconds, or when the logger is closed.

    Args:
      directory: one run's folder. It is not touched before the first row or `resume`.

    Raises:
      LogError: tensorboardX is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        try:
            self._make_writer = import_module("tensorboardX").SummaryWriter
            self._summary = import_module("tensorboardX.proto.summary_pb2").Summary
        except ImportError as error:
            raise LogError(f"{self!r}: {error}; write pip install tensorboardX") from error

    def _opened(self, step: int | None) -> Any:
        purge_step = None if step is None else step + 1
        # tensorboardX names a file by the second: without the suffix a quick restart overwrites the file before.
        suffix = f".{time.time_ns()}"
        return self._make_writer(str(self._place), purge_step=purge_step, flush_secs=10, filename_suffix=suffix)

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        # One event for the row: one for each number costs a turn of tensorboardX's queue each.
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._output.file_writer.add_summary(self._summary(value=values), step)


def flattened(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Nested metrics as plain numbers by name; all that is on a device is fetched at once.

    >>> flattened({"loss": jnp.float32(0.5), "parts": {"head": {"rates": np.array([0.25, 2.0])}}, "epoch": 3})
    {'loss': 0.5, 'parts/head/rates/0': 0.25, 'parts/head/rates/1': 2.0, 'epoch': 3}

    Args:
      metrics: scalars and vectors of up to 16 elements by name, in any depth of dicts.

    Returns:
      `{"a/b": number}`: ints for integers and booleans, floats for the rest.

    Raises:
      LogError: a value is neither, or two have one name; the message says which.
    """
    named = list(named_values(metrics))
    numbers: dict[str, float] = {}
    for (name, _), value in zip(named, jax.device_get([value for _, value in named]), strict=True):
        for element, number in _numbers(name, value):
            if element in numbers:
                raise LogError(
                    f"two metrics have the name {element!r}: a key that contains '/' reads like two keys; rename one"
                )
            numbers[element] = number
    return numbers


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what `JsonLines` wrote, with NaN and the infinities as floats.

    Args:
      path: the file, which a run may still be writing: a torn last line is left out.

    Returns:
      The rows in the file's order: `{"step": int, "time": seconds since 1970, name: number, ...}`.

    Raises:
      LogError: a line is no row; the message names the file and the line.
      FileNotFoundError: there is no such file.
    """
    rows = [row for _, row in _rows(Path(path), Path(path).read_bytes())]
    return [
        {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    ]


def _rows(path: Path, written: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = written.split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            yield line, row
        elif number < len(lines):  # What follows the last newline is nothing, or torn.
            raise LogError(
                f"{path}, line {number} is no row of a log: {line[:60].decode(errors='replace')!r}; delete the line, or"
                " give the logger another file"
            )


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise LogError(f"metric {name!r} is {value!r}, which is no real number; write a float, or leave it out")
    if array.ndim > 1 or not 1 <= array.size <= _MOST_ELEMENTS:
        raise LogError(
            f"metric {name!r} has shape {array.shape}, and a log takes at most {_MOST_ELEMENTS} elements of a vector;"
            " reduce it to a scalar, such as its mean"
        )
    number = float if jnp.issubdtype(array.dtype, jnp.floating) else int
    if array.ndim == 0:
        yield name, number(array)
    else:
        yield from ((f"{name}/{i}", number(element)) for i, element in enumerate(array))
