"""Where checkpoints lie on this machine: their folder, who may write to it, and what is done there beside writing."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from functrain.errors import CheckpointError, SaveError
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.checkpoint.housekeeping import move_all, retain, set_aside
from functrain.loop.checkpoint.lock import Lock
from functrain.loop.checkpoint.processes import found_by_first
from functrain.loop.checkpoint.retention import Retention
from functrain.loop.checkpoint.sending import Sender
from functrain.loop.checkpoint.staging import Staging


class Local:
    """A folder of checkpoints that one process at a time writes to.

    Args:
      folder: the checkpoints.
      retention: which are kept.
      lock: False for a file system without locks.

    Attributes:
      sender: what sends them elsewhere; None where they stay here.
      first: what is called before one is there; None for nothing.
    """

    sender: Sender | None = None
    first: Callable[[], None] | None = None

    def __init__(self, folder: Folder, retention: Retention, *, lock: bool) -> None:
        self.folder, self.retention = folder, retention
        self.staging, self._lock = Staging(folder.directory), Lock(folder.directory, wanted=lock)

    def open(self) -> None:
        """Makes the folder, keeps other processes from writing to it, and clears what a killed one left half done.

        Raises:
          CheckpointError: another process writes to it.
          SaveError: it can't be made or written to.
        """
        if jax.process_index() != 0:
            return
        try:
            self.folder.make()
            self._lock.acquire()
            self.staging.open()
        except OSError as error:
            self._lock.release()
            directory = self.folder.directory
            raise SaveError(f"the folder of checkpoints {directory} can't be written to: {error}") from error

    def close(self) -> None:
        """Lets others write to the folder; may be called twice."""
        if self._lock.is_held:
            self.staging.close()
        self._lock.release()

    def check(self) -> None:
        """Raises where this process may write there no more."""

    def look(self) -> None:
        """Finds out what others have written meanwhile, where that is not seen each time."""

    def saved(self, newest: str) -> None:
        """Does what there is to do when a checkpoint was written: removes what is no longer kept.

        Raises:
          CheckpointError: the folder can't be read.
        """
        retain(self.folder, self.staging, self.retention, newest)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While a checkpoint is read."""
        yield

    def set_aside(self, name: str) -> str:
        """Renames a damaged checkpoint, where nobody else writes; returns what it is called now."""
        was_held = self._lock.is_held
        with contextlib.suppress(CheckpointError, SaveError, OSError):
            if not was_held:
                Local.open(self)
            name = set_aside(self.folder.directory / name).name
        if not was_held:
            Local.close(self)
        return name

    def move_all(self) -> str | None:
        """Moves all checkpoints to a new folder; returns its name, None where there was nothing to move."""
        return found_by_first(lambda: move_all(self.folder))
