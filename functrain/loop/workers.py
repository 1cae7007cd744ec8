"""Processes of Grain's that read ahead, and how they end."""

import contextlib
import multiprocessing
import threading
from multiprocessing.process import BaseProcess
from types import GeneratorType
from typing import Any

_GRAINS = "grain-process-prefetch"
_PATIENCE = 1.0  # Seconds.


class Workers:
    """The processes that Grain starts from here on.

    Grain waits up to 25 seconds for a worker that is within a read, and at its exit Python waits for Grain.
    """

    def __init__(self) -> None:
        self._before = {process.pid for process in _grains()}

    def end(self, batches: Any) -> None:
        """Closes an iterator, if it can be closed, and ends what of Grain's is left after a second."""
        close = getattr(batches, "close", None)
        closing = threading.Thread(target=_closed, args=(close,), daemon=True)
        if callable(close) and not isinstance(batches, GeneratorType):  # Python closes those.
            closing.start()
            closing.join(_PATIENCE)
        left = [process for process in _grains() if process.pid not in self._before]
        for process in left:
            process.kill()
        for process in left:
            process.join(_PATIENCE)
        if closing.is_alive():
            closing.join(_PATIENCE)


def _grains() -> list[BaseProcess]:
    return [process for process in multiprocessing.active_children() if process.name.startswith(_GRAINS)]


def _closed(close: Any) -> None:
    with contextlib.suppress(Exception):
        close()
