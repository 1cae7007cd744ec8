"""Where checkpoints lie that are sent to an address: the folder here that they are written to, and the address."""

import contextlib
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from functrain.errors import SaveError, StorageError
from functrain.loop.checkpoint.at_address import AddressFolder
from functrain.loop.checkpoint.housekeeping import move_to
from functrain.loop.checkpoint.local import Local
from functrain.loop.checkpoint.places import folder_of
from functrain.loop.checkpoint.processes import check_shared, found_by_first
from functrain.loop.checkpoint.retention import Retention
from functrain.loop.checkpoint.sending import Sender
from functrain.loop.checkpoint.staging import OWN
from functrain.loop.lines import LOG
from functrain.loop.remote.lease import Lease
from functrain.loop.remote.limits import Limits
from functrain.tree.warn import warn

_STALE = 86_400.0  # Seconds after which nobody downloads any more what was begun.


def place_of(
    directory: str | os.PathLike[str],
    retention: Retention,
    *,
    lock: bool,
    staging: str | os.PathLike[str] | None,
    limits: Limits | None,
) -> Local:
    """Where checkpoints are written to, here or at an address.

    Raises:
      StorageError, CheckpointError: as of `folder_of`.
    """
    folder = folder_of(directory, staging, limits)
    if isinstance(folder, AddressFolder):
        return Remote(folder, retention, lock=lock, lease=(limits or Limits()).lease)
    return Local(folder, retention, lock=lock)


class Remote(Local):
    """A folder of this machine, and the address that what is written to it is sent to.

    Here the newest checkpoint is kept, and what could not be sent yet. What is kept at the address is what a folder
    would keep; it is removed there when all that is kept has been sent.

    Args:
      folder: the checkpoints at the address.
      retention: which are kept.
      lock: False for a file system without locks.
      lease: seconds after which a process that wrote there, and is not heard of, counts as dead.
    """

    def __init__(self, folder: AddressFolder, retention: Retention, *, lock: bool, lease: float) -> None:
        super().__init__(folder, retention, lock=lock)
        self.folder: AddressFolder = folder
        self.sender: Sender = Sender(self._send)
        self._has_lock, self._seconds = lock, lease
        self._lease: Lease | None = None
        self._removing, self._at_address = threading.RLock(), threading.Lock()
        self._sending: set[str] = set()
        self._damaged: set[str] = set()
        self._newest: str | None = None

    def open(self) -> None:
        """As of a folder; takes the lease, and brings the two together.

        Raises:
          StorageError: the address can't be read or written to.
          CheckpointError: another process writes there.
          SaveError: the folder can't be made or written to.
        """
        super().open()
        try:
            found_by_first(self._open)
            check_shared(self.folder.directory)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """As of a folder; gives the lease back."""
        if self._lease is not None:
            self._lease.release()
        self._lease, self._newest = None, None
        super().close()

    def check(self) -> None:
        """Raises where this process may write there no more.

        Raises:
          CheckpointError: another process has taken over.
        """
        if self._lease is not None and not self._lease.is_held:
            self._lease.check()

    def look(self) -> None:
        """Lists the address; who writes there knows what is there.

        Raises:
          StorageError: it can't be listed.
          CheckpointError: it is that of one checkpoint.
        """
        if self._lease is None:
            self.folder.look()

    def saved(self, newest: str) -> None:
        """Has a checkpoint be sent, and removes here what is there already."""
        self._newest = newest
        self._prune()
        self.sender.ask()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While a checkpoint is read nothing is removed here."""
        with self._removing:
            yield

    def set_aside(self, name: str) -> str:
        """Leaves a checkpoint that is damaged at the address as it is; one that is only here is renamed."""
        if name in self.folder.mirror.known:
            self._damaged.add(name)
            return self.folder.mirror.store.address / name
        return super().set_aside(name)

    def move_all(self) -> str | None:
        """Moves all checkpoints, at the address and here, and the log with them."""
        return found_by_first(self._move_all)

    def _open(self) -> None:
        directory = self.folder.directory
        self._lease = Lease(self.folder.mirror.store, self._seconds, self._home(), warn)
        self._lease.acquire()
        self.folder.clear()
        self.folder.adopt()
        if not self.folder.mirror.known and (here := self.folder.unsent()):
            warn(f"{self.folder.where} has no checkpoint; {here[-1]!r} in {directory} was not sent, and is sent now")
        for fetched in (directory / OWN / "fetched").glob("*"):
            if fetched.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(fetched, ignore_errors=True)
        if self.folder.unsent():
            self.sender.ask()

    def _home(self) -> str:
        """What tells this folder from those of other machines; of those who have locked it there is one."""
        if not self._has_lock:
            return uuid.uuid4().hex
        file = self.folder.directory / ".home"
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        return f"{file.read_text()}@{socket.gethostname()}"

    def _send(self) -> None:
        """Sends what is kept, the newest first, and then removes what is not.

        Raises:
          SaveError: something of it failed.
        """
        mirror, name = self.folder.mirror, ""
        try:
            with self._at_address:
                assert self._lease is not None
                self._lease.check()
                with self._removing:
                    kept = self._kept()
                    todo = [name for name in reversed(self.folder.unsent()) if name in kept]
                    self._sending = {*todo}
                if todo and (log := self.folder.directory / LOG).exists():
                    mirror.store.put(LOG, log.read_bytes())
                if todo and self.first is not None:
                    self.first()
                for name in todo:
                    mirror.send(self.folder.directory / name)
                if self._newest is not None:
                    self._remove()
        except Exception as error:
            what = f"the checkpoint {name!r}" if name else "what there is to send"
            raise SaveError(
                f"{what} could not be sent to {self.folder.where}: {error}; it is kept in {self.folder.directory}, and"
                " is sent again while the run goes on, and at the next start here"
            ) from error
        finally:
            self._sending = set()
            if self._newest is not None:
                self._prune()

    def _kept(self) -> set[str]:
        """The names of those that are kept: at the address, or on their way there."""
        metrics = {name: each for name, each in self.folder.metrics().items() if name not in self._damaged}
        return self.retention.kept(metrics) | ({self._newest} if self._newest else set())

    def _remove(self) -> None:
        kept = self._kept() | self._damaged
        for name in [name for name in self.folder.mirror.removable() if name not in kept]:
            try:
                self.folder.mirror.remove(name)
            except StorageError as error:
                warn(f"the checkpoint {self.folder.mirror.store.address / name} could not be removed: {error}")

    def _prune(self) -> None:
        """Removes here what is at the address or no longer kept, but for the newest of both."""
        with self._removing:
            here, kept = self.folder.local(), self._kept()
            kept = {name for name in kept if name not in self.folder.mirror.known}
            kept |= {self._newest or "", *[name for name in here if self.folder.is_here(name)][-1:], *self._sending}
            for name in [name for name in here if name not in kept]:
                try:
                    self.staging.remove(self.folder.directory / name)
                except OSError as error:
                    warn(f"the checkpoint {self.folder.directory / name} could not be removed: {error}")

    def _move_all(self) -> str | None:
        mirror, directory = self.folder.mirror, self.folder.directory
        here = [*self.folder.local(), *self.folder.corrupt()]
        if not mirror.known and not here:
            return None
        to = mirror.free(directory)
        try:
            with self._at_address:
                mirror.move_all(to, LOG)
        except OSError as error:
            raise SaveError(f"the checkpoints at {self.folder.where} can't be moved aside: {error}") from error
        move_to(directory / to, [directory / name for name in here])
        self._damaged.clear()
        return to
