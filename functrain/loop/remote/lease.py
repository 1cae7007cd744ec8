"""One process at a time writes to an address: a lease that is renewed, and that is taken over when it is not."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from functrain.errors import CheckpointError, StorageError
from functrain.loop.remote.store import Store

_BEATS = 4  # In the time of a lease.
_LOOKS = 8
_SKEW = 900.0  # Seconds by which clocks differ at most: S3 refuses requests of more.


class Lease:
    """The right to write to an address, in an object that its owner renews while it lives.

    Clocks are not compared: an owner is dead whose object has not changed for the time of the lease, as this process
    sees it, or for much longer than clocks differ. Every change replaces what was read and nothing else.

    Args:
      store: the address.
      seconds: of a lease.
      home: what tells the folder of this machine from others; of the processes with one home there is one at a time.
      tell: is told that there is something to wait for.
    """

    def __init__(self, store: Store, seconds: float, home: str, tell: Callable[[str], None]) -> None:
        self._store, self._seconds, self._home, self._tell = store, seconds, home, tell
        self._name, self._owner, self._beats = ".functrain/lease.json", uuid.uuid4().hex, 0
        self._tag: str | None = None
        self._renewed, self._is_lost = 0.0, False
        self._ended, self._changing = threading.Event(), threading.Lock()

    @property
    def is_held(self) -> bool:
        """Whether this process has it, as far as it knows."""
        return self._tag is not None and not self._is_lost

    def acquire(self) -> None:
        """Takes the lease, and renews it from here on.

        Raises:
          CheckpointError: another process has it, and lives.
          StorageError: it can't be told.
        """
        while not self.is_held:
            found, tag = self._found()
            if tag is None or self._may_take(found) or self._is_dead(found, tag):
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    self._put(replaces=tag)
        self._ended = threading.Event()
        threading.Thread(target=self._renew, args=[self._ended], name="functrain-lease", daemon=True).start()

    def check(self) -> None:
        """Raises where another process has taken the lease over.

        Raises:
          CheckpointError: it has.
          StorageError: it can't be told.
        """
        if time.monotonic() - self._renewed > self._seconds / 2:
            self._beat()
        if not self.is_held:
            raise CheckpointError(
                f"another process writes checkpoints to {self._store.address}, and took over as this one was not heard"
                f" of for {self._seconds:g} s: stop one of them, or give this run an address of its own"
            )

    def release(self) -> None:
        """Lets others have it; may be called twice."""
        self._ended.set()
        with self._changing, contextlib.suppress(FileExistsError, FileNotFoundError, StorageError):
            if self.is_held:
                self._put(replaces=self._tag, is_over=True)
        self._tag, self._is_lost = None, False

    def _found(self) -> tuple[dict[str, Any], str | None]:
        """What the object says and its tag; None where there is none."""
        stat = self._store.head(self._name)
        if stat is None:
            return {}, None
        try:
            found = json.loads(self._store.get(self._name))
        except (FileNotFoundError, ValueError):
            found = {}
        found = found if isinstance(found, dict) else {}
        return {**found, "age": time.time() - stat.time}, stat.tag

    def _may_take(self, found: dict[str, Any]) -> bool:
        is_over = found.get("owner") is None
        return is_over or found.get("home") == self._home or found["age"] > self._seconds + _SKEW

    def _is_dead(self, found: dict[str, Any], tag: str) -> bool:
        """Whether nothing is heard of an owner for the time of a lease; False where it has let go meanwhile.

        Raises:
          CheckpointError: it lives.
        """
        who = f"process {found.get('process')} on {found.get('host')!r}"
        self._tell(
            f"{who} wrote checkpoints to {self._store.address}: if it is not heard of within {self._seconds:g} s, its"
            " place is taken"
        )
        until = time.monotonic() + self._seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, self._seconds / _LOOKS))
            now = self._store.head(self._name)
            if now is not None and now.tag == tag:
                continue
            if self._found()[0].get("owner") is None:
                return False
            raise CheckpointError(
                f"another process writes checkpoints to {self._store.address}, {who}: wait for it or stop it, or give"
                " this run an address of its own"
            )
        return True

    def _is_made_again(self) -> bool:
        """Whether the lease was deleted by somebody, and is ours again."""
        try:
            if self._store.head(self._name) is None:
                self._put(replaces=None)
                return True
        except FileExistsError:
            pass
        return False

    def _put(self, *, replaces: str | None, is_over: bool = False) -> None:
        self._beats += 1  # Two objects of the same content have the same tag.
        said = {
            "owner": None if is_over else self._owner,
            "last": self._owner,
            "beats": self._beats,
            "home": self._home,
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        written = json.dumps(said).encode()
        self._tag = self._store.put(self._name, written, create=replaces is None, replaces=replaces)
        self._renewed = time.monotonic()

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(self._seconds / _BEATS):
            with contextlib.suppress(StorageError):  # Who needs it asks for it: `check`.
                self._beat()
            if not self.is_held:
                return

    def _beat(self) -> None:
        with self._changing:
            if not self.is_held or self._ended.is_set():
                return
            try:
                self._put(replaces=self._tag)
            except (FileExistsError, FileNotFoundError):
                self._is_lost = not self._is_made_again()
