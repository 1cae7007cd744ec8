"""Where a checkpoint is before it is whole, and after it is wanted no more: a folder of our own beside the others.

A checkpoint is published by two renames, its folder's and then its manifest's, and removed by two, its manifest's and
then its folder's. A process that is killed between two leaves a checkpoint without a manifest, and the manifest here.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.durable import sync, sync_tree
from functrain.tree.warn import warn

OWN = ".functrain"
_TRIES, _PAUSE = 20, 0.02  # Seconds.


class Staging:
    """The folder of what is written, and of what is removed.

    Args:
      directory: of the checkpoints.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._written, self._removed = directory / OWN / "written", directory / OWN / "removed"

    def place(self, name: str) -> Path:
        """Where a checkpoint is written."""
        return self._written / name

    def open(self) -> None:
        """Makes the folder, and ends what a killed process had begun.

        Raises:
          OSError: the folder can't be made.
        """
        for folder in (self._written, self._removed):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            for name in _of_manifests(self._written):
                self._publish_manifest(name)
            for name in _of_manifests(self._removed):
                self._remove_folder(name)
            for left in (*self._written.iterdir(), *self._removed.iterdir()):
                _delete(left)
        except OSError as error:
            warn(f"what a killed process left in {self.directory} was not cleared: {error}")

    def close(self) -> None:
        """Removes the folder, if nothing is in it."""
        with contextlib.suppress(OSError):
            for folder in (self._written, self._removed, self._written.parent):
                folder.rmdir()

    def publish(self, name: str, summary: Mapping[str, Any]) -> None:
        """Has a written checkpoint be one of the directory, with a manifest, whatever happens from here on.

        Raises:
          OSError: it is not, or is not yet on the disk.
        """
        staged, checkpoint = self.place(name), self.directory / name
        sync_tree(staged)
        manifest.write(staged, summary)
        sync(self._written)
        staged.rename(checkpoint)
        try:
            sync(self.directory)
            manifest.path_of(staged).rename(manifest.path_of(checkpoint))
        except OSError:
            with contextlib.suppress(OSError):
                checkpoint.rename(staged)
            raise
        sync(self.directory)

    def remove(self, checkpoint: Path) -> None:
        """Removes a checkpoint; killed at any point, it leaves a whole one or none.

        Raises:
          OSError: it is not removed.
        """
        held = self._removed / manifest.path_of(checkpoint).name
        with contextlib.suppress(FileNotFoundError):
            manifest.path_of(checkpoint).rename(held)
        try:
            self._remove_folder(checkpoint.name)
        except OSError:
            with contextlib.suppress(OSError):
                held.rename(manifest.path_of(checkpoint))
            raise
        _delete(held)

    def clear(self) -> None:
        """Removes what there is of a checkpoint that could not be written."""
        with contextlib.suppress(OSError):  # It is tried again when the folder is opened.
            for _ in range(_TRIES):
                left = [*self._written.iterdir()]
                if not left:
                    return
                for path in left:
                    _delete(path)
                time.sleep(_PAUSE)  # Threads of a failed write add to it for a moment.

    def _publish_manifest(self, name: str) -> None:
        held, checkpoint = manifest.path_of(self.place(name)), self.directory / name
        if checkpoint.is_dir() and not manifest.path_of(checkpoint).exists():
            held.rename(manifest.path_of(checkpoint))

    def _remove_folder(self, name: str) -> None:
        removed, checkpoint = self._removed / name, self.directory / name
        _delete(removed)
        if checkpoint.is_dir() and not manifest.path_of(checkpoint).exists():
            checkpoint.rename(removed)
        _delete(removed)


def is_being_published(checkpoint: Path) -> bool:
    """Whether another process is about to give a checkpoint its manifest."""
    return manifest.path_of(Staging(checkpoint.parent).place(checkpoint.name)).exists()


def _of_manifests(folder: Path) -> list[str]:
    return [name.removesuffix(manifest.SUFFIX) for name in os.listdir(folder) if name.endswith(manifest.SUFFIX)]


def _delete(path: Path) -> None:
    """Removes a folder or a file, or what can be removed of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
