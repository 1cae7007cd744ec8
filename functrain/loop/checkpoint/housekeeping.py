"""What is renamed, moved and removed among the checkpoints of a folder."""

import contextlib
import itertools
from collections.abc import Iterable
from pathlib import Path

from functrain.errors import SaveError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.checkpoint.retention import Retention
from functrain.loop.checkpoint.staging import Staging
from functrain.tree.warn import warn


def retain(folder: Folder, staging: Staging, retention: Retention, newest: str) -> None:
    """Removes what is no longer kept; what can't be removed is told.

    Args:
      folder: the checkpoints.
      staging: what removes them.
      retention: which are kept.
      newest: the one that was just written.

    Raises:
      CheckpointError: the folder can't be read.
    """
    entries = [entry for entry in folder.entries() if entry.is_there]
    verified = [entry.path.name for entry in entries if entry.is_verified]
    kept = retention.kept({entry.path.name: entry.metrics for entry in entries})
    kept |= {newest, *verified[-retention.last :]}
    for entry in entries:
        if entry.path.name not in kept:
            try:
                staging.remove(entry.path)
            except OSError as error:
                warn(f"the checkpoint {entry.path} could not be removed: {error}")


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint to 'N.corrupt', and its manifest with it; returns what it is called now.

    Raises:
      OSError: it can't be renamed.
    """
    aside, count = checkpoint.with_name(f"{checkpoint.name}.corrupt"), 1
    while aside.exists() or manifest.path_of(aside).exists():
        count += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.corrupt{count}")
    _move(checkpoint, aside)
    return aside


def move_all(folder: Folder) -> str | None:
    """Moves all checkpoints, and those that were set aside, to a new folder "before-1"; None where there are none.

    Raises:
      CheckpointError: the folder can't be read.
      SaveError: one can't be moved.
    """
    names = [entry.path.name for entry in folder.entries()] + folder.corrupt()
    if not names:
        return None
    places = (folder.directory / f"before-{number}" for number in itertools.count(1))
    place = next(place for place in places if not place.exists())
    return move_to(place, [folder.directory / name for name in names]).name


def move_to(place: Path, checkpoints: Iterable[Path]) -> Path:
    """Moves checkpoints to a new folder; returns it.

    Raises:
      SaveError: one can't be moved.
    """
    try:
        place.mkdir()
        for checkpoint in checkpoints:
            _move(checkpoint, place / checkpoint.name)
    except OSError as error:
        raise SaveError(f"the checkpoints in {place.parent} can't be moved aside: {error}") from error
    return place


def _move(checkpoint: Path, to: Path) -> None:
    # The folder first: killed between the two, no damaged folder is left that has no manifest to tell.
    for before, after in ((checkpoint, to), (manifest.path_of(checkpoint), manifest.path_of(to))):
        with contextlib.suppress(FileNotFoundError):
            before.rename(after)
