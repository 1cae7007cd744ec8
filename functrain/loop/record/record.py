"""The record of a run: what was trained by what, how it went, how it ended; for people, beside its checkpoints."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import jax

from functrain.errors import RecordError
from functrain.loop.checkpoint.checkpoints import Checkpoints
from functrain.loop.checkpoint.lock import Lock
from functrain.loop.evaluation import Evaluation
from functrain.loop.evaluations import prepared
from functrain.loop.hooks import Hook
from functrain.loop.lines import LOG
from functrain.loop.logs import JsonLines
from functrain.loop.record.folder import RecordFolder
from functrain.loop.record.keeping import Keeper, said
from functrain.loop.record.masking import Masks
from functrain.loop.record.outbox import Outbox
from functrain.loop.record.plainly import plainly
from functrain.loop.record.sections import Began, Ended, How
from functrain.loop.remote.address import cache_of, is_address
from functrain.loop.remote.limits import Limits
from functrain.loop.remote.store import Store
from functrain.loop.run import Run
from functrain.mesh.shares import Shardings
from functrain.tree.warn import warn
from functrain.update.state import TrainState
from functrain.update.update import Update


class Record(Hook):
    """Keeps what a run leaves for people in a folder, for `fit(..., record=)` or a loop of one's own.

    >>> import functrain as ft, jax.numpy as jnp, json, optax, tempfile
    >>> params = {"w": jnp.ones(2)}
    >>> optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    >>> update = ft.make_update(lambda params, batch: jnp.sum((params["w"] * batch) ** 2), optim)
    >>> state, folder = update.init(params), tempfile.mkdtemp()
    >>> with Record(folder, config={"rate": 0.1}, report=False) as record:
    ...     record.begin(update, state)
    ...     for _ in range(3):
    ...         state, metrics = update(state, 1.0)
    ...         record.log(int(state.step), {"train/loss": metrics["loss"]})
    ...     record.end(state)
    >>> json.loads((Path(folder) / "run.json").read_text())["config"], (Path(folder) / "log.jsonl").exists()
    ({'rate': 0.1}, True)

    `run.json` says what was trained by what, from which configuration, command line and commit, with which packages on
    which devices. Each time that the run is started again it gets a section more, with what of these changed. Each row
    of `log.jsonl` stands there once, however often the run was killed. At the end the last and the best state are
    evaluated, and numbers go to `results.json`, arrays and figures to `results/`; `report.html` shows all of it. No
    environment variable, token or home folder is written.

    What fails of a record, as with a full disk, is warned of and ends no run. The record of an earlier run in the
    folder is moved to a folder "before-1" in it, unless the run goes on with it.

    Args:
      directory: the folder; by custom that of the run, with its checkpoints in `checkpoints/`. Or an address, such as
        "s3://bucket/digits", to which its files are sent in the background as they grow.
      config: what you want to remember, and to compare: a mapping, a dataclass or a namespace, nested as you like.
      source: a folder of code; the files in it that git knows are kept, with the patch from their commit.
      final: what evaluates the run at its end, one or several with different names.
      report: False to write no report at the end; `functrain report` writes it at any time.
      staging: of a record at an address, the folder of this machine in which it is written; by default in the user's
        cache.
      limits: of an address, how long it may take.
      lock: False on a file system without locks, where you see to it that one process writes at a time.

    Attributes:
      directory: the folder.
      config: as it is written.
      final: the evaluations at the end.

    Raises:
      RecordError: an argument that is none of these, or a package that the report needs is missing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: Any = None,
        source: str | os.PathLike[str] | None = None,
        final: Evaluation | Sequence[Evaluation] = (),
        report: bool = True,
        staging: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        lock: bool = True,
    ) -> None:
        _check_given(directory, final)
        store = _store_of(directory, staging, limits)
        here = Path(directory if store is None else staging or cache_of(store.address))
        self.directory = here.expanduser().absolute()
        self.final = [final] if isinstance(final, Evaluation) else [*final]
        _check(self.directory, self.final, source, report=report)
        masks = Masks.of_this_process()
        self.config: dict[str, Any] = masks.values(_mapping(plainly({} if config is None else config)))
        self._folder = RecordFolder(self.directory)
        code = None if source is None else Path(source).expanduser().absolute()
        name = self.directory.name if store is None else str(store.address).rpartition("/")[2]
        self._keeper = Keeper(self._folder, name, masks, self.config, code, report=report)
        self._lock = Lock(self.directory, wanted=lock, name=".record.lock", what="a record")
        self._outbox = None if store is None else Outbox(store, self._folder)
        self._log: JsonLines | None = None
        self._is_through = False

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """The numbers of the final evaluation, `{"last": {"test/loss": ...}, "best valid/loss": ...}`."""
        return self._keeper.results

    @property
    def log_file(self) -> Path:
        """The file of its rows."""
        return self.directory / LOG

    @property
    def files(self) -> list[Path]:
        """The files of it that are there, without the log."""
        return [path for path in self._folder.files() if path != self.log_file]

    # In a loop of one's own.

    def begin(self, update: Update, state: TrainState, *, checkpoints: Checkpoints | None = None) -> None:
        """Begins the record of a run, or goes on with it where the state has made steps.

        Args:
          update: what trains.
          state: which the loop begins with, new or restored.
          checkpoints: of which the best are evaluated at the end.

        Raises:
          RecordError: it is of a newer functrain, or `source` is no folder that git knows.
          CheckpointError: another process writes to it.
        """
        step = int(state.step)
        self.prepare(update, state, None)
        self.open(goes_on=step > 0)
        if jax.process_index() == 0:
            self._log = JsonLines(self.log_file)
            self._log.resume(step or -1)
        self._keeper.attach(update, checkpoints)
        self._keeper.begin(state, Began(step, None, None))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes numbers of a step, by name, to the log; what is on a device is fetched.

        Raises:
          RecordError: the record was not begun.
          LogError: what is no number.
        """
        self._check_begun("log(step, row)")
        if self._log is not None:
            self._log.log(step, row)
            self._send()

    def end(self, state: TrainState, *, why: str | None = None) -> None:
        """Evaluates the last and the best state, and writes the results and the report.

        Args:
          state: the last one.
          why: the run ended before its end; None if it did not.

        Raises:
          RecordError: the record was not begun.
        """
        self._check_begun("end(state)")
        self._keeper.end(Ended(int(state.step), None, None, "stopped" if why else "finished", why))
        self._keeper.conclude(state)

    def close(self) -> None:
        """Nothing more will be written; may be called twice."""
        self._keeper.close()
        if self._log is not None:
            self._log.close()
        self._log = None
        if self._outbox is not None and self._lock.is_held:
            self._outbox.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and self._keeper.update is not None:
            self._keeper.end(Ended(None, None, None, "failed", said(error)))
            self._keeper.write_report()
        elif self._keeper.is_open:
            warn(f"the record {self.directory} was left without record.end(state): nothing was evaluated, nor a report")
            self._keeper.end(Ended(None, None, None, "stopped", "it was left without record.end(state)"))
        self.close()

    # In `fit`.

    def open(self, *, goes_on: bool, aside: Path | None = None) -> None:
        """Makes the folder, keeps other processes from writing to it, and moves what is of another run out of the way.

        Args:
          goes_on: whether the run goes on with the record that is there.
          aside: where else to than to a folder "before-1".

        Raises:
          CheckpointError: another process writes to it.
        """
        if jax.process_index() or self._lock.is_held:
            return
        self._lock.acquire()
        moved: object = None if goes_on else self._folder.clear(aside)
        if self._outbox is not None and goes_on:
            self._outbox.bring()
        elif self._outbox is not None:
            moved = self._outbox.clear() or moved
        if moved is not None:
            print(f"a new run begins; the record of the one before is kept in {moved}")

    def prepare(self, update: Update, state: TrainState, sharding: Shardings) -> None:
        """Finds a mistake in the final evaluations before the first update, on shapes.

        Raises:
          EvaluationError: an `eval_step`, a metric or data that do not fit each other.
          FitError: one is of averages, and the update has none.
        """
        self._keeper.final = prepared(self.final, update, sharding)
        for each in self._keeper.final:
            each.names(state.params, state.model_state)

    def run_started(self, run: Run) -> None:
        """Begins a section, unless nothing is left to do."""
        self._keeper.attach(run.update, run.checkpoints)
        self._is_through = run.was_through or run.stopped is not None
        if not self._is_through:
            checkpoint = None if run.went_on_from is None else run.went_on_from.name
            self._keeper.begin(run.state, Began(run.step, run.epoch, checkpoint))

    def evaluation_ended(self, run: Run) -> None:
        """Writes what came up."""
        self._note(run)

    def epoch_ended(self, run: Run) -> None:
        """Writes what came up."""
        self._note(run)

    def checkpoint_saved(self, run: Run) -> None:
        """Writes what came up."""
        self._note(run)

    def run_ended(self, run: Run, error: BaseException | None) -> None:
        """Ends the section; a run that has come to its end is evaluated."""
        if self._keeper.update is None:
            return
        self._keeper.note(run.state, run.batch)
        how: How = "failed" if error is not None else "finished" if run.stopped is None else "stopped"
        why = run.stopped if error is None else said(error)
        self._keeper.end(Ended(run.step, run.epoch, run.now.seconds, how, why))
        if error is not None or run.is_interrupted:
            self._keeper.write_report()
        elif self._is_through and self._keeper.is_evaluated(run.step):
            self._keeper.results = self._folder.results()
        else:
            self._keeper.conclude(run.state)

    @property
    def sent(self) -> Callable[[], None] | None:
        """Of a record at an address, what returns when all that was written is there."""
        return None if self._outbox is None else self._outbox.sent

    def _note(self, run: Run) -> None:
        self._keeper.note(run.state, run.batch)
        self._send()

    def _send(self) -> None:
        if self._outbox is not None and self._lock.is_held:
            self._outbox.send()

    def _check_begun(self, call: str) -> None:
        if self._keeper.update is None:
            raise RecordError(f"record.{call} before the record was begun: record.begin(update, state) comes first")


def _check_given(directory: Any, final: Any) -> None:
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise RecordError(f"Record({directory!r:.100}): give the folder of the run, ft.Record('runs/digits')")
    if not isinstance(final, Evaluation | Sequence):
        raise RecordError(f"final={final!r:.100} is no Evaluation: write final=ft.Evaluation(eval_step, test)")


def _store_of(directory: Any, staging: Any, limits: Limits | None) -> Store | None:
    """The address of a record, if it has one."""
    if not is_address(directory):
        if staging is not None or limits is not None:
            raise RecordError(
                f"staging= and limits= are for an address such as 's3://bucket/digits', and {os.fspath(directory)!r} is"
                " a folder: leave them out"
            )
        return None
    limits = limits or Limits()
    return Store(os.fspath(directory), timeout=limits.request, patience=limits.patience)


def _check(directory: Path, final: Sequence[Any], source: Any, *, report: bool) -> None:
    if source is not None and (not isinstance(source, str | os.PathLike) or Path(source).is_file()):
        raise RecordError(f"source={source!r:.100} is no folder: give the one of your code, source='src'")
    if directory.is_file():
        raise RecordError(f"{directory} is a file: give the record a folder, ft.Record('runs/digits')")
    for each in final:
        if not isinstance(each, Evaluation):
            raise RecordError(f"final={each!r:.100} is no Evaluation: write final=ft.Evaluation(eval_step, test)")
    names = [each.name for each in final]
    if len({*names}) < len(names):
        raise RecordError(f"two final evaluations have one name: {names}; give each its own, Evaluation(..., name=)")
    if report and find_spec("matplotlib") is None:
        raise RecordError(
            "the report of a record is drawn by matplotlib: pip install 'functrain[record]', or report=False"
        )


def _mapping(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise RecordError(f"config={config!r:.100}: give names to the values, config={{'width': 64}}")
    return config
