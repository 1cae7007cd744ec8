"""Where a victim runs: its folder before an attack, the process that is attacked, and the one that goes on after it."""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import faults
import victim
import warm

HERE = Path(__file__).parent
SAFETY = 20  # Seconds after which a process hangs.
LAST = victim.EPOCHS * victim.STEPS
BEFORE_LAST = LAST - victim.STEPS
UNTIMED = {"time", "train/steps_per_second"}

# What others keep in the folder: beside every run, and where its checkpoints could be taken to be.
BESIDE = {"log.txt": "mine", "x.corrupt/a": "mine", "notes/1": "mine"}
LIKE_CHECKPOINTS = {"1/notes.txt": "mine", "7/notes.txt": "mine", "3": "mine", "5/0/_METADATA": "mine", "9/": ""}
LINKS = {"latest": "notes"}


@dataclasses.dataclass(frozen=True)
class Ran:
    """A process that has ended: its exit code, None where it hung, what it told, and its errors."""

    code: int | None
    began: int | None = None
    saved: int = 0
    ended: str | None = None
    results: dict | None = None
    best: str | None = None
    errors: str = ""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What was found before, at and after an attack.

    Attributes:
      before, after: the step of the newest complete checkpoint, before and after the process that was attacked.
      attacked, again: this process, and the same command when all is well again.
      at: the operation that was struck.
      harmed: what was others' and is not as it was.
      rows: of the log in the end; None where one can't be read.
    """

    before: int
    after: int
    attacked: Ran
    again: Ran
    at: str
    harmed: list[str]
    rows: list | None


class Arena:
    """A victim in a folder of the file system.

    Args:
      name: of the file of the victim.
      folder: for all that the attacks leave; it is cleared as they go.
      library: `faults.compiled`.
    """

    def __init__(self, name, folder, library):
        self.name, self.folder, self.library = name, Path(folder), library
        self._program, self._module = HERE / f"{name}.py", importlib.import_module(name)
        self._numbers = itertools.count()

    # Processes.

    def run(self, directory, fault=None, log=os.devnull, waits=False):
        """A victim that runs to its end, or to that of the fault."""
        arguments = [directory, faults.asked(fault, directory, log), *(["waits"] if waits else [])]
        process = warm.Process(self._program, *arguments, preload=self.library)
        try:
            printed, errors = process.communicate(timeout=SAFETY)
        except subprocess.TimeoutExpired as late:
            printed, errors = late.output, f"{late.stderr}\nit hung"
        facts = {}
        for line in printed.splitlines():
            facts |= json.loads(line)
        return Ran(None if errors.endswith("\nit hung") else process.returncode, errors=errors, **facts)

    def complete(self, directory):
        """The step of the newest complete checkpoint; 0 without one."""
        return max(self._module.complete(directory), default=0) if directory.is_dir() else 0

    # Folders.

    def scratch(self):
        """A name for a new folder."""
        return self.folder / str(next(self._numbers))

    def copy(self, base):
        """A copy of a folder, by its name."""
        directory = self.scratch() / base.name
        shutil.copytree(base, directory, symlinks=True)
        return directory

    @functools.cached_property
    def fresh(self):
        """A folder in which no run was."""
        return self._with_others("fresh", BESIDE)

    @functools.cached_property
    def crowded(self):
        """One in which folders of others could be taken for checkpoints."""
        return self._with_others("crowded", BESIDE | LIKE_CHECKPOINTS)

    @functools.cached_property
    def bracketed(self):
        """One with the name that a configuration tool gives it, which as a pattern is another."""
        return self._with_others("layers=[64,64]", BESIDE)

    @functools.cached_property
    def interrupted(self):
        """One of a run that was killed while it wrote its last checkpoint."""
        log = self.operations(self.fresh)
        changes = sum(kind in (faults.CHANGE, faults.WRITE) for kind in log)
        for at in range(int(0.85 * changes), 0, -max(1, changes // 100)):
            directory = self.copy(self.fresh)
            self.run(directory, dataclasses.replace(faults.KILL, at=at))
            if self.complete(directory) == BEFORE_LAST:
                return directory.rename(self.folder / "interrupted")
        raise AssertionError("no kill leaves the last checkpoint but one")

    def _with_others(self, name, others):
        directory = self.folder / name
        for file, text in others.items():
            path = directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if file.endswith("/") else path.write_text(text)
        for file, target in LINKS.items():
            (directory / file).symlink_to(target)
        return directory

    # What is known of a run that nobody attacks.

    @functools.cache  # noqa: B019
    def operations(self, base, waits=False):
        """The kind of each of its operations on files, in their order."""
        directory, log = self.copy(base), self.scratch()
        self.run(directory, faults.Fault(), log, waits)
        return [int(line.split()[0]) for line in log.read_text().splitlines()]

    @functools.cached_property
    def undisturbed(self):
        """What it ends with, and the rows of its log."""
        directory = self.copy(self.fresh)
        ran = self.run(directory)
        assert ran.code == 0, ran.errors
        assert not ran.errors, f"what it tells unasked would be taken for a warning of a fault: {ran.errors}"
        return ran, rows(directory)

    # An attack.

    def attack(self, base, fault):
        """A process on a copy of a folder that meets a fault, and one that goes on; None if it ended before."""
        directory, log = self.copy(base), self.scratch()
        attempt = self.attempt(directory, functools.partial(self.run, directory, fault, log), base)
        at = log.read_text().strip()
        log.unlink()
        return dataclasses.replace(attempt, at=at) if at else None

    def attempt(self, directory, attacked, base):
        """An attack in a copy of a folder, `attacked()`, and what comes of it; the copy is removed."""
        before, ran = self.complete(directory), attacked()
        after, again = self.complete(directory), self.run(directory)
        harmed = [] if base is None else changed(base, directory)
        attempt = Attempt(before, max(after, ran.saved), ran, again, "", harmed, rows(directory))
        shutil.rmtree(directory.parent)
        return attempt


def changed(base, directory):
    """What others had in a folder and is no longer as it was."""
    others = [name for name in BESIDE | LIKE_CHECKPOINTS | LINKS if os.path.lexists(base / name)]
    return [name for name in others if content(base / name) != content(directory / name)]


def content(path):
    if path.is_symlink():
        return path.readlink()
    if path.is_dir():
        return sorted(entry.name for entry in path.iterdir())
    return path.read_bytes() if path.exists() else None


def rows(directory, strict=True):
    """Of a log, without the times; where a line is none, no log at all, or if this is not strict, the other lines."""
    log, found = directory / "log.jsonl", []
    for line in log.read_bytes().split(b"\n")[:-1] if log.is_file() else []:
        try:
            row = json.loads(line)
            found.append({name: row[name] for name in row if name not in UNTIMED})
        except (ValueError, TypeError):
            if strict:
                return None
    return found
