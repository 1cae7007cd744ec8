"""The checkpoints at an address, each with its place in a folder here, where it is brought when it is read."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from functrain.errors import CheckpointError, SaveError, StorageError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.folder import Entry, Folder, Name
from functrain.loop.checkpoint.housekeeping import move_to, set_aside
from functrain.loop.checkpoint.lock import Lock
from functrain.loop.checkpoint.mirror import Mirror
from functrain.loop.lines import LOG
from functrain.tree.text import listed
from functrain.tree.warn import warn


class AddressFolder(Folder):
    """A folder, and what lies at the address that it is the local side of.

    A checkpoint of the folder counts if it is one of the address, or may still be sent there: it was not sent, and the
    address has not gone on without it, as its newest one is here too. What is at the address wins over all others.

    Args:
      directory: the folder of this machine.
      mirror: what is at the address, as of its last look.
    """

    def __init__(self, directory: Path, mirror: Mirror) -> None:
        super().__init__(directory)
        self.mirror = mirror
        self._left: frozenset[str] = frozenset()  # Of the folder, what does not count.
        self._has_gone_on = False

    @property
    def where(self) -> str:
        """The address."""
        return str(self.mirror.store.address)

    def shown(self, checkpoint: Path) -> str:
        """The address of a checkpoint; of one that is only here, its folder."""
        is_there = checkpoint.parent == self.directory and checkpoint.name in self.mirror.known
        return self.mirror.store.address / checkpoint.name if is_there else str(checkpoint)

    def look(self) -> None:
        """Lists the address.

        Raises:
          StorageError: it can't be listed.
          CheckpointError: it is that of one checkpoint.
        """
        self.mirror.look()
        self._looked()

    def clear(self) -> None:
        """Lists the address, and ends there what a killed process had begun.

        Raises:
          StorageError: it can't be listed.
          CheckpointError: it is that of one checkpoint.
        """
        listing = self.mirror.look()
        try:
            self.mirror.clear(listing)
        except StorageError as error:
            warn(f"what a killed process left at {self.where} was not cleared: {error}")
        self._looked()

    def is_here(self, name: str) -> bool:
        """Whether a checkpoint of the address is in the folder too."""
        with contextlib.suppress(OSError):
            return manifest.path_of(self.directory / name).read_bytes() == self.mirror.known.get(name)
        return False

    def is_verified(self, checkpoint: Path) -> bool:
        """Whether there is a manifest of a checkpoint, here or at the address."""
        is_there = checkpoint.parent == self.directory and checkpoint.name in self.mirror.known
        return is_there or super().is_verified(checkpoint)

    def damage(self, checkpoint: Path) -> str | None:
        """As of a folder; what is only at the address, or sound only there, is brought here.

        Raises:
          OSError: it can't be read, or not be written here.
        """
        name = checkpoint.name
        if checkpoint.parent != self.directory or name not in self.mirror.known:
            return super().damage(checkpoint)
        if self.is_here(name):
            if (problem := super().damage(checkpoint)) is None:
                return None
            warn(f"the copy of {self.shown(checkpoint)} in {checkpoint} is damaged: {problem}; it is downloaded anew")
        if checkpoint.exists() or manifest.path_of(checkpoint).exists():
            set_aside(checkpoint)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._is_made and name == [*self.mirror.known][-1]:
            self._adopt_alone()
        problem = self.mirror.fetch(name, self.directory)
        if name not in self.mirror.known:  # Who writes has removed it, and has newer ones.
            self.look()
        return problem

    def damages(self, checkpoint: Path) -> list[str]:
        """As of a folder; what is at the address is read there, and not brought here."""
        if checkpoint.parent != self.directory or checkpoint.name not in self.mirror.known:
            return super().damages(checkpoint)
        return [*self.mirror.damages(checkpoint.name)]

    def unsent(self) -> list[str]:
        """The names of the checkpoints that are here and not at the address, oldest first."""
        entries = self._of_folder(self._here())
        return [entry.path.name for entry in entries if entry.is_verified and entry.path.name not in self.mirror.known]

    def local(self) -> list[str]:
        """The names of the checkpoints in the folder, oldest first."""
        return [entry.path.name for entry in super()._entries(self._here()) if entry.is_there]

    def adopt(self) -> None:
        """Has the folder go on from the address, where that has gone on: what is no part of it is moved aside.

        Raises:
          StorageError: the log at the address can't be read.
          SaveError, OSError: what is here can't be moved.
        """
        left, has_gone_on, log = sorted(self._left), self._has_gone_on, self.directory / LOG
        self._left, self._has_gone_on = frozenset(), False
        if left:
            aside = self.directory / self.mirror.free(self.directory)
            move_to(aside, [self.directory / name for name in left])
            if has_gone_on and log.exists():
                log.rename(aside / LOG)
            warn(
                f"{self.where} has gone on without what is in {self.directory}: what is at the address is gone on from,"
                f" and what was only here, {listed(left)}, is kept in {aside}"
            )
        if has_gone_on:
            self.mirror.file(LOG, log)

    def _adopt_alone(self) -> None:
        """As `adopt`, of who reads, where nobody here writes."""
        lock = Lock(self.directory)
        with contextlib.suppress(CheckpointError, SaveError):
            lock.acquire()
            try:
                self.adopt()
            finally:
                lock.release()

    def _listed(self) -> dict[str, bool]:
        return {**dict.fromkeys(self.mirror.taken, True), **self._here()}

    def _here(self) -> dict[str, bool]:
        """The names in the folder, which a machine that only reads may not have."""
        return super()._listed() if self._is_made or self.directory.exists() else {}

    def _entries(self, listed: Mapping[str, bool]) -> list[Entry]:
        found = {entry.path.name: entry for entry in self._of_folder(listed)}
        found |= {entry.path.name: entry for entry in self._of_address()}
        return sorted(found.values(), key=lambda entry: Name.of(entry.path.name) or Name(0, 0, 0))

    def _of_folder(self, names: Mapping[str, bool]) -> list[Entry]:
        return [entry for entry in super()._entries(names) if entry.path.name not in self._left]

    def _of_address(self) -> Iterator[Entry]:
        for name, written in self.mirror.known.items():
            path = self.directory / name
            try:
                said = manifest.parsed(written, name)
            except ValueError:
                yield Entry(path, True, True, {})
            else:
                yield Entry(path, True, True, said["metrics"], said["batches"], said["content"], said.get("best", {}))

    def _looked(self) -> None:
        """Finds what of the folder does not count."""
        known = self.mirror.known
        self._has_gone_on = bool(known) and not self.is_here([*known][-1])
        of_folder = [name for name in self.local() if self._has_gone_on or name in known]
        self._left = frozenset(name for name in of_folder if not self.is_here(name))
