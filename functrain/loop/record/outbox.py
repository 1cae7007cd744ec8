"""A record at an address: brought before a run begins, and sent in the background as it grows."""

import contextlib
import itertools
import json
import math
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from functrain.errors import StorageError
from functrain.loop.lines import LOG
from functrain.loop.record.files import FILES, RESULTS, RUN
from functrain.loop.record.folder import RecordFolder, came_to_nothing
from functrain.loop.remote.store import Store
from functrain.tree.warn import warn

_PAUSE = 10.0  # Seconds from one sending to the next.


class Outbox:
    """Sends the files of a record to an address; what can't be sent is warned of once, and tried again.

    Args:
      store: the address.
      folder: of this machine, in which the record is written.
    """

    def __init__(self, store: Store, folder: RecordFolder) -> None:
        self._store, self._folder = store, folder
        self._sent: dict[str, tuple[int, int, int]] = {}  # Which file is there: its number, size and time.
        self._last = -math.inf
        self._thread: ThreadPoolExecutor | None = None
        self._sending: Future[None] | None = None
        self._is_told = False
        self._at_it = threading.Lock()

    def bring(self) -> None:
        """Brings the record of a run that goes on, where another machine went on with it since, or it is none of here.

        The rows of a machine on which the run did not go on have never happened, however many they are.

        Raises:
          StorageError: it can't be read.
        """
        names, directory = self._listed(), self._folder.directory
        there = _starts(self._store.get(RUN)) if RUN in names else []
        here = _starts((directory / RUN).read_bytes()) if (directory / RUN).exists() else []
        if there and here[:1] != there[:1] and (moved := self._folder.clear(None)) is not None:
            warn(f"{directory} had the record of another run than {self._store.address} has; it is kept in {moved}")
        for name in (RUN, LOG, RESULTS):
            if name in names and (here[: len(there)] != there or not (directory / name).exists()):
                self._folder.write(name, self._store.get(name))

    def clear(self) -> str | None:
        """Moves what is there of an earlier run below "before-1", and returns where; None if nothing would be missed.

        Raises:
          StorageError: it can't be moved.
        """
        names = self._listed()
        if came_to_nothing(names):
            self._store.delete(names)
            return None
        places = (f"before-{number}" for number in itertools.count(1))
        place = next(place for place in places if not self._store.listed(place))
        for name in names:
            self._store.copy(name, f"{place}/{name}")
        self._store.delete(names)
        return self._store.address / place

    def send(self) -> None:
        """Begins to send what has changed, and returns; unless it is still at it, or did so just now."""
        is_at_it = self._sending is not None and not self._sending.done()
        if is_at_it or time.monotonic() - self._last < _PAUSE:
            return
        self._last = time.monotonic()
        self._thread = self._thread or ThreadPoolExecutor(1, "functrain-record")
        self._sending = self._thread.submit(self._send)

    def sent(self) -> None:
        """Returns when all that is in the folder now is there, or was told not to be."""
        self._send()

    def close(self) -> None:
        """Sends what is left."""
        self.sent()
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = self._sending = None

    def _send(self) -> None:
        directory = self._folder.directory
        try:
            with self._at_it:
                for path in self._folder.files():
                    self._send_one(path, path.relative_to(directory).as_posix())
        except (StorageError, OSError) as error:
            if not self._is_told:
                self._is_told = True
                warn(f"the record can't be sent to {self._store.address}: {error}; the run goes on, and tries again")

    def _send_one(self, path: Path, name: str) -> None:
        with path.open("rb") as file:  # Another one may come into its place meanwhile, and a log grows.
            found = os.fstat(file.fileno())
            state = found.st_ino, found.st_size, found.st_mtime_ns
            if self._sent.get(name) != state:
                self._store.put(name, file.read(found.st_size))
                self._sent[name] = state

    def _listed(self) -> dict[str, int]:
        """The files of a record that are there, and how large they are."""
        found = self._store.listed()
        return {name: stat.size for name, stat in found.items() if any(fnmatch(name, each) for each in (LOG, *FILES))}


def _starts(written: bytes) -> list[float]:
    """When a run was started, each time: by the first it is known."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return [float(section["started"]) for section in json.loads(written)["sections"]]
    return []
