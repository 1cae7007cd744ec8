"""What of a run its record is told, and when: begun, noted, ended, evaluated."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jax

from functrain.loop.checkpoint.checkpoints import Checkpoints
from functrain.loop.checkpoint.processes import found_by_first
from functrain.loop.evaluation import Evaluation
from functrain.loop.record.facts import audited, facts_of
from functrain.loop.record.final import Final, finals_of, numbers_of, write_finals
from functrain.loop.record.folder import RecordFolder
from functrain.loop.record.masking import Masks
from functrain.loop.record.sections import Began, Ended, Sections
from functrain.loop.record.source import source_of
from functrain.loop.remote.address import is_address
from functrain.tree.warn import warn
from functrain.update.state import TrainState
from functrain.update.update import Update


class Keeper:
    """Keeps the record of a run in a folder; the first process writes, all evaluate.

    Args:
      folder: where.
      name: of the run.
      masks: what must not stand in it.
      config: the user's, as JSON has it, masked.
      source: the folder of code that is kept; None for none.
      report: whether a report is written at the end.

    Attributes:
      final: what evaluates the run at its end.
      update: of the run that goes on; None where none does.
      results: the numbers of the final evaluation.
    """

    def __init__(
        self,
        folder: RecordFolder,
        name: str,
        masks: Masks,
        config: Mapping[str, Any],
        source: Path | None,
        *,
        report: bool,
    ) -> None:
        self.final: Sequence[Evaluation] = []
        self.update: Update | None = None
        self.results: dict[str, dict[str, float]] = {}
        self._folder, self._name, self._masks, self._config = folder, name, masks, config
        self._source, self._report = source, report
        self._sections = Sections(folder, masks)
        self._checkpoints: Checkpoints | None = None
        self._lacks_audit = False

    def attach(self, update: Update, checkpoints: Checkpoints | None) -> None:
        """Takes the run that it is of."""
        self.update, self._checkpoints, self.results = update, checkpoints, {}

    def begin(self, state: TrainState, began: Began) -> None:
        """Begins a section.

        Raises:
          RecordError: what is there is of a newer functrain, or the source is no folder that git knows.
        """
        if jax.process_index() or self.update is None:
            return
        source = None if self._source is None else source_of(self._source, self._masks)
        facts = facts_of(
            self.update,
            state,
            name=self._name,
            config=self._config,
            folder=self._source or Path.cwd(),
            masks=self._masks,
        )
        facts["checkpoints"] = None if self._checkpoints is None else self._where(self._checkpoints)
        self._sections.begin(facts, source, began)
        self._lacks_audit = True
        for text in [] if source is None or self._source is None else source.told(self._source.name):
            warn(text)

    def note(self, state: TrainState, batch: Any) -> None:
        """Writes what came up: warnings, and once, when there is a batch to make it of, the audit."""
        audit = None
        if self._lacks_audit and batch is not None and self.update is not None:
            self._lacks_audit = False
            audit = audited(self.update, state, batch)
        self._sections.note(audit)

    @property
    def is_open(self) -> bool:
        """Whether a section has begun and has not ended."""
        return self._sections.is_open

    def end(self, ended: Ended) -> None:
        """Ends the section."""
        self._sections.end(ended)

    def is_evaluated(self, step: int) -> bool:
        """Whether all final evaluations of the state at a step are there, for all processes alike."""
        names = {each.name for each in self.final}
        return found_by_first(lambda: "all" if names <= self._folder.evaluated(step) else None) is not None

    def conclude(self, state: TrainState) -> None:
        """The final evaluation and the report; what fails of them is warned of, as the run itself did not.

        What was evaluated before it failed is kept.
        """
        assert self.update is not None
        finals: list[Final] = []
        where = self._folder.directory
        try:
            for final in finals_of(self.final, self.update, state, self._checkpoints):
                finals.append(final)
        except Exception as error:
            warn(f"the final evaluation of {where} failed: {said(error)}; the run has ended well")
        self.results = numbers_of(finals)
        try:
            if finals and jax.process_index() == 0:
                write_finals(self._folder, finals)
        except Exception as error:
            warn(f"the final results can't be written to {where}: {said(error)}; record.results has the numbers")
        self.write_report()

    def write_report(self) -> None:
        """Writes the report, of what there is."""
        self._sections.note()
        if not self._report or jax.process_index():
            return
        try:
            import_module("functrain.loop.record.report").write(self._folder.directory)
        except Exception as error:
            warn(f"{self._folder.directory} has no report: {said(error)}; functrain report tries it again")

    def close(self) -> None:
        """Nothing more will be written."""
        self._sections.close()
        self.update = self._checkpoints = None

    def _where(self, checkpoints: Checkpoints) -> dict[str, Any]:
        place, mine = checkpoints.directory, self._folder.directory
        where = str(place.relative_to(mine)) if place.is_relative_to(mine) else str(place)
        where = str(checkpoints.where) if is_address(checkpoints.where) else where
        return {"directory": self._masks.text(where), "keep_best": dict(checkpoints.retention.best)}


def said(error: BaseException) -> str:
    """An error in a line or a few."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
