"""Which checkpoint to go on from: the newest that is what was written."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.folder import Entry, Folder
from functrain.loop.checkpoint.processes import found_by_first
from functrain.loop.checkpoint.staging import is_being_published
from functrain.tree.text import listed, listed_lines

_Read = TypeVar("_Read")
_LOOKS = 1000
_MOMENTS, _MOMENT = 50, 0.01  # Looks at one that is being published, as it seems, and seconds between them.


class Finder:
    """Finds a checkpoint, and has it read.

    Only what was read and is wrong is damage. What can't be read is an error, and is left as it is. A checkpoint
    without a manifest is used only where none has one.

    Args:
      folder: where.
      set_aside: renames one that is damaged, and returns what it is called then.

    Attributes:
      told: what there is to warn of.
    """

    def __init__(self, folder: Folder, set_aside: Callable[[Path], str]) -> None:
        self.told: list[str] = []
        self._folder, self._set_aside = folder, set_aside
        self._problems: dict[str, str] = {}  # Of those that were set aside, by name.
        self._unreadable: dict[Path, str] = {}  # Of those without a manifest.

    def found(self, step: int | Path | None, read: Callable[[Path], _Read]) -> _Read | None:
        """What is read of the newest sound checkpoint, or of the one of a step; None where there never was one.

        Raises:
          CheckpointError: there are or were checkpoints and none is sound, the one asked for is not, one can't be
            read, or does not fit.
        """
        while (checkpoint := self._agreed(step)) is not None:
            try:
                return _read_twice(read, checkpoint)
            except CheckpointError:
                raise
            except Exception as error:
                if self._folder.is_verified(checkpoint):
                    raise CheckpointError(
                        f"the checkpoint {self._folder.shown(checkpoint)} is what was written, and yet can't be read:"
                        f" {error}; nothing was changed: start again, or restore another one, step="
                    ) from error
                self._unreadable[checkpoint] = f"it has no manifest, and cannot be read: {error}"
        return None

    def _agreed(self, step: int | Path | None) -> Path | None:
        """The checkpoint to read, in every process that which the first one finds."""

        def find() -> str | None:
            found = self._newest() if step is None else self._asked_for(step)
            return None if found is None else str(found)

        path = found_by_first(find)
        return None if path is None else Path(path)

    def _asked_for(self, step: int | Path) -> Path:
        checkpoint = self._folder.asked_for(step)
        if problem := self._damage(checkpoint) or self._unreadable.get(checkpoint):
            raise CheckpointError(
                f"the checkpoint {self._folder.shown(checkpoint)} is damaged: {problem}; restore another of"
                f" {self._folder.names()}"
            )
        if not self._folder.is_verified(checkpoint):
            self.told.append(f"the checkpoint {checkpoint} is unverified: it has no manifest of checksums")
        return checkpoint

    def _newest(self) -> Path | None:
        is_empty = False
        for look in range(_LOOKS):
            entries = self._folder.entries()
            if not entries and not self._problems and not self._folder.corrupt():
                if is_empty:
                    self._tell_strays()
                    return None
                is_empty = True  # A listing can miss one that another process just then puts in another's place.
                continue
            newest_first = entries[::-1]
            for entry in sorted(newest_first, key=lambda entry: not entry.is_verified):
                problem = self._damage(entry.path) if entry.is_verified else self._unreadable.get(entry.path)
                if entry.is_verified and not self._folder.is_verified(entry.path):
                    break  # The process that writes has removed it.
                if problem is None and not entry.is_verified and look < _MOMENTS and self._may_be_verified(entry.path):
                    time.sleep(_MOMENT)
                    break
                if problem is None:
                    self._tell_unverified(entry, entries)
                    self._tell_strays()
                    return entry.path
                self._found_damaged(entry.path, problem)
            else:
                raise self._none_is_sound()
        raise CheckpointError(f"the checkpoints in {self._folder.where} change faster than they can be read: stop"
                              " the process that writes them")  # fmt: skip

    def _may_be_verified(self, checkpoint: Path) -> bool:
        """Whether another process is just about to give it its manifest, or has."""
        return is_being_published(checkpoint) or self._folder.is_verified(checkpoint)

    def _found_damaged(self, checkpoint: Path, problem: str) -> None:
        if checkpoint.name not in self._problems:
            self._problems[checkpoint.name] = problem
            self.told.append(
                f"THE CHECKPOINT {self._folder.shown(checkpoint)} IS DAMAGED and is not used: {problem}. What is left"
                f" of it is kept as {self._set_aside(checkpoint)!r}"
            )

    def _tell_unverified(self, used: Entry, entries: list[Entry]) -> None:
        newer = [entry.path for entry in entries[entries.index(used) + 1 :] if not entry.is_verified]
        strays = [path.name for path in newer if not is_being_published(path) and not self._folder.is_verified(path)]
        if not used.is_verified:
            self.told.append(f"the checkpoint {used.path} is unverified: it has no manifest of checksums")
        elif strays:
            self.told.append(
                f"in {used.path.parent}, {', '.join(strays)} has no manifest of checksums and is not used; the newest"
                f" that is verified is {used.path.name}: to use another one, restore it with step="
            )

    def _tell_strays(self) -> None:
        if strays := self._folder.strays():
            self.told.append(
                f"in {self._folder.where}, {listed(strays)} is called like a checkpoint, and has no manifest, nor"
                " what is in every one of ours: it is left alone"
            )

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint; None if it is what was written.

        Raises:
          CheckpointError: it can't be read.
        """
        try:
            return self._folder.damage(checkpoint)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {self._folder.shown(checkpoint)} can't be read: {error}; nothing was changed: mend"
                " that and start again, or restore another one, step="
            ) from error

    def _none_is_sound(self) -> CheckpointError:
        lines = [f"{name}: {problem}" for name, problem in self._problems.items()]
        before = [name for name in self._folder.corrupt() if name.partition(".corrupt")[0] not in self._problems]
        return CheckpointError(
            f"no checkpoint in {self._folder.where} is sound:{listed_lines(lines + before)}\nbring a sound one"
            " back, or start anew, fit(..., fresh=True) or Checkpoints.start_anew(), which keeps what is there aside"
        )


def _read_twice(read: Callable[[Path], _Read], checkpoint: Path) -> _Read:
    """Reads a checkpoint, twice if need be: what failed once may have been passing."""
    try:
        return read(checkpoint)
    except CheckpointError:
        raise
    except Exception:
        return read(checkpoint)
