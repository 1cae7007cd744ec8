"""Where the files of a run are."""

import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.at_address import AddressFolder
from functrain.loop.checkpoint.contents import contents_file
from functrain.loop.checkpoint.folder import Folder, Name
from functrain.loop.checkpoint.places import folder_of as checkpoints_at
from functrain.loop.lines import LOG
from functrain.loop.record.files import FILES
from functrain.loop.record.place import folder_of, log_of
from functrain.loop.record.reading import read_run
from functrain.loop.remote.address import Address, is_address
from functrain.loop.remote.limits import Limits

_BY_CUSTOM = "checkpoints"
_LIMITS = Limits(request=10.0, patience=15.0)  # Of who waits for an answer.
_BROUGHT: list[str] = []  # Folders of what was brought from addresses.


class Place(NamedTuple):
    """The folder of a run, its checkpoints, and its log if there is one; of an address, what was brought of it here."""

    directory: Path
    folder: Folder
    log: Path | None
    address: str | None = None

    def said(self, text: str) -> str:
        """A text in which what was brought here is called by its address."""
        return text if self.address is None else text.replace(str(self.directory), self.address)


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


def meant(given: str) -> tuple[Folder, Path | None]:
    """The folder of checkpoints that is meant, and which of them, None for the newest sound one.

    Raises:
      CheckpointError: there are none.
      StorageError: an address that can't be read.
    """
    if not is_address(given):
        path = absolute(given)
        within = path.parent / _BY_CUSTOM / path.name  # Of a record, the checkpoints lie in a folder of theirs.
        path = within if not path.exists() and is_checkpoint(within) else path
        return (Folder(path.parent), path) if is_checkpoint(path) else (checkpoints_of(given), None)
    above, _, name = given.rstrip("/").rpartition("/")
    if Name.of(name) is not None and name in (folder := _checkpoints_at(above)).mirror.known:
        return folder, folder.directory / name
    if not (folder := _either(given)).mirror.known:
        raise CheckpointError(f"there is no checkpoint in {given}: give the address of a run, or of its checkpoints")
    return folder, None


def is_checkpoint(path: Path) -> bool:
    """Whether a path is one of a checkpoint rather than of a folder of them."""
    return contents_file(path).exists() or manifest.path_of(path).exists()


def absolute(path: str) -> Path:
    """A path from the root, without dots, so that it has a name."""
    return Path(os.path.abspath(path))


def forget() -> None:
    """Deletes what was brought from addresses."""
    while _BROUGHT:
        shutil.rmtree(_BROUGHT.pop(), ignore_errors=True)


def _at_address(run: str) -> Place:
    """The files of a run at an address: its record, and what its checkpoints say of themselves; no arrays."""
    folder = _either(run)
    run = run.rstrip("/")
    directory = folder.directory.parent if folder.where == f"{run}/{_BY_CUSTOM}" else folder.directory
    for name in folder.mirror.known:
        folder.mirror.brief(name, folder.directory)
    store = _checkpoints_at(run, directory).mirror.store
    for name, stat in store.listed().items():
        if any(fnmatch(name, pattern) for pattern in (LOG, *FILES)) and ".." not in name.split("/"):
            store.fetch(name, directory / name, stat.size)
    if not folder.mirror.known and not [*directory.iterdir()]:
        raise CheckpointError(f"there is neither a checkpoint nor a log in {run}: give the address of a run")
    return Place(directory, folder, log_of(directory, folder), run)


def _either(run: str) -> AddressFolder:
    """The checkpoints at an address, or those in `checkpoints/` of it."""
    here, run = _temporary(run), run.rstrip("/")
    folder = _checkpoints_at(run, here)
    if folder.mirror.known or run.endswith(f"/{_BY_CUSTOM}"):
        return folder
    within = _checkpoints_at(f"{run}/{_BY_CUSTOM}", here / _BY_CUSTOM)
    return within if within.mirror.known else folder


def _checkpoints_at(address: str, here: Path | None = None) -> AddressFolder:
    """The checkpoints at an address as they are now.

    Raises:
      StorageError: the address can't be read.
    """
    folder = checkpoints_at(address, here or _temporary(address), _LIMITS)
    assert isinstance(folder, AddressFolder)
    folder.look()
    if folder.mirror.known:
        folder.directory.mkdir(parents=True, exist_ok=True)
    return folder


def _temporary(address: str) -> Path:
    """A folder called as what lies at an address, which is deleted when the command ends."""
    name = str(Address.of(address)).rpartition("/")[2]
    root = tempfile.mkdtemp(prefix="functrain-")
    _BROUGHT.append(root)
    here = Path(root) / name
    here.mkdir()
    return here
