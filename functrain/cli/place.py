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
from functrain.loop.checkpoint.places import folder_of as folder_at
from functrain.loop.lines import LOG
from functrain.loop.record.files import RESULTS, RESULTS_FOLDER, RUN
from functrain.loop.record.place import folder_of, log_of
from functrain.loop.record.reading import read_run
from functrain.loop.remote.address import is_address

_BY_CUSTOM = "checkpoints"


class Place(NamedTuple):
    """The folder of a run, its checkpoints, and its log if there is one; where that is, for messages.

    Of a run at an address, the folder is one here to which its files were brought, without the arrays of checkpoints.
    """

    directory: Path
    folder: Folder
    log: Path | None
    shown_log: str | None
    address: str | None = None


def place_of(run: str) -> Place:
    """Finds the files of a run, in its folder or where its record says.

    Raises:
      CheckpointError: there is no such folder, or it is a checkpoint or a file.
      StorageError: an address that can't be read.
    """
    if is_address(run):
        return _at_address(run)
    path = absolute(run)
    if not path.exists():
        raise CheckpointError(f"there is no folder {run}: give that of a run, or of its checkpoints")
    recorded = read_run(path, [])
    folder = folder_of(path, None if recorded is None else recorded.checkpoints)
    log = log_of(path, folder)
    return Place(path, folder, log, None if log is None else str(log))


def _at_address(run: str) -> Place:
    """The files of a run at an address: its record, and what its checkpoints say of themselves."""
    above = folder = address_folder(run)
    store, directory = above.mirror.store, above.directory
    brought = [name for name in store.listed() if name in (RUN, RESULTS) or name.startswith(f"{RESULTS_FOLDER}/")]
    for name in brought:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(store.get(name))
    recorded = read_run(directory, []) if RUN in brought else None
    said = None if recorded is None else recorded.checkpoints
    if not above.mirror.known and not store.address.prefix.endswith(_BY_CUSTOM):
        other = said if said is not None and is_address(said) else f"{run.rstrip('/')}/{_BY_CUSTOM}"
        within = address_folder(other, directory / _BY_CUSTOM)
        folder = within if within.mirror.known else above
    for name in folder.mirror.known:
        folder.mirror.brief(name, folder.directory)
    having = (each for each in (above, folder) if each.mirror.file(LOG, each.directory / LOG))
    logged = next(having, None)
    if logged is None and not brought and not folder.mirror.known:
        raise CheckpointError(f"there is neither a checkpoint nor a log in {run}: give the address of a run")
    if logged is None:
        return Place(directory, folder, None, None, run)
    return Place(directory, folder, logged.directory / LOG, f"{logged.where}/{LOG}", run)


def address_folder(address: str, here: Path | None = None) -> AddressFolder:
    """The checkpoints at an address as they are now; what is brought here is deleted when the command ends.

    Raises:
      StorageError: the address can't be read.
    """
    if here is None:
        here = Path(tempfile.mkdtemp(prefix="functrain-"))
        atexit.register(shutil.rmtree, here, ignore_errors=True)
    here.mkdir(exist_ok=True)
    folder = folder_at(address, here)
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
