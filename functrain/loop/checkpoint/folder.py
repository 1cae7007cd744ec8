"""A folder of checkpoints: their names, their order in time, and what their manifests say."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.storage import contents_file
from functrain.update.state import TrainState

_NAME = re.compile(r"(\d+)(?:\+(\d+))?(?:~(\d+))?")


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
    def of(cls, checkpoint: Path) -> "Name | None":
        """The name of a folder; None if it is none of a checkpoint."""
        match = _NAME.fullmatch(checkpoint.name)
        if match is None:
            return None
        step, pending, batches = (int(number or 0) for number in match.groups())
        return cls(step, batches, pending)

    def __str__(self) -> str:
        pending = f"+{self.pending}" if self.pending else ""
        return f"{self.step}{pending}" + (f"~{self.batches}" if self.batches else "")


class Folder:
    """The checkpoints in a directory, as far as their names and manifests tell."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def checkpoints(self) -> list[Path]:
        """Their folders, oldest first."""
        return sorted(self._named(), key=self._named().__getitem__)

    def newest_first(self) -> list[Path]:
        """Every checkpoint, and those of which only the manifest is left."""
        suffix = manifest.path_of(Path("N")).name.removeprefix("N")
        of_manifests = {path.with_name(path.name.removesuffix(suffix)) for path in self.directory.glob(f"*{suffix}")}
        named = self._named() | {path: name for path in of_manifests if (name := Name.of(path))}
        return sorted(named, key=named.__getitem__, reverse=True)

    def asked_for(self, step: int | Path) -> Path:
        """The folder of a step.

        Raises:
          CheckpointError: there is none.
        """
        if isinstance(step, Path):
            return step.absolute()
        found = [path for path in self.newest_first() if path.name.split("~")[0] == str(step)]
        if not found:
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.directory}: there are {self.names()}"
            )
        return found[0]

    def names(self) -> str:
        """What the checkpoints are called, for a message."""
        return ", ".join(path.name for path in self.checkpoints()) or "none"

    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of each checkpoint by its name, oldest first."""
        return {path.name: self._summary(path).get("metrics", {}) for path in self.checkpoints()}

    def next_name(self, state: TrainState, content: int) -> str | None:
        """What to name a checkpoint, so that it is the last of its step; None if it is there already."""
        step, batches, pending = int(state.step), int(state.batches), int(state.pending)
        others = {path: name for path, name in self._named().items() if name.step == step}
        for path, name in others.items():
            summary = self._summary(path)
            if (name.pending, summary.get("batches"), summary.get("content")) == (pending, batches, content):
                return None  # One without a manifest has no "content", and is written again.
        # A window that was dropped ends no step; nor does an epoch, after which there are results of the same state.
        last = max(others.values(), default=Name(step, 0, -1))
        plain = Name(step, 0, pending)
        return str(plain if plain > last else plain._replace(batches=max(batches, last.batches + 1)))

    def _named(self) -> dict[Path, Name]:
        """The folders that are checkpoints by their names."""
        if not self.directory.is_dir():
            return {}
        return {path: name for path in self.directory.iterdir() if (name := Name.of(path))}

    def _summary(self, checkpoint: Path) -> dict[str, Any]:
        """What the manifest says of a checkpoint, or where a killed process wrote none, what it holds itself."""
        with contextlib.suppress(ValueError, OSError, KeyError):
            found = manifest.load(checkpoint)
            if found is None:
                return dict(json.loads(contents_file(checkpoint).read_bytes())["beside"])
            return found
        return {}
