"""One process at a time writes to a folder of checkpoints."""

import errno
import fcntl
import os
import weakref
from pathlib import Path

from functrain.errors import CheckpointError, SaveError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """A lock on a directory, which the system takes back from a process that is killed.

    Args:
      directory: where.
      wanted: False for a file system without locks: nothing is locked, and the caller knows that nobody else writes.
      name: of the file that is locked.
      what: is written there, for messages.
    """

    def __init__(self, directory: Path, *, wanted: bool = True, name: str = ".lock", what: str = "checkpoints") -> None:
        self._directory, self._wanted, self._name, self._what = directory, wanted, name, what
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process has it."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Takes the lock, and makes the directory.

        Raises:
          CheckpointError: another process has it, or there are no locks here.
          SaveError: the directory can't be made or written to.
        """
        path = self._directory / self._name
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Nothing is written to it, and a link of that name leads to somebody's file.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(f"{path} is a link: remove it, or give this run a folder of its own") from None
            raise SaveError(f"the folder of {self._what} {self._directory} can't be written to: {error}") from error
        if self._wanted:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                raise self._refused(error) from None
        self._descriptor = descriptor
        _HELD.add(self)

    def release(self) -> None:
        """Lets others have it; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _refused(self, error: OSError) -> CheckpointError | SaveError:
        if isinstance(error, BlockingIOError):
            return CheckpointError(
                f"another process writes {self._what} to {self._directory}: wait for it or stop it, or give this run"
                " a folder of its own"
            )
        if error.errno in _NO_LOCKS:
            return CheckpointError(
                f"the file system of {self._directory} has no locks ({error}), which keep two processes from writing"
                " there: see to it that only one does, and write Checkpoints(..., lock=False)"
            )
        return SaveError(f"the folder of {self._what} {self._directory} can't be locked: {error}")


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_all() -> None:
    for lock in list(_HELD):
        lock.release()


# A child shares its parent's lock, and would keep it when the parent is killed.
os.register_at_fork(after_in_child=_release_all)
