"""Where the files of a run are."""

import os
from pathlib import Path
from typing import NamedTuple

from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.contents import contents_file
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.record.place import folder_of, log_of
from functrain.loop.record.reading import read_run


class Place(NamedTuple):
    """The folder of a run, its checkpoints, and its log if there is one."""

    directory: Path
    folder: Folder
    log: Path | None


def place_of(run: str) -> Place:
    """Finds the files of a run, in its folder or where its record says.

    Raises:
      CheckpointError: there is no such folder, or it is a checkpoint or a file.
    """
    path = absolute(run)
    if not path.exists():
        raise CheckpointError(f"there is no folder {run}: give that of a run, or of its checkpoints")
    recorded = read_run(path, [])
    folder = folder_of(path, None if recorded is None else recorded.checkpoints)
    return Place(path, folder, log_of(path, folder))


def checkpoints_of(run: str) -> Folder:
    """The folder of checkpoints, in which there are some.

    Raises:
      CheckpointError: there are none.
    """
    folder = place_of(run).folder
    if not folder.entries() and not folder.corrupt():
        raise CheckpointError(f"there is no checkpoint in {run}: give the folder of a run, or of its checkpoints")
    return folder


def is_checkpoint(path: Path) -> bool:
    """Whether a path is one of a checkpoint rather than of a folder of them."""
    return contents_file(path).exists() or manifest.path_of(path).exists()


def absolute(path: str) -> Path:
    """A path from the root, without dots, so that it has a name."""
    return Path(os.path.abspath(path))
