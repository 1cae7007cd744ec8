"""`run.json`: the facts of a run, and a section for each time that it was started."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from functrain.loop.record import machine
from functrain.loop.record.facts import changes
from functrain.loop.record.files import FORMAT, SOURCE
from functrain.loop.record.folder import RecordFolder
from functrain.loop.record.heard import Heard
from functrain.loop.record.masking import Masks
from functrain.loop.record.source import Source
from functrain.tree.warn import warn

How: TypeAlias = Literal["finished", "stopped", "failed"]


class Began(NamedTuple):
    """Where a section begins: the step, the epoch if it is known, the checkpoint that it goes on from if any."""

    step: int
    epoch: int | None
    checkpoint: str | None


class Ended(NamedTuple):
    """Where and how a section ended; `seconds` are those of training in all sections, None to have them measured."""

    step: int | None
    epoch: int | None
    seconds: float | None
    how: How
    why: str | None


class Sections:
    """Writes `run.json` as a run goes on; what can't be written is warned of.

    Args:
      folder: where.
      masks: what must not stand in it.
    """

    def __init__(self, folder: RecordFolder, masks: Masks) -> None:
        self._folder, self._masks = folder, masks
        self._heard = Heard()
        self._run: dict[str, Any] | None = None
        self._began = self._before = 0.0
        self._is_told = False

    def begin(self, facts: Mapping[str, Any], source: Source | None, began: Began) -> None:
        """Begins a section: the first of a new run, or one more with what changed since the last."""
        earlier = self._folder.run()
        sections = [] if earlier is None else earlier["sections"]
        kept = self._kept(source, earlier or {}, len(sections) + 1)
        run = {"format": FORMAT, **facts, "source": kept}
        changed = {} if earlier is None else changes(earlier, run)
        self._before = next((one["seconds"] for one in reversed(sections) if one.get("seconds")), 0.0)
        self._began = time.time()
        section: dict[str, Any] = {
            "started": self._began,
            "ended": None,
            "from_step": began.step,
            "from_epoch": began.epoch,
            "checkpoint": began.checkpoint,
            "to_step": None,
            "to_epoch": None,
            "seconds": None,
            "how": None,
            "why": None,
            "changed": changed,
            "warnings": [],
            "memory": machine.memory(),
        }
        self._run = run | {"sections": [*sections, section]}
        self._heard.begin()
        self._write()

    def note(self, audit: str | None = None) -> None:
        """Writes what is known since: the audit, warnings."""
        if self._run is None:
            return
        heard = self._warnings()
        if audit is not None:
            self._run["model"]["audit"] = self._masks.text(audit)
        if audit is not None or heard != self._run["sections"][-1]["warnings"]:
            self._section(warnings=heard)
            self._write()

    @property
    def is_open(self) -> bool:
        """Whether there is a section that has not ended."""
        return self._run is not None and self._run["sections"][-1]["how"] is None

    def end(self, ended: Ended) -> None:
        """Ends the section, once: what fails after its end is not of it."""
        if self._run is None or not self.is_open:
            return
        seconds = self._before + time.time() - self._began if ended.seconds is None else ended.seconds
        # More is imported than at its beginning; what was then may be another on the disk now, and not here.
        self._run["versions"] = machine.versions() | self._run["versions"]
        self._section(
            ended=time.time(),
            to_step=ended.step,
            to_epoch=ended.epoch,
            seconds=seconds,
            how=ended.how,
            why=None if ended.why is None else self._masks.text(ended.why),
            memory=machine.memory(),
            warnings=self._warnings(),
        )
        self._write()

    def close(self) -> None:
        """Writes the warnings that came after its end, and listens no more."""
        self.note()
        self._heard.end()
        self._run = None

    def _section(self, **facts: Any) -> None:
        assert self._run is not None
        self._run["sections"][-1] |= facts

    def _warnings(self) -> list[dict[str, Any]]:
        return [{"text": self._masks.text(text), "count": count} for text, count in self._heard.counted()]

    def _kept(self, source: Source | None, earlier: Mapping[str, Any], number: int) -> dict[str, Any] | None:
        """Writes the source, unless it is what an earlier section had, and says of it what there is to say."""
        if source is None:
            return None
        before = earlier.get("source") or {}
        if before.get("digest") == source.digest:
            return dict(before)
        name = SOURCE if number == 1 else f"{Path(SOURCE).name.removesuffix('.tar.gz')}-{number}.tar.gz"
        try:
            self._folder.write(name, source.archive)
        except OSError as error:
            self._tell(error)
            return None
        said = {"file": name, "files": source.files, "digest": source.digest}
        left_out = {self._masks.text(path): why for path, why in source.left_out.items()}
        return said | {"left_out": left_out, "masked": source.masked}

    def _write(self) -> None:
        assert self._run is not None
        try:
            self._folder.write_run(self._run)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            self._is_told = True
            warn(f"the record of the run can't be written to {self._folder.directory}: {error}; the run goes on")
