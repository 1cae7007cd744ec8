"""Folders by names that Orbax can read: it takes a path for a pattern."""

import re
import tempfile
from pathlib import Path

from functrain.errors import CheckpointError

_PLAIN = re.compile(r"[\w./+~=,@: -]*")


class PlainPaths:
    """Gives a folder of any name another one, a link in the system's folder for temporary files.

    >>> paths = PlainPaths()
    >>> paths.of(Path("/runs/width=64/120"))
    PosixPath('/runs/width=64/120')
    >>> paths.of(Path("/runs/layers=[64,64]/120")).name
    '120'
    >>> paths.close()
    """

    def __init__(self) -> None:
        self._links: dict[Path, tempfile.TemporaryDirectory[str]] = {}

    def of(self, path: Path) -> Path:
        """A path whose folders have plain names only, and that leads to the same place, until `close`.

        Raises:
          CheckpointError: the folder for temporary files has no plain name either.
        """
        if is_plain(path):
            return path
        if path.parent not in self._links:
            place = tempfile.TemporaryDirectory(prefix="functrain-")
            if not is_plain(Path(place.name)):
                raise CheckpointError(
                    f"neither {str(path.parent)!r} nor the folder for temporary files, {place.name!r}, has a name that"
                    " Orbax can read: set TMPDIR to one of letters and digits, or give the checkpoints such a folder"
                )
            self._links[path.parent] = place
            Path(place.name, "folder").symlink_to(path.parent, target_is_directory=True)
        return Path(self._links[path.parent].name, "folder", path.name)

    def close(self) -> None:
        """Removes the links."""
        for place in self._links.values():
            place.cleanup()
        self._links = {}


def is_plain(path: Path) -> bool:
    """Whether no part of a path means something to a pattern or an address."""
    return _PLAIN.fullmatch(str(path)) is not None
