"""A folder of checkpoints: which they are, their names and order in time, and what their manifests say."""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from functrain.errors import CheckpointError, SaveError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.contents import contents_file
from functrain.loop.checkpoint.durable import insisted

if TYPE_CHECKING:
    from functrain.update.state import TrainState

_NAME = re.compile(r"(\d+)(?:\+(\d+))?(?:~(\d+))?")
_CORRUPT = re.compile(rf"({_NAME.pattern})(\.corrupt\d*)?")


class Name(NamedTuple):
    """What a checkpoint is called, "120", "120+3" or "120~500"; these are ordered in time.

    Attributes:
      step: finished steps.
      batches: batches seen, behind a "~" where an older checkpoint of the step is there; else 0.
      pending: batches pending in a window, behind a "+".
    """

    step: int
    batches: int
    pending: int

    @classmethod
    def of(cls, name: str) -> "Name | None":
        """The name of a folder; None if it is none of a checkpoint."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        step, pending, batches = (int(number or 0) for number in match.groups())
        return cls(step, batches, pending)

    def __str__(self) -> str:
        pending = f"+{self.pending}" if self.pending else ""
        return f"{self.step}{pending}" + (f"~{self.batches}" if self.batches else "")


class Entry(NamedTuple):
    """A checkpoint in a folder, which by more than its name is one of ours.

    Attributes:
      path: its folder, which may be missing.
      is_there: whether it is not.
      is_verified: whether there is a manifest of it, damaged or not.
      metrics: that were saved with it.
      batches: seen before it; None where its manifest does not say it.
      content: what tells it from another one of the same state; None where its manifest does not say it.
      best: the metrics of which the best was kept when it was written, and the mode of each.
    """

    path: Path
    is_there: bool
    is_verified: bool
    metrics: dict[str, float]
    batches: int | None = None
    content: int | None = None
    best: Mapping[str, Any] = MappingProxyType({})


class Folder:
    """The checkpoints in a directory.

    A folder is one if there is a manifest of it, or if it holds what is in every checkpoint. What is only called as
    one is somebody else's.

    Raises:
      CheckpointError: there can be none, as a file is in its place.
    """

    def __init__(self, directory: Path) -> None:
        there = next((path for path in (directory, *directory.parents) if os.path.lexists(path)), directory)
        if os.path.isfile(there):
            raise CheckpointError(f"{there} is a file: give a folder, such as {there.with_suffix('')}-checkpoints")
        self.directory = directory
        self._is_made = False

    @property
    def where(self) -> str:
        """What the folder is called, for a message."""
        return str(self.directory)

    def shown(self, checkpoint: Path) -> str:
        """What a checkpoint is called, for a message."""
        return str(checkpoint)

    def look(self) -> None:
        """Finds out anew what is there, where that is not done each time."""

    def is_verified(self, checkpoint: Path) -> bool:
        """Whether there is a manifest of a checkpoint."""
        return manifest.path_of(checkpoint).exists()

    def damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint; None if it is in its folder, and is what was written.

        Raises:
          OSError: it can't be read.
        """
        return manifest.damage(checkpoint)

    def damages(self, checkpoint: Path) -> list[str]:
        """All that is wrong with a checkpoint, file by file; nothing is changed.

        Raises:
          OSError: it can't be read.
        """
        return manifest.damages(checkpoint)

    def make(self) -> None:
        """Makes the directory, which from here on is there.

        Raises:
          OSError: it can't be made.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._is_made = True

    def entries(self) -> list[Entry]:
        """The checkpoints, oldest first.

        Raises:
          CheckpointError: the directory can't be read.
        """
        return self._entries(self._listed())

    def checkpoints(self) -> list[Path]:
        """Their folders, oldest first."""
        return [entry.path for entry in self.entries() if entry.is_there]

    def names(self) -> str:
        """What the checkpoints are called, for a message."""
        return ", ".join(path.name for path in self.checkpoints()) or "none"

    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of each checkpoint by its name, oldest first."""
        return {entry.path.name: entry.metrics for entry in self.entries() if entry.is_there}

    def corrupt(self) -> list[str]:
        """The names of those that were damaged and set aside, and of those of which a damaged manifest is left."""
        listed = self._listed()
        ours = {entry.path.name for entry in self._entries(listed)}
        stems = {name.removesuffix(manifest.SUFFIX) for name in listed} - ours
        return sorted(stem for stem in stems if _CORRUPT.fullmatch(stem) and self._is_ours(stem, listed))

    def strays(self) -> list[str]:
        """The names of folders that Orbax wrote and that are called like a checkpoint, but are none of ours."""
        listed = self._listed()
        ours = {entry.path.name for entry in self._entries(listed)}
        named = [name for name, is_folder in listed.items() if is_folder and Name.of(name) and name not in ours]
        return sorted(name for name in named if (self.directory / name / "_CHECKPOINT_METADATA").exists())

    def asked_for(self, step: int | Path) -> Path:
        """The folder of a step.

        Raises:
          CheckpointError: there is none.
        """
        if isinstance(step, Path):
            return step.absolute()
        found = [entry.path for entry in self.entries() if entry.path.name.split("~")[0] == str(step)]
        if not found:
            raise CheckpointError(f"there is no checkpoint of step {step} in {self.where}: there are {self.names()}")
        return found[-1]

    def next_name(self, state: "TrainState", content: int) -> str | None:
        """What to name a checkpoint, so that it is the last of its step; None if it is there already.

        Raises:
          SaveError: it can't be told.
        """
        step, batches, pending = int(state.step), int(state.batches), int(state.pending)
        try:
            listed = self._listed()
            entries = self._entries(listed)
        except CheckpointError as error:
            raise SaveError(f"the checkpoint of step {step} could not be written: {error}") from error
        others = []
        for entry in entries:
            name = Name.of(entry.path.name)
            if name is None or name.step != step:
                continue
            others.append(name)
            if entry.is_there and (name.pending, entry.batches, entry.content) == (pending, batches, content):
                return None
        # A window that was dropped ends no step; nor does an epoch, after which there are results of the same state.
        last = max(others, default=Name(step, 0, -1))
        name = Name(step, 0, pending)
        if name <= last:
            name = name._replace(batches=max(batches, last.batches + 1))
        while {str(name), manifest.path_of(Path(str(name))).name} & listed.keys():  # Somebody else's.
            name = name._replace(batches=max(batches, name.batches + 1))
        return str(name)

    def _listed(self) -> dict[str, bool]:
        """The names in the directory, and whether each is a folder."""

        def listed() -> dict[str, bool]:
            with os.scandir(self.directory) as found:
                return {each.name: each.is_dir() for each in found}

        try:
            if insisted(contents_file(self.directory).exists):
                raise CheckpointError(
                    f"{self.directory} is a checkpoint itself: give its folder, {self.directory.parent}"
                )
            return insisted(listed)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self._is_made:
                return {}
            raise self._unreadable(error) from error

    def _entries(self, listed: Mapping[str, bool]) -> list[Entry]:
        stems = {name.removesuffix(manifest.SUFFIX) for name in listed}
        named = {stem: name for stem in stems if (name := Name.of(stem))}
        try:
            found = [self._entry(stem, listed) for stem in sorted(named, key=named.__getitem__)]
        except OSError as error:
            raise self._unreadable(error) from error
        return [entry for entry in found if entry is not None]

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the folder of checkpoints {self.directory} can't be read: {error}; mend that, and start again"
        )

    def _entry(self, name: str, listed: Mapping[str, bool]) -> Entry | None:
        path, is_there = self.directory / name, listed.get(name, False)
        is_verified = f"{name}{manifest.SUFFIX}" in listed
        with contextlib.suppress(ValueError, OSError):
            if is_verified and (said := insisted(lambda: manifest.load(path))) is not None:
                numbers = said["metrics"], said["batches"], said["content"]
                return Entry(path, is_there, is_verified, *numbers, said.get("best", {}))
        if is_there and _has_contents(path):
            return Entry(path, is_there, is_verified, {} if is_verified else _metrics(path))
        return None

    def _is_ours(self, name: str, listed: Mapping[str, bool]) -> bool:
        path = self.directory / name
        is_manifest = f"{name}{manifest.SUFFIX}" in listed and insisted(lambda: manifest.was_one(path))
        return is_manifest or (listed.get(name, False) and _has_contents(path))


def _has_contents(checkpoint: Path) -> bool:
    return insisted(contents_file(checkpoint).exists)


def _metrics(checkpoint: Path) -> dict[str, float]:
    """The metrics of a checkpoint that has no manifest to say them."""
    with contextlib.suppress(ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError):
        metrics = json.loads(contents_file(checkpoint).read_bytes())["beside"]["metrics"]
        return {name: float(value) for name, value in metrics.items()}
    return {}
