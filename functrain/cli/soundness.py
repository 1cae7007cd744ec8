"""Whether checkpoints are what was written."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.folder import Entry, Folder
from functrain.loop.checkpoint.staging import is_being_published


class Look(NamedTuple):
    """What a look at a checkpoint found.

    Attributes:
      entry: the checkpoint.
      state: "unverified" has no checksums, and "unreadable" is no damage.
      problems: file by file.
    """

    entry: Entry
    state: Literal["sound", "damaged", "unverified", "unreadable"]
    problems: list[str]


def looks(folder: Folder) -> Iterator[Look]:
    """Looks at each checkpoint, oldest first; one that its run removes or publishes just then is left out."""
    for entry in folder.entries():
        if not entry.is_verified:
            if entry.path.exists() and not is_being_published(entry.path) and not manifest.path_of(entry.path).exists():
                yield Look(entry, "unverified", ["it has no manifest of checksums"])
            continue
        try:
            problems = folder.damages(entry.path)
        except OSError as error:
            yield Look(entry, "unreadable", [f"it can't be read: {error}"])
            continue
        if not problems:
            yield Look(entry, "sound", [])
        elif folder.is_verified(entry.path):
            yield Look(entry, "damaged", problems)
