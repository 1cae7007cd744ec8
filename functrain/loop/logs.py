"""Where the numbers of a run go: lines of JSON, TensorBoard, or a logger of one's own."""

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import LogError
from functrain.loop.appending import Appending
from functrain.loop.lines import SPELLED, lines_of, numbers_of
from functrain.loop.names import named_values
from functrain.tree.warn import warn

_MOST_ELEMENTS = 16


class Logger(Protocol):
    """Takes the numbers of a run; `JsonLines` and `TensorBoard` are two, and yours may be any object like this.

    It may also have `flush()`, which returns when all rows are on disk: it is called before each checkpoint is saved,
    as a run that goes on from there does not write the rows before it again. Of a run with a record, `start(config)`
    takes the configuration, a mapping that may hold others, each time that it is started, and `artifact(path)` a file,
    each time that it is written. What fails with any error but `LogError` is warned of, and called again with the same
    arguments before the next row; a file, with the next one.

    One that can take nothing back, as `MLflow`, may have `settle(step)`: rows up to it stand for good, as a checkpoint
    of that step is whole (-1: none does yet; never called where there are no checkpoints); and `restore(rows)`, which
    is given the rows of the log, each with "step" and "time", when a run goes on.
    """

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Takes numbers of one step by name, such as "train/loss": floats and ints on the host."""

    def resume(self, step: int) -> None:
        """The run goes on from this step: rows past it never happened, all of them where it is -1, in a new run."""

    def close(self) -> None:
        """Nothing more will be logged; may be called twice."""


class _Log:
    """What the loggers share: an output that is made when it is first needed, and closed once."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self._place = Path(place)
        self._output: Appending | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._place)!r})"

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes a row. What is not yet on the host is fetched; nested numbers are named as `flattened` names them.

        Raises:
          LogError: the logger is closed, or cannot take a number or its name.
          OSError: the row could not be written; nothing of it is.
        """
        self._check_open()
        numbers = flattened(row)
        record = self._record(int(step), numbers)
        if self._output is None:
            self._output = self._opened(None)
        self._output.append(record)

    def resume(self, step: int) -> None:
        """Goes on from a step: rows past it never happened, all of them where it is -1, in a new run.

        Raises:
          LogError: the logger is closed, or the file is no log.
          OSError: it could not be opened, and may be tried again.
        """
        self._check_open()
        if self._output is not None:
            self._output.close()
        self._output = None
        self._output = self._opened(int(step))

    def flush(self) -> None:
        """Returns when all rows are on disk."""
        if self._output is not None:
            self._output.sync()

    def close(self) -> None:
        """Closes the output; may be called twice."""
        self._closed = True
        if self._output is not None:
            self._output.close()

    def _check_open(self) -> None:
        if self._closed:
            raise LogError(f"{self!r} is closed; make a new logger, or call close() after the last row")

    def _opened(self, step: int | None) -> Appending:
        raise NotImplementedError

    def _record(self, step: int, numbers: Mapping[str, float]) -> bytes:
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
    process left of its last line is dropped. A damaged line is set aside, with a warning, in a file `*.jsonl.damaged`.
    `resume` replaces the file as a whole or not at all.

    Args:
      path: the file, by custom `*.jsonl`; its folder is made. It is not touched before the first row or `resume`.
    """

    def _opened(self, step: int | None) -> Appending:
        path = self._place
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_bytes() if path.exists() else b""
        lines = lines_of(path, written)
        if lines.damaged:
            aside = path.with_name(f"{path.name}.damaged")
            _append(aside, b"".join(line + b"\n" for line in lines.damaged.values()))
            warn(f"{lines.told(path)}; they are kept in {aside.name!r}")
        kept = b"".join(line + b"\n" for line, row in lines.rows if step is None or row["step"] <= step)
        if kept != written:
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.unlink(missing_ok=True)
            _append(temporary, kept)
            temporary.replace(path)
        return Appending(path)

    def _record(self, step: int, numbers: Mapping[str, float]) -> bytes:
        if taken := [name for name in ("step", "time") if name in numbers]:
            raise LogError(f"{taken[0]!r} is written with every row; name the number 'train/{taken[0]}' instead")
        finite = {name: value if math.isfinite(value) else SPELLED[str(value)] for name, value in numbers.items()}
        row = {"step": step, "time": time.time(), **finite}
        return json.dumps(row, allow_nan=False).encode() + b"\n"


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

    A row is in the file when `log` returns.

    Args:
      directory: one run's folder. It is not touched before the first row or `resume`.

    Raises:
      LogError: tensorboardX is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        try:
            import_module("tensorboardX")
            self._events = import_module("tensorboardX.proto.event_pb2")
            self._summary = import_module("tensorboardX.proto.summary_pb2").Summary
            self._checksum = import_module("tensorboardX.record_writer").masked_crc32c
        except ImportError as error:
            raise LogError(f"{self!r}: {error}; write pip install tensorboardX") from error

    def _opened(self, step: int | None) -> Appending:
        self._place.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, of which there may be two in a second.
        began = time.time_ns()
        name = f"events.out.tfevents.{began // 10**9:010d}.{socket.gethostname()}.{began}"
        begin = self._framed(file_version="brain.Event:2")
        if step is not None:
            begin += self._framed(
                step=step + 1, session_log=self._events.SessionLog(status=1)
            )  # START: hides the rest.
        output = Appending(self._place / name)
        try:
            output.append(begin)
        except OSError:
            output.close()
            with contextlib.suppress(OSError):
                output.path.unlink()
            raise
        return output

    def _record(self, step: int, numbers: Mapping[str, float]) -> bytes:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        return self._framed(step=step, summary=self._summary(value=values))

    def _framed(self, **event: Any) -> bytes:
        """An event as a record of the file: tensorboardX writes these on a thread, which a full disk ends."""
        content = self._events.Event(wall_time=time.time(), **event).SerializeToString()
        length = struct.pack("<Q", len(content))
        checks = [struct.pack("<I", self._checksum(part)) for part in (length, content)]
        return bytes(length + checks[0] + content + checks[1])


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
      path: the file, which a run may still be writing: a torn last line is left out, and with a warning a damaged one.

    Returns:
      The rows in the file's order: `{"step": int, "time": seconds since 1970, name: number, ...}`.

    Raises:
      LogError: no line is a row; the message names the file and the first of them.
      FileNotFoundError: there is no such file.
    """
    lines = lines_of(Path(path), Path(path).read_bytes())
    if lines.damaged:
        warn(lines.told(path))
    return [numbers_of(row) for _, row in lines.rows]


def _append(path: Path, content: bytes) -> None:
    """Adds to a file; it is on disk when this returns."""
    file = Appending(path)
    try:
        file.append(content)
        file.sync()
    finally:
        file.close()


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
