"""Checkpoints: the whole state of a run on disk, verified before it is trained on."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from functrain.errors import CheckpointError, SaveError
from functrain.loop.checkpoint.asked import Asked
from functrain.loop.checkpoint.best import best_in, is_best
from functrain.loop.checkpoint.contents import Beside
from functrain.loop.checkpoint.describing import contents_of
from functrain.loop.checkpoint.finding import Finder
from functrain.loop.checkpoint.leaves import named_leaves
from functrain.loop.checkpoint.processes import found_by_first
from functrain.loop.checkpoint.reading import Restored, read
from functrain.loop.checkpoint.remote import place_of
from functrain.loop.checkpoint.retention import Best, Mode, Retention
from functrain.loop.checkpoint.storage import Storage
from functrain.loop.checkpoint.writer import Writer
from functrain.loop.every import Every
from functrain.loop.remote.limits import Limits
from functrain.tree.text import listed_lines
from functrain.tree.warn import warn
from functrain.update.consumed import check_not_deleted
from functrain.update.state import TrainState


class Checkpoints:
    """A folder of checkpoints, written by Orbax while training goes on.

    >>> import functrain as ft, jax.numpy as jnp, optax, tempfile
    >>> params = {"w": jnp.ones(2)}
    >>> optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    >>> update = ft.make_update(lambda params, batch: jnp.sum(params["w"] * batch), optim)
    >>> state, _ = update(update.init(params), 2.0)
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(state, data={"position": 1})
    ...     checkpoints.wait()
    ...     restored = checkpoints.restore(like=update.abstract(params))
    >>> int(restored.state.step), restored.data, bool((restored.state.params["w"] == state.params["w"]).all())
    (1, {'position': 1}, True)

    A checkpoint is a folder named by its step, "120", or "120+3" for three batches pending in a window, with a number
    behind a "~" where an older one of that step is there, and with a manifest of checksums beside it, which is written
    last, when all else is on the disk. On restore the checksums are verified: a damaged checkpoint is renamed to
    "120.corrupt", with a warning, and the newest sound one is used. What is in the folder besides is left alone,
    whatever its name. One process at a time may write to a folder (or the processes of one `jax.distributed` run).
    Close it, as `with` does, to let others write there; a program that ends without that ends its last save first.

    Args:
      directory: a folder on a local or mounted file system, which is made; or an address, `s3://bucket/digits`, `gs://`,
        `az://`, `file://` or `memory://`, to which checkpoints are sent while training goes on.
      every: when `fit` saves; by default at the end of each epoch. Read by nothing but `fit`.
      keep_last: how many of the newest to keep.
      keep_best: a metric, such as "valid/loss", of which the best checkpoint is kept too; NaN is never best. Several,
        each with its mode, how many, or both: {"valid/loss": 3, "valid/accuracy": "max", "valid/f1": ("max", 3)}.
      mode: "min" if a smaller metric is better, "max" if a larger one; of a loss or an error it need not be said.
      asynchronous: False to have `save` return when all is on disk.
      lock: False on a file system without locks, where you see to it that one process writes at a time.
      staging: of an address, the folder here that is written to first; by default one in the user's cache.
      limits: of an address, how long it may take.

    Attributes:
      directory: the folder; of an address the one here.
      where: the folder or the address, for messages.

    Raises:
      CheckpointError: a directory that is a file, or an option that is none of these.
      StorageError: an address that is none, or obstore is not installed; in methods, an address that can't be read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: Every | None = None,
        keep_last: int = 2,
        keep_best: str | Mapping[str, Best] | None = None,
        mode: Mode | None = None,
        asynchronous: bool = True,
        lock: bool = True,
        staging: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        if every is not None and not isinstance(every, Every):
            raise CheckpointError(f"every={every!r}: give an Every, ft.Every(updates={every!r})")
        self.every = every or Every(epochs=1)
        self.retention = Retention.of(keep_last, keep_best, mode)
        self._asynchronous = asynchronous
        self._place = place_of(directory, self.retention, lock=lock, staging=staging, limits=limits)
        self._folder, self._storage = self._place.folder, Storage()
        self.directory, self.where = self._folder.directory, self._folder.where
        self._writer = Writer(self._storage, self._place.staging, self._place.sender)

    def save(
        self, state: TrainState, *, data: Any = None, metrics: Mapping[str, float] | None = None, extra: Any = None
    ) -> None:
        """Starts to write a checkpoint, and returns when the state may be trained on.

        If the save before it failed in the background, that is warned of here, and this one is the next try.

        Args:
          state: of any moment, a pending window included.
          data: the position in the data: what JSON can hold, or bytes; a Grain iterator's `get_state()`.
          metrics: for `keep_best`.
          extra: more that JSON can hold, or bytes.

        Raises:
          SaveError: it could not be written.
          CheckpointError: what is no `TrainState`, another process writes to the folder, `data` or `extra` is not what
            JSON can hold, or the metrics of a pending window have no names.
          UpdateError: an update has consumed the state.
        """
        leaves = _leaves_to_save(state)
        self.open()
        self._place.check()
        with contextlib.suppress(SaveError):
            self._writer.wait_for_disk()
        beside = Beside.of(data, metrics, extra)
        name = found_by_first(lambda: self._folder.next_name(state, beside.checksum))
        if name is None:
            return
        if self._writer.failure is not None:
            warn(f"{self._writer.failure}; saving again now")
        self._writer.write(
            name,
            leaves,
            contents_of(state, leaves, beside),
            summary={
                "batches": int(state.batches),
                "content": beside.checksum,
                "metrics": beside.metrics,
                "best": self.retention.best,
                "time": time.time(),
            },
            then=self._place.saved,
        )
        if not self._asynchronous:
            self.wait()

    def send_first(self, call: Callable[[], None]) -> None:
        """Has a function be called before a checkpoint is at an address: what goes with it is there then."""
        self._place.first = call

    def wait(self) -> None:
        """Returns when the last save is on disk, and at the address if there is one.

        Raises:
          SaveError: it failed.
        """
        self._writer.wait()

    @property
    def is_saved(self) -> bool:
        """Whether the last save is on disk, and at the address if there is one: it has ended, and did not fail."""
        return self._writer.is_whole

    def open(self) -> None:
        """Makes the folder, keeps other processes from writing to it, and clears what a killed one left half done.

        Raises:
          CheckpointError: another process writes to it.
          SaveError: it can't be made or written to.
        """
        if self._writer.is_running:
            return
        self._place.open()
        self._writer.start()

    def close(self) -> None:
        """Waits for the last save, and lets others write to the folder; may be called twice.

        Raises:
          SaveError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self.close()
        except SaveError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    # Reading.

    def steps(self) -> list[Path]:
        """The folders of the checkpoints, oldest first."""
        self._place.look()
        return self._folder.checkpoints()

    def best(self, metric: str | None = None) -> Path | None:
        """The folder of the best checkpoint; None if no checkpoint has a finite value of the metric.

        Args:
          metric: one of `keep_best`, of these checkpoints or of those that wrote the newest; not needed if it is one.

        Raises:
          CheckpointError: they keep no best by that metric.
        """
        self._place.look()
        return best_in(self._folder, self.retention, metric)

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the metrics have a finite value of `keep_best` that is better than that of every checkpoint."""
        if not self.retention.best:
            return False
        with contextlib.suppress(SaveError):
            self._writer.wait_for_disk()
        found = found_by_first(lambda: "it is" if is_best(self._folder, self.retention, metrics) else None)
        return found is not None

    def restore(self, like: TrainState, *, step: int | Path | None = None, regroup: bool = False) -> Restored | None:
        """Reads the newest sound checkpoint; a save that is going on is waited for.

        Args:
          like: what to restore it as, `update.abstract(params, ...)` or a state: structure, dtypes, and where each
            leaf goes, on this mesh or another.
          step: the number of a step, or a folder of `steps()`, in the place of the newest.
          regroup: take parameters into another partition, or to other optimizers: what a leaf's path and a transform's
            field have in common is carried over, the rest starts anew; `restored.report` says what became of what.

        Returns:
          What was restored; None if there is no checkpoint.

        Raises:
          CheckpointError: a checkpoint does not fit `like` (says what differs), or the one asked for is not there, or
            damaged.
        """
        _check_state(like, "restore(like=update.abstract(params))")
        with contextlib.suppress(SaveError):  # The next save tells.
            self._writer.wait_for_disk()
        asked, finder = Asked.of(like), Finder(self._folder, lambda checkpoint: self._place.set_aside(checkpoint.name))
        try:
            found_by_first(self._place.look)
            with self._place.reading():
                restored = finder.found(step, lambda found: read(self._storage, found, asked, regroup=regroup))
        finally:
            if not self._writer.is_running:
                self._storage.close()
            for text in finder.told:
                warn(text)
        return _told(restored)

    def start_anew(self) -> Path | None:
        """Moves all checkpoints, damaged ones too, to a folder "before-1", so that the next run is a new one.

        Returns:
          That folder; None if there was nothing to move.

        Raises:
          CheckpointError: another process writes to the folder, or it can't be read.
          SaveError: it can't be written to.
        """
        with contextlib.suppress(SaveError):
            self.wait()
        self.open()
        name = self._place.move_all()
        return None if name is None else self.directory / name

    def _release(self) -> None:
        self._writer.stop()
        self._storage.close()
        self._place.close()


def _leaves_to_save(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by name, all of them there."""
    _check_state(state, "save(state)")
    leaves = named_leaves(state)
    check_not_deleted([*leaves.values()])
    return leaves


def _told(restored: Restored | None) -> Restored | None:
    """Warns of an optimizer that goes on otherwise."""
    if restored is not None and restored.changed:
        warn(
            f"the optimizer goes on with other numbers than {restored.path} was saved with:"
            f"{listed_lines(restored.changed)}\nto go on as it was, write the numbers that were"
        )
    return restored


def _check_state(state: object, call: str) -> None:
    """Raises for what is no state of an update."""
    if not isinstance(state, TrainState):
        raise CheckpointError(
            f"checkpoints are of a TrainState, not of a {type(state).__name__}: checkpoints.{call}, with state ="
            " update.init(params) or what update(state, batch) returns; ft.load_params reads the params alone"
        )
