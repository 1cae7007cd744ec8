"""The numbers of a run: where they go, and which were written before."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from functrain.loop.every import Moment
from functrain.loop.lines import title
from functrain.loop.logs import Logger, flattened, read_json_lines
from functrain.loop.run import Run
from functrain.loop.unfailing import Unfailing
from functrain.tree.warn import warn


class Rows:
    """Writes rows of numbers to the history of a run and to its loggers.

    Args:
      loggers: where they go.
      path: the file of JSON lines in which a run that goes on finds its history; None without one.
      log_last: the metrics of the last update alone are written too.
    """

    def __init__(self, loggers: Sequence[Logger], path: Path | None, *, log_last: bool) -> None:
        self._path, self._log_last = path, log_last
        self._loggers = [Unfailing(logger) for logger in loggers]
        self._since = Moment()
        self._settled: int | None = None
        self._written: collections.Counter[tuple[Any, ...]] = collections.Counter()

    def resume(self, run: Run, *, is_restored: bool) -> None:
        """Begins to write; what a log has past the run's step never happened. A restored run takes its history."""
        for logger in self._loggers:
            logger.resume(run.step if is_restored or run.step else -1)
        self._since = run.now
        if self._path is not None and is_restored:
            rows = [row for row in _read(self._path) if row["step"] <= run.step]
            for logger in self._loggers:
                logger.restore(rows)
            run.history = [{name: value for name, value in row.items() if name != "time"} for row in rows]
            # An epoch's end is no step: of its last step, the log may have what came after the checkpoint.
            here = [row for row in run.history if row["step"] == run.step]
            self._written = collections.Counter(map(title, here[run.rows :]))

    def add(self, run: Run, numbers: Mapping[str, Any]) -> None:
        """Writes numbers of the step and epoch where the run stands, unless it wrote them before it was killed."""
        row = {"step": run.step, "epoch": run.epochs_given, **flattened(numbers)}
        run.rows += 1
        if self._written[title(row)]:
            self._written[title(row)] -= 1
            return
        run.history.append(row)
        for logger in self._loggers:
            logger.log(run.step, {name: value for name, value in row.items() if name != "step"})

    def training(self, run: Run, now: Moment) -> dict[str, float]:
        """The numbers of training since the last row: means, speed, hyperparameters; the last update's if asked for."""
        last = run.means.alone() if self._log_last else {}
        row = {f"train/{name}": value for name, value in run.means.row().items()}
        row |= {f"train/last/{name}": value for name, value in last.items()}
        if (elapsed := now.seconds - self._since.seconds) > 0:
            row["train/steps_per_second"] = (now.step - self._since.step) / elapsed
        optim = run.update.optim
        named, joined = optim.hyperparameters(run.state.opt_state), optim.trained_at(now.step - 1)
        self._since = now
        return row | {
            f"train/{name}/{part}": float(value)
            for part in named
            if optim.owners[part] in joined
            for name, value in named[part].items()
        }

    def settle(self, step: int) -> None:
        """Tells the loggers that rows up to a step stand for good: the run goes on from no earlier one."""
        if step != self._settled:
            self._settled = step
            for logger in self._loggers:
                logger.settle(step)

    def start(self, config: Mapping[str, Any]) -> None:
        """Gives the configuration of the run to the loggers that take one."""
        for logger in self._loggers:
            logger.start(config)

    def artifact(self, path: Path) -> None:
        """Gives a file of the run's record, as it is now, to the loggers that take files."""
        for logger in self._loggers:
            logger.artifact(path)

    def flush(self) -> None:
        """Returns when what was written is on disk."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Closes the loggers."""
        for logger in self._loggers:
            logger.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, if it can be read."""
    try:
        return read_json_lines(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(f"{path} can't be read, and result.history lacks its rows: {error}")
        return []
