"""Where the files of a run are."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.at_address import AddressFolder
from functrain.loop.checkpoint.contents import contents_file
from functrain.loop.checkpoint.folder import Folder, Name
from functrain.loop.checkpoint.places import folder_of
from functrain.loop.lines import LOG
from functrain.loop.remote.address import is_address


class Place(NamedTuple):
    """What is in the folder of a run: its checkpoints, and its log if there is one; where that is, for a message."""

    folder: Folder
    log: Path | None
    shown_log: str | None


def place_of(run: str) -> Place:
    """Finds the files of a run, in its folder or with the checkpoints in `checkpoints/` of it.

    Raises:
      CheckpointError: there is no such folder, or it is a checkpoint or a file.
      StorageError: an address that can't be read.
    """
    if is_address(run):
        return _at_address(run)
    path = absolute(run)
    if not path.exists():
        raise CheckpointError(f"there is no folder {run}: give that of a run, or of its checkpoints")
    folder, within = Folder(path), Folder(path / "checkpoints")
    if within.directory.is_dir() and not folder.entries():
        folder = within
    log = next((each / LOG for each in (path, folder.directory) if (each / LOG).is_file()), None)
    return Place(folder, log, None if log is None else str(log))


def _at_address(run: str) -> Place:
    """The files of a run at an address: its log and what its checkpoints say of themselves, without their arrays."""
    above = folder = address_folder(run)
    if not folder.mirror.known and not folder.mirror.store.address.prefix.endswith("checkpoints"):
        within = address_folder(f"{run.rstrip('/')}/checkpoints")
        folder = within if within.mirror.known else folder
    for name in folder.mirror.known:
        folder.mirror.brief(name, folder.directory)
    having = (each for each in (above, folder) if each.mirror.file(LOG, each.directory / LOG))
    if (logged := next(having, None)) is None:
        return Place(folder, None, None)
    return Place(folder, logged.directory / LOG, f"{logged.where}/{LOG}")


def address_folder(address: str) -> AddressFolder:
    """The checkpoints at an address as they are now; what is brought here is deleted when the command ends.

    Raises:
      StorageError: the address can't be read.
    """
    here = tempfile.mkdtemp(prefix="functrain-")
    atexit.register(shutil.rmtree, here, ignore_errors=True)
    folder = folder_of(address, here)
    assert isinstance(folder, AddressFolder)
    folder.look()
    return folder


def meant(given: str) -> tuple[Folder, Path | None]:
    """The folder of checkpoints that is meant, and which of them, None for the newest sound one.

    Raises:
      CheckpointError: there are none.
      StorageError: an address that can't be read.
    """
    if is_address(given):
        above, _, name = given.rstrip("/").rpartition("/")
        if Name.of(name) is not None and name in (folder := address_folder(above)).mirror.known:
            return folder, folder.directory / name
        folder = address_folder(given)
        if not folder.mirror.known:
            folder = address_folder(f"{given.rstrip('/')}/checkpoints")
        if not folder.mirror.known:
            raise CheckpointError(
                f"there is no checkpoint in {given}: give the address of a run, or of its checkpoints"
            )
        return folder, None
    path = absolute(given)
    return (Folder(path.parent), path) if is_checkpoint(path) else (checkpoints_of(given), None)


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
