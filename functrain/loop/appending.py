"""A file of records that is whole at any moment."""

import contextlib
import os
from pathlib import Path


class Appending:
    """A file to which a record is appended as a whole, or not at all; it is in the file when `append` returns.

    >>> import tempfile
    >>> file = Appending(Path(tempfile.mkdtemp()) / "records")
    >>> file.append(b"one, ")
    >>> file.append(b"two")
    >>> file.path.read_bytes()
    b'one, two'

    Args:
      path: the file; it is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Python's own buffer would write again, later, what a full disk did not take.
        self._file = path.open("ab", buffering=0)
        self._torn_at: int | None = None
        self._is_synced = True

    def append(self, record: bytes) -> None:
        """Writes a record; what is written of one that fails is cut off again.

        Raises:
          OSError: it could not be written.
        """
        self._mend()
        start = self._file.seek(0, os.SEEK_END)
        self._torn_at, self._is_synced = start, False
        try:
            while record:
                record = record[self._file.write(record) :]
        except BaseException:
            with contextlib.suppress(OSError):
                self._mend()
            raise
        self._torn_at = None

    def sync(self) -> None:
        """Returns when all of it is on disk."""
        if not self._is_synced:
            os.fsync(self._file.fileno())
            self._is_synced = True

    def close(self) -> None:
        """May be called twice."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._mend()
            self._file.close()

    def _mend(self) -> None:
        if self._torn_at is not None:
            self._file.truncate(self._torn_at)
            self._torn_at = None
