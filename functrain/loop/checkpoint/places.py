"""Which checkpoints are meant: those in a folder of this machine, or at an address."""

import os
from pathlib import Path

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.at_address import AddressFolder
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.checkpoint.mirror import Mirror
from functrain.loop.remote.address import Address, cache_of, is_address
from functrain.loop.remote.limits import Limits
from functrain.loop.remote.store import Store


def folder_of(
    directory: str | os.PathLike[str], staging: str | os.PathLike[str] | None = None, limits: Limits | None = None
) -> Folder:
    """The checkpoints in a folder, or at an address, which is not asked before `look`.

    Args:
      directory: a folder, or an address.
      staging: of an address, the folder here; by default one in the user's cache.
      limits: of an address.

    Raises:
      StorageError: an address that is none, or obstore is not installed.
      CheckpointError: a file, or options of an address for a folder.
    """
    if not is_address(directory):
        if staging is not None or limits is not None:
            raise CheckpointError(
                f"staging= and limits= are for an address such as 's3://bucket/digits', and {os.fspath(directory)!r} is"
                " a folder: leave them out"
            )
        return Folder(Path(directory).expanduser().absolute())
    limits = limits or Limits()
    address = Address.of(os.fspath(directory))
    store = Store(str(address), timeout=limits.request, patience=limits.patience)
    here = cache_of(address) if staging is None else Path(staging).expanduser().absolute()
    return AddressFolder(here, Mirror(store))
