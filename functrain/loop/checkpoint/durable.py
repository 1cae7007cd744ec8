"""What is on the disk when a function returns, not only on its way there; and reads that are tried again."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

_Read = TypeVar("_Read")
_PAUSES = (0.05, 0.5)  # Seconds before a read is tried again.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, would be found again after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't sync a folder; what they say of a file is a failure.
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs all files of a folder, and then the folders, the innermost first."""
    for path in files_in(folder):
        sync(path)
    for parent, _, _ in os.walk(folder, topdown=False, onerror=_raised):
        sync(Path(parent))


def files_in(folder: Path) -> Iterator[Path]:
    """All files of a folder and the folders in it.

    Raises:
      OSError: a folder can't be listed.
    """
    for parent, _, names in os.walk(folder, onerror=_raised):
        yield from (Path(parent, name) for name in names)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is either not there or complete, and on the disk; until then it has a hidden name."""
    written = content if isinstance(content, bytes) else content.encode()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def insisted(read: Callable[[], _Read]) -> _Read:
    """What a function reads, which is tried again where the system says that it can't be read.

    Raises:
      OSError: it still says so.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError:
            time.sleep(pause)
    return read()


def _raised(error: OSError) -> None:
    raise error
