"""One process at a time writes to a folder of checkpoints."""

import fcntl
from pathlib import Path
from typing import Any

from functrain.errors import CheckpointError, SaveError


class Lock:
    """A lock on a directory, which the system takes back from a process that is killed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: Any = None

    @property
    def is_held(self) -> bool:
        """Whether this process has it."""
        return self._file is not None

    def acquire(self) -> None:
        """Takes the lock, and makes the directory.

        Raises:
          CheckpointError: another process has it.
          SaveError: the directory can't be made or written to.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            file = (self._directory / ".lock").open("w")
        except OSError as error:
            raise SaveError(f"the folder of checkpoints {self._directory} can't be written to: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CheckpointError(
                f"another process writes checkpoints to {self._directory}: wait for it or stop it, or give this run"
                " a folder of its own"
            ) from None
        self._file = file

    def release(self) -> None:
        """Lets others have it; may be called twice."""
        if self._file is not None:
            self._file.close()
        self._file = None
