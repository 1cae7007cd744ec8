"""A logger that fails ends no run."""

import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from functrain.errors import LogError
from functrain.loop.logs import Logger
from functrain.tree.text import listed
from functrain.tree.warn import warn


class Unfailing:
    """A logger whose failures are warned of, and made up for when it works again.

    What could not be written is kept in memory, of which the run's history takes as much, and written in order before
    the next row. A row that fails must not be there, as it is written again.

    Args:
      logger: one that may fail, as with a full disk. Its `LogError`s, of what is no failure but a mistake, are raised.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._is_told = False
        self._error: Exception | None = None
        self._left: collections.deque[tuple[str, tuple[Any, ...]]] = collections.deque()
        self._artifacts: dict[Path, None] = {}  # In their order.

    def start(self, config: Mapping[str, Any]) -> None:
        """As the logger's own, if it has one."""
        if hasattr(self._logger, "start"):
            self._do("start", config)

    def resume(self, step: int) -> None:
        """As the logger's own."""
        self._do("resume", step)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """As the logger's own, if it has one."""
        if hasattr(self._logger, "restore"):
            self._do("restore", rows)

    def settle(self, step: int) -> None:
        """As the logger's own, if it has one."""
        if hasattr(self._logger, "settle"):
            self._do("settle", step)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """As the logger's own."""
        self._do("log", step, row)

    def artifact(self, path: Path) -> None:
        """As the logger's own, if it has one; a file that it does not take holds up no row."""
        if hasattr(self._logger, "artifact"):
            self._artifacts[path] = None
            self._catch_up()
            self._hand_over()

    def flush(self) -> None:
        """As the logger's own, if it has one."""
        self._catch_up()
        self._hand_over()
        if not self._left and hasattr(self._logger, "flush"):
            self._tried(self._logger.flush, "flush", ())

    def close(self) -> None:
        """As the logger's own; says which rows and files it lacks."""
        self._catch_up()
        self._hand_over()
        self._tried(self._logger.close, "close", ())
        if steps := [arguments[0] for name, arguments in self._left if name == "log"]:
            warn(
                f"{self._logger!r} lacks {len(steps)} row{'s' * (len(steps) > 1)} that could not be written, of the"
                f" steps {steps[0]} to {steps[-1]}: {_said(self._error)}; result.history has them"
            )
        if self._artifacts:
            files = listed([path.name for path in self._artifacts])
            warn(f"{self._logger!r} lacks {files}, which it did not take: {_said(self._error)}")
        self._left.clear()
        self._artifacts.clear()

    def _do(self, name: str, *arguments: Any) -> None:
        self._left.append((name, arguments))
        self._catch_up()

    def _catch_up(self) -> None:
        while self._left:
            name, arguments = self._left[0]
            try:
                if not self._tried(getattr(self._logger, name), name, arguments):
                    return
            except LogError:
                self._left.popleft()
                raise
            self._left.popleft()

    def _hand_over(self) -> None:
        """Gives it the files that it has not taken yet."""
        for path in [] if self._left else list(self._artifacts):
            del self._artifacts[path]
            if not self._tried(self._logger.artifact, "artifact", (path,)):  # type: ignore[attr-defined]
                self._artifacts[path] = None

    def _tried(self, call: Callable[..., None], name: str, arguments: tuple[Any, ...]) -> bool:
        """Whether it worked; the first time that it does not, it is told."""
        try:
            call(*arguments)
        except LogError:
            raise
        except Exception as error:
            self._error = error
            if not self._is_told:
                self._is_told = True
                what = _DONE.get(name, name)
                warn(
                    f"{self._logger!r} could not {what.format(*arguments)}: {_said(error)}; training goes on, and the"
                    " rows are kept and written when it can be: make room, or mend the place"
                )
            return False
        return True


_DONE = {
    "log": "write the row of step {}",
    "resume": "go on from step {}",
    "start": "take the configuration",
    "artifact": "take {}",
}


def _said(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"
