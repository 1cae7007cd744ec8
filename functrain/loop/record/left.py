"""All that a run left in a folder: its record, its log, its checkpoints, each as far as it is there."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.folder import Entry, Name
from functrain.loop.checkpoint.held import Held, held_in, saved_at
from functrain.loop.checkpoint.retention import Mode, Retention
from functrain.loop.record.curves import mode_by_name
from functrain.loop.record.log import Log, read_log
from functrain.loop.record.place import folder_of, log_of
from functrain.loop.record.reading import NOTHING, Final, Recorded, read_results, read_run
from functrain.tree.text import listed


class Saved(NamedTuple):
    """A checkpoint, as its manifest has it."""

    name: str
    step: int | None
    time: float | None
    results: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Left:
    """What a run left.

    Attributes:
      directory: the folder.
      has_record: whether there is a run.json that can be read.
      recorded: what it says; nothing where there is none.
      final: what results.json says.
      log: its numbers.
      log_path: the file; None without one.
      checkpoints: those that are there, oldest first.
      checkpoints_in: their folder.
      modes: whether the smaller or the larger value of a result is better, by those of which the best was kept.
      held: what the newest checkpoint that can be read says of itself; None without one.
      problems: what is torn, foreign, damaged or of a newer format.
    """

    directory: Path
    has_record: bool
    recorded: Recorded
    final: tuple[Final, ...]
    log: Log
    log_path: Path | None
    checkpoints: tuple[Saved, ...]
    checkpoints_in: Path
    modes: dict[str, Mode]
    held: Held | None
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.recorded.name or self.directory.absolute().name

    def mode(self, result: str) -> Mode | None:
        """Whether the smaller or the larger value of a result is better; None where nothing says it."""
        # The best "valid/accuracy" is kept; of the final results it is "test/accuracy" that is like it.
        alike = {kept.rpartition("/")[2]: mode for kept, mode in self.modes.items()}
        return self.modes.get(result) or mode_by_name(result) or alike.get(result.rpartition("/")[2])

    def best(self) -> dict[str, str | None]:
        """The best checkpoint by each result of which the best is kept."""
        results = {each.name: each.results for each in self.checkpoints}
        return {name: Retention(best=self.modes).best_of(results, name) for name in self.modes}


def read_left(directory: Path) -> Left:
    """Reads what a run left in a folder.

    Raises:
      CheckpointError: there is nothing of a run in it, or it is a checkpoint.
    """
    problems: list[str] = []
    found, final = read_run(directory, problems), read_results(directory, problems)
    recorded = found or NOTHING
    folder = folder_of(directory, recorded.checkpoints)
    entries, aside = [entry for entry in folder.entries() if entry.is_there], folder.corrupt()
    log_path = log_of(directory, folder)
    if not entries and not aside and log_path is None and found is None and not final:
        told = "".join(f"; {problem}" for problem in problems)
        raise CheckpointError(f"there is neither a checkpoint nor a log in {directory}{told}: give the folder of a run")
    held = _newest_held(entries, problems)
    log = Log(problems=(f"there is no log in {directory}",)) if log_path is None else _log(log_path)
    problems += log.problems
    problems += ["there is no checkpoint"] if not entries and _has_its_own(found) else []
    problems += [f"set aside as damaged: {listed(aside)}"] if aside else []
    best = next((entry.best for entry in reversed(entries) if entry.best), recorded.keep_best)
    modes: dict[str, Mode] = {}
    for name, mode in best.items():
        if mode in ("min", "max"):
            modes[name] = "min" if mode == "min" else "max"
    saved = tuple(Saved(entry.path.name, _step(entry), saved_at(entry), entry.metrics) for entry in entries)
    return Left(
        directory, found is not None, recorded, final, log, log_path, saved, folder.directory, modes, held,
        tuple(problems),
    )  # fmt: skip


def _log(path: Path) -> Log:
    try:
        return read_log(path)
    except OSError as error:
        return Log(problems=(f"{path} can't be read: {error}",))


def _newest_held(entries: list[Entry], problems: list[str]) -> Held | None:
    for entry in reversed(entries):
        try:
            return held_in(entry.path)
        except CheckpointError as error:
            problems.append(str(error))
    return None


def _has_its_own(recorded: Recorded | None) -> bool:
    """Whether there are checkpoints on this machine, as far as is known."""
    return recorded is None or (recorded.checkpoints is not None and "://" not in recorded.checkpoints)


def _step(entry: Entry) -> int | None:
    name = Name.of(entry.path.name)
    return None if name is None else name.step
