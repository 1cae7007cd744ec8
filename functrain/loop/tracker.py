"""What trackers share: a thread that sends what stands for good, in order and once."""

import collections
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from functrain.errors import LogError
from functrain.loop.lines import numbers_of
from functrain.loop.logs import flattened
from functrain.tree.text import listed
from functrain.tree.warn import warn

_MOST = 200  # Rows that are sent together.
_SOONEST, _LATEST = 0.5, 30.0  # Seconds after which what failed is tried again.


class Row(NamedTuple):
    """Numbers of a step; no two rows of a run have one time."""

    step: int
    milliseconds: int
    numbers: dict[str, float]


class Tracker:
    """A service that takes nothing back of what it was sent: a row waits until it stands for good.

    It does so when a checkpoint is whole that has it, as `settle` tells; where nothing is ever settled, as in a run
    without checkpoints, at once. What a killed process had not sent, the next one finds in the log (`restore`); what
    the service has of that, it leaves out. Where the service has rows that never happened, as the run goes on from an
    older checkpoint after all, the run there is set aside, and a new one gets all rows.

    A thread talks to the service. What fails is warned of once, and tried again until it works.

    Args:
      every: the seconds for which rows are gathered, to be sent together.
      patience: the seconds for which `close` waits for what is left.
    """

    def __init__(self, *, every: float, patience: float) -> None:
        self._every, self._patience = every, patience
        self._held: collections.deque[Row] = collections.deque()
        self._todo: collections.deque[tuple[str, Any]] = collections.deque()
        self._early: list[tuple[str, Any]] = []
        self._lost: dict[str, Exception] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stands, self._newest = math.inf, 0
        self._is_closed = self._is_given_up = self._is_told = False
        self._error: Exception | None = None

    def resume(self, step: int) -> None:
        """Goes on from a step; -1 begins a new run.

        Raises:
          LogError: the tracker is closed.
        """
        self._check_open()
        self._held.clear()
        self._add("open", int(step))

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the rows up to that step, as `read_json_lines` gives them: those that the service lacks are sent."""
        for row in rows:
            numbers = {name: value for name, value in numbers_of(row).items() if name not in ("step", "time")}
            self._add("row", self._row(row["step"], row.get("time", 0.0), numbers))

    def settle(self, step: int) -> None:
        """Rows up to a step stand for good; those after it wait until they do."""
        self._stands = step
        self._release()

    def start(self, config: Mapping[str, Any]) -> None:
        """Takes the configuration of the run."""
        self._add("config", dict(config))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Takes a row; nested numbers are named as in JSON lines.

        Raises:
          LogError: the tracker is closed, or what it is given is no number.
        """
        self._check_open()
        if self._error is not None and not self._is_told:
            self._is_told = True
            warn(f"{self!r}: {_said(self._error)}; training goes on, and the rows are kept and sent when they can be")
        self._held.append(self._row(int(step), time.time(), flattened(row)))
        self._release()

    def artifact(self, path: Path) -> None:
        """Takes a file, as it is when it is sent."""
        self._add("file", Path(path).absolute())

    def close(self) -> None:
        """Sends what is left, for as long as the tracker has patience; may be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread is not None:
            error = sys.exc_info()[0]  # What ends the run, where it is closed on the way out.
            self._add("end", "FINISHED" if error is None else "FAILED" if issubclass(error, Exception) else "KILLED")
            self._thread.join(self._patience)
            self._is_given_up = True
        self._tell_lacking()

    def _check_open(self) -> None:
        if self._is_closed:
            raise LogError(f"{self!r} is closed; make a new logger, or call close() after the last row")

    def _row(self, step: int, seconds: float, numbers: dict[str, float]) -> Row:
        self._newest = max(self._newest + 1, int(1000 * seconds))
        return Row(step, self._newest, numbers)

    def _release(self) -> None:
        while self._held and self._held[0].step <= self._stands:
            self._add("row", self._held.popleft())

    def _add(self, kind: str, what: Any) -> None:
        jobs = [(kind, what)]
        if self._thread is None:
            if kind in ("config", "file"):  # It waits until it is known which run it is of.
                self._early += jobs
                return
            jobs = [*jobs, *self._early] if kind == "open" else [("open", -1), *self._early, *jobs]
            self._thread = threading.Thread(target=self._work, name="functrain-tracker", daemon=True)
            self._thread.start()
        with self._changed:
            self._todo += jobs
            self._changed.notify()

    def _tell_lacking(self) -> None:
        """Warns of what the service has not, and will not have of this process."""
        lacking = [([what for kind, what in self._todo if kind == "row"], _said(self._error))]
        lacking += [([*self._held], "they wait for a checkpoint, as the run may go on from the one before them")]
        for rows, reason in lacking:
            if rows:
                warn(
                    f"{self!r} lacks {len(rows)} row{'s' * (len(rows) > 1)}, of the steps {rows[0].step} to"
                    f" {rows[-1].step}: {reason}; result.history has them, and a run that goes on sends what it keeps"
                )
        if self._lost:
            warn(f"{self!r} lacks {listed(self._lost)}: {_said(next(iter(self._lost.values())))}")

    # What each service does.

    def _open(self, step: int) -> None:
        """Finds the run of which it has no row past a step, or begins one."""
        raise NotImplementedError

    def _config(self, config: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _send(self, rows: Sequence[Row]) -> None:
        """Sends rows, but those that are there; when it fails it is called again with them, or more."""
        raise NotImplementedError

    def _send_file(self, path: Path) -> None:
        raise NotImplementedError

    def _send_results(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends numbers of the end of a run, at a step; it is called again with the same ones."""
        raise NotImplementedError

    def _end(self, status: str) -> None:
        raise NotImplementedError

    # The thread.

    def _work(self) -> None:
        pause, sent = _SOONEST, -math.inf
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._todo)
                kind, what = self._todo[0]
                if kind == "row":
                    self._changed.wait_for(lambda: self._is_closed, max(0.0, sent + self._every - time.monotonic()))
                    what = [row for _, row in itertools.takewhile(_is_row, itertools.islice(self._todo, _MOST))]
            try:
                _CALLS[kind](self, what)
            except Exception as error:
                self._error = error
                if kind == "file":
                    self._put_off(what, error)
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._is_given_up, min(pause, _SOONEST if self._is_closed else pause)
                    )
                pause = min(2 * pause, _LATEST)
            else:
                sent, pause = time.monotonic() if kind == "row" else sent, _SOONEST
                self._error = None
                for _ in what if kind == "row" else [what]:
                    self._todo.popleft()
            if kind == "end" or self._is_given_up:
                return

    def _take_file(self, path: Path) -> None:
        self._send_file(path)
        for step, numbers in _results_in(path) if path.name == "results.json" else []:
            self._send_results(step, numbers)

    def _put_off(self, path: Path, error: Exception) -> None:
        """A file that fails holds up no row: it is tried again after them, until the end."""
        with self._changed:
            self._todo.popleft()
            if self._is_closed:
                self._lost[path.name] = error
            else:
                self._todo.append(("file", path))


_CALLS: dict[str, Callable[[Tracker, Any], None]] = {
    "open": lambda tracker, step: tracker._open(step),
    "config": lambda tracker, config: tracker._config(config),
    "row": lambda tracker, rows: tracker._send(rows),
    "file": lambda tracker, path: tracker._take_file(path),
    "end": lambda tracker, status: tracker._end(status),
}


def _results_in(path: Path) -> list[tuple[int, dict[str, float]]]:
    """The final numbers of a record, by "final/last/NAME", and their step; none of a file that is something else."""
    try:
        return [
            (each["step"], {f"final/{each['of']}/{name}": value for name, value in numbers_of(each["numbers"]).items()})
            for each in json.loads(path.read_bytes())["final"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _is_row(job: tuple[str, Any]) -> bool:
    return job[0] == "row"


def _said(error: Exception | None) -> str:
    return "the service is slow" if error is None else f"{type(error).__name__}: {error}"
