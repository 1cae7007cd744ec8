"""Where the files of a run are, in its folder or where its record says."""

from pathlib import Path

from functrain.loop.checkpoint.contents import contents_file
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.lines import LOG

_BY_CUSTOM = "checkpoints"  # Where they lie in the folder of a record.


def folder_of(directory: Path, said: str | None) -> Folder:
    """The folder of a run's checkpoints: where its record says, the run's own, or the one in it.

    Args:
      directory: of the run.
      said: what its record says, relative to it; None without a record.

    Raises:
      CheckpointError: it is a checkpoint or a file.
    """
    own, within = Folder(directory), directory / _BY_CUSTOM
    if said is not None and (elsewhere := _local(directory, said)) is not None:
        return Folder(elsewhere)
    return Folder(within) if within.is_dir() and not own.entries() else own


def log_of(directory: Path, folder: Folder) -> Path | None:
    """The log of a run, in its folder or with its checkpoints; None if there is none."""
    return next((each / LOG for each in (directory, folder.directory) if (each / LOG).is_file()), None)


def _local(directory: Path, said: str) -> Path | None:
    """A folder of checkpoints that a record names, if there is one on this machine."""
    try:
        path = directory / Path(said).expanduser()
        return path if path.is_dir() and not contents_file(path).exists() else None
    except (OSError, ValueError, RuntimeError):
        return None
