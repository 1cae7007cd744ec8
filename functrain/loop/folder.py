"""A folder of checkpoints: their names, their order in time, the best of them, and what is kept."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from functrain.errors import CheckpointError
from functrain.loop import manifest
from functrain.update.state import TrainState

_NAME = re.compile(r"(\d+)(?:\+(\d+))?(?:~(\d+))?")


class Folder:
    """The checkpoints in a directory, as far as their names and manifests tell.

    Attributes:
      directory: where they are.
      keep_last: how many of the newest are kept.
      keep_best: the metric of which the best is kept too.
      mode: "min" if smaller is better, "max" if larger.
    """

    directory: Path
    keep_last: int
    keep_best: str | None
    mode: Literal["min", "max"]

    def steps(self) -> list[Path]:
        """The folders of the checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted((path for path in self.directory.iterdir() if _order(path) is not None), key=_order)

    def best(self) -> Path | None:
        """The folder of the best checkpoint by `keep_best`; None if no checkpoint has a finite value of it."""
        if self.keep_best is None:
            return None
        values = {step: self._summary(step).get("metrics", {}).get(self.keep_best, math.nan) for step in self.steps()}
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if not finite:
            return None
        return (min if self.mode == "min" else max)(finite, key=lambda step: finite[step])

    def is_better(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the metrics have a finite value of `keep_best` that is better than that of every checkpoint."""
        assert self.keep_best is not None
        value = float(metrics.get(self.keep_best, math.nan))
        best = self.best()
        if best is None or not math.isfinite(value):
            return math.isfinite(value)
        before = self._summary(best)["metrics"][self.keep_best]
        return bool(value < before if self.mode == "min" else value > before)

    def kept(self) -> set[Path]:
        """The newest, and the best."""
        best = self.best()
        return set(self.steps()[-self.keep_last :]) | ({best} if best else set())

    def _summary(self, step: Path) -> dict[str, Any]:
        """What the manifest says of a checkpoint, or where a killed process wrote none, what it holds itself."""
        with contextlib.suppress(ValueError, OSError):
            found = manifest.read(step)
            return json.loads((step / "facts" / "metadata").read_bytes()) if found is None else found
        return {}

    def newest_first(self) -> list[Path]:
        """Every checkpoint, and those of which only the manifest is left."""
        suffix = manifest.path_of(Path("N")).name.removeprefix("N")
        of_manifests = {path.with_name(path.name.removesuffix(suffix)) for path in self.directory.glob(f"*{suffix}")}
        return sorted({*self.steps(), *(path for path in of_manifests if _order(path))}, key=_order, reverse=True)

    def asked_for(self, step: int | Path | None) -> Path:
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
        return ", ".join(path.name for path in self.steps()) or "none"

    def name(self, state: TrainState, content: int) -> str | None:
        """What to name a checkpoint, so that it is the last of its step; None if it is there already."""
        step, batches, pending = int(state.step), int(state.batches), int(state.pending)
        name = f"{step}+{pending}" if pending else f"{step}"
        others = [other for other in self.steps() if _order(other)[0] == step]
        for other in others:
            summary = self._summary(other)
            if (_order(other)[2], summary.get("batches"), summary.get("content")) == (pending, batches, content):
                return None  # One without a manifest has no "content", and is written again.
        # A window that was dropped ends no step; nor does an epoch, after which there are results of the same state.
        last = _order(others[-1]) if others else (step, 0, -1)
        return name if (step, 0, pending) > last else f"{name}~{max(batches, last[1] + 1)}"


def _order(path: Path) -> Any:
    """What orders checkpoints in time; None for what is none."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    step, pending, batches = (int(number or 0) for number in match.groups())
    return step, batches, pending
