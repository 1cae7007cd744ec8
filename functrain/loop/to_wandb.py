"""The numbers, configuration and files of a run, in W&B."""

import collections
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from functrain.errors import LogError
from functrain.loop.tracker import Row, Tracker
from functrain.loop.wandb_files import is_ended, rows_in

_LONGEST = 10.0  # Seconds for which W&B may be writing the end of its file.


class WandB(Tracker):
    """Writes to a run of Weights & Biases, offline too: each row once, however often the run was killed.

    >>> log = WandB("digits", project="first", mode="offline")  # doctest: +SKIP
    >>> result = ft.fit(update, state, data, epochs=10, loggers=[log])  # doctest: +SKIP

    W&B takes no row back, so with checkpoints one is sent when a checkpoint is whole that has it. A row has a number of
    its own there, and the step as a metric, over which all others are drawn. Each process of an offline run leaves a
    folder, all with the run's id, which `wandb sync` puts together. A run that goes on where these folders are not, or
    from before what was sent, is a new one there, with all rows.

    Args:
      name: of the run; its id begins with it.
      project: its project.
      directory: where the folder `wandb` is, by which a run that goes on finds its id.
      mode: "online", "offline" or "disabled", by default as WANDB_MODE says.
      every: the seconds for which rows are gathered.
      patience: the seconds that `close` waits for what is left.
      **options: more for `wandb.init`, such as `entity` or `tags`.

    Raises:
      LogError: wandb is not installed.
    """

    def __init__(
        self,
        name: str,
        *,
        project: str = "functrain",
        directory: str | os.PathLike[str] = ".",
        mode: str | None = None,
        every: float = 5.0,
        patience: float = 60.0,
        **options: Any,
    ) -> None:
        super().__init__(every=every, patience=patience)
        self._name, self._directory = name, Path(directory).absolute()
        self._options = {"project": project, "mode": mode, **options}
        try:
            self._wandb = import_module("wandb")
        except ImportError as error:
            raise LogError(f"{self!r}: {error}; write pip install 'functrain[wandb]'") from error
        self._run: Any = None
        self._there: collections.Counter[tuple[Any, ...]] = collections.Counter()
        self._number = self._others = self._last = 0

    def __repr__(self) -> str:
        return f"WandB({self._name!r}, project={self._options['project']!r})"

    def _open(self, step: int) -> None:
        if self._run is not None:
            self._run.finish()
        which, rows = self._found()
        if which is None or any(row["step"] > step for row in rows.values()):
            which, rows = self._new_id(), {}
        self._run = self._begun(which)
        if self._run.step > len(rows) and self._run.summary.get("step", -1) > step:  # The server knows of more.
            self._run.finish()
            which, rows = self._new_id(), {}
            self._run = self._begun(which)
        self._there = collections.Counter(_title(row["step"], row) for row in rows.values())
        self._number = max([self._run.step, *(number + 1 for number in rows)])
        # What a killed process had sent, and had not written to its file: the first rows that are not in one.
        self._others = max(0, self._run.step - len(rows))

    def _found(self) -> tuple[str | None, dict[int, dict[str, Any]]]:
        """The id of the newest run of this name that has a folder here, and all its rows by number."""
        folders = self._directory.glob(f"*wandb/*run-*-{_slug(self._name)}-????????/run-*.wandb")
        files = sorted(folders, key=lambda file: file.parent.name.partition("run-")[2])
        if not files:
            return None, {}
        which = files[-1].name
        rows = (row for file in files if file.name == which for row in rows_in(file))
        return which.removeprefix("run-").removesuffix(".wandb"), {row["_step"]: row for row in rows if "step" in row}

    def _new_id(self) -> str:
        return f"{_slug(self._name)}-{secrets.token_hex(4)}"

    def _begun(self, which: str) -> Any:
        run = self._wandb.init(
            id=which, name=self._name, dir=str(self._directory), resume="allow", reinit="create_new", **self._options
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def _send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.milliseconds <= self._last:  # It is called again with those that it had sent.
                continue
            title = _title(row.step, row.numbers)
            if self._there[title]:
                self._there[title] -= 1
            elif self._others:
                self._others -= 1
            else:
                numbers = {**row.numbers, "step": row.step, "_timestamp": row.milliseconds / 1000}
                self._run.log(numbers, step=self._number, commit=True)
                self._number += 1
            self._last = row.milliseconds

    def _config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def _send_file(self, path: Path) -> None:
        copy = Path(self._run.dir) / path.name
        shutil.copyfile(path, copy)
        self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def _send_results(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.summary.update(dict(numbers))

    def _end(self, status: str) -> None:
        file, until = Path(self._run.dir).parent / f"run-{self._run.id}.wandb", time.monotonic() + _LONGEST
        self._run.finish(exit_code=int(status != "FINISHED"))
        while file.exists() and not is_ended(file) and time.monotonic() < until:
            time.sleep(0.05)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _title(step: int, numbers: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows that say the same of the same moment have in common."""
    return step, *sorted(name for name in numbers if name != "step" and not name.startswith("_"))
