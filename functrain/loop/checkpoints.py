"""Checkpoints: the whole state of a run on disk, verified before it is trained on."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from functrain.errors import CheckpointError, SaveError
from functrain.loop import manifest
from functrain.loop.every import Every
from functrain.loop.facts import decoded, encoded, facts_of
from functrain.loop.fingerprint import differences, named_leaves, rebuilt, shape_dtype
from functrain.loop.folder import Folder
from functrain.loop.placement import apart, own, places, target
from functrain.loop.regroup import regrouped
from functrain.tree.text import listed_lines
from functrain.update.state import TrainState

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/.*")


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: the state, ready for the next update.
      data: the position in the data that was saved with it.
      metrics: the metrics that were saved with it.
      extra: what else was saved with it.
      path: its folder.
    """

    state: TrainState
    data: Any
    metrics: dict[str, float]
    extra: Any
    path: Path


class Checkpoints(Folder):
    """A folder of checkpoints, written by Orbax while training goes on.

    >>> import functrain as ft, optax, tempfile
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
    last. On restore the checksums are verified: a damaged checkpoint is renamed to "120.corrupt", with a warning, and
    the newest sound one is used. One process at a time may write to a folder (or the processes of one `jax.distributed`
    run). Close it, as `with` does: a save that is still going on when a program ends without that is lost.

    Args:
      directory: a folder on a local or mounted file system; it is made.
      every: when `fit` saves; by default at the end of each epoch. Read by nothing but `fit`.
      keep_last: how many of the newest to keep.
      keep_best: a metric, such as "valid/loss", of which the best checkpoint is kept too; NaN is never best.
      mode: "min" if smaller is better, "max" if larger.
      asynchronous: False to have `save` return when all is on disk.

    Raises:
      CheckpointError: a directory that is an address of remote storage, or an option that is none of these.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: Every | None = None,
        keep_last: int = 2,
        keep_best: str | None = None,
        mode: Literal["min", "max"] = "min",
        asynchronous: bool = True,
    ) -> None:
        if _ADDRESS.fullmatch(os.fspath(directory)):  # A Path has made one slash of two.
            raise CheckpointError(f"{os.fspath(directory)!r} is no folder: mount the storage, and give the path there")
        if not isinstance(keep_last, int) or keep_last < 1:
            raise CheckpointError(f"keep_last={keep_last!r}: give a whole number of at least 1")
        if mode not in ("min", "max"):
            raise CheckpointError(f"mode={mode!r}: write 'min' or 'max'")
        self.directory = Path(directory).absolute()
        self.every = every or Every(epochs=1)
        self.keep_last, self.keep_best, self.mode = keep_last, keep_best, mode
        self._asynchronous = asynchronous
        self._orbax: Any = None
        self._lock: Any = None
        self._thread: ThreadPoolExecutor | None = None
        self._finishing: Future[None] | None = None
        self._failure: SaveError | None = None
        self._spare: dict[str, jax.Array] = {}

    # Writing.

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
          CheckpointError: another process writes to the folder, `data` or `extra` is not what JSON can hold, or the
            metrics of a pending window have no names.
        """
        self.open()
        with contextlib.suppress(SaveError):
            self.wait()
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        beside = {"data": encoded("data", data), "metrics": metrics, "extra": encoded("extra", extra)}
        content = zlib.crc32(json.dumps(beside).encode())
        name = self._agreed(self.name(state, content) if jax.process_index() == 0 else None)
        if name is None:
            return
        if self._failure is not None:
            warnings.warn(f"{self._failure}; saving again now", stacklevel=2)
        step = self.directory / name
        facts, named = facts_of(state, beside), named_leaves(state)
        # Orbax refuses empty leaves.
        leaves, self._spare = apart({name: leaf for name, leaf in named.items() if jnp.size(leaf)}, self._spare)
        summary = {"batches": int(state.batches), "content": content, "metrics": metrics, "time": time.time()}
        import orbax.checkpoint as ocp

        try:
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), facts=ocp.args.JsonSave(facts))
            self._checkpointer().save(step, args=args)
        except Exception as error:
            raise self._failed(step, error) from error
        assert self._thread is not None
        self._finishing = self._thread.submit(self._finish, step, summary)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          SaveError: it failed.
        """
        if self._finishing is not None:
            self._finishing.result()
            self._finishing = None
        if self._failure is not None:
            raise self._failure

    def open(self) -> None:
        """Makes the folder, keeps other processes from writing to it, and clears what a killed one left half done.

        Raises:
          CheckpointError: another process writes to it.
          SaveError: it can't be made or written to.
        """
        if self._thread is not None:
            return
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = (self.directory / ".lock").open("w")
            except OSError as error:
                raise SaveError(f"the folder of checkpoints {self.directory} can't be written to: {error}") from error
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                self._lock = None
                raise CheckpointError(
                    f"another process writes checkpoints to {self.directory}: wait for it or stop it, or give this run"
                    " a folder of its own"
                ) from None
            manifest.clear(self.directory)
        self._thread = ThreadPoolExecutor(1, "functrain-checkpoints")

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

    def _release(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if self._orbax is not None:
            self._orbax.close()
        if self._lock is not None:
            self._lock.close()
        self._thread = self._orbax = self._lock = None
        self._spare = {}

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp

            # Compressing takes five times the processor time of writing, and trained weights hardly shrink.
            arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers = {"state": arrays, "facts": ocp.JsonCheckpointHandler()}
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        return self._orbax

    def _finish(self, step: Path, summary: Mapping[str, Any]) -> None:
        """What follows Orbax's own work, on a thread: the manifest, and the removal of what is no longer kept."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.publish(step, summary)
        except Exception as error:
            self._failed(step, error)
            return
        self._failure = None
        if jax.process_index() == 0:
            kept = self.kept() | {step}
            for other in self.steps():
                if other not in kept:
                    try:
                        manifest.remove(other)
                    except OSError as error:
                        warnings.warn(f"the checkpoint {other} could not be removed: {error}", stacklevel=2)

    def _failed(self, step: Path, error: Exception) -> SaveError:
        self._failure = SaveError(
            f"the checkpoint {step} could not be written: {type(error).__name__}: {error}; the one before it is whole,"
            " make room or mend the folder, the next save is tried as ever"
        )
        # An Orbax checkpointer that failed reports it again, and loses the next save.
        broken, self._orbax = self._orbax, None
        self._spare = {}
        if broken is not None:
            with contextlib.suppress(Exception):
                broken.close()
        if jax.process_index() == 0:
            for left in self.directory.glob(f"{step.name}.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        return self._failure

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the metrics have a finite value of `keep_best` that is better than that of every checkpoint."""
        if self.keep_best is None:
            return False
        with contextlib.suppress(SaveError):
            self.wait()
        is_better = jax.process_index() == 0 and self.is_better(metrics)
        return self._agreed("it is" if is_better else None) is not None

    # Reading.

    def restore(self, like: TrainState, *, step: int | Path | None = None, regroup: bool = False) -> Restored | None:
        """Reads the newest sound checkpoint; a save that is going on is waited for.

        Args:
          like: what to restore it as, `update.abstract(params, ...)` or a state: structure, dtypes, and where each
            leaf goes, on this mesh or another.
          step: the number of a step, or a folder of `steps()`, in the place of the newest.
          regroup: take parameters into another partition, or to other optimizers: what a leaf's path and a transform's
            field have in common is carried over, the rest starts anew; a report is printed.

        Returns:
          What was restored; None if there is no checkpoint.

        Raises:
          CheckpointError: a checkpoint does not fit `like` (says what differs), or the one asked for is not there, or
            damaged.
        """
        with contextlib.suppress(SaveError):  # The next save tells.
            self.wait()
        asked = step is not None
        for path in [self.asked_for(step)] if asked else self.newest_first():
            problem = self._agreed(manifest.damage(path) if jax.process_index() == 0 else None)
            if problem is None:
                try:
                    restored = self._read(path, like, regroup)
                except CheckpointError:
                    raise
                except Exception as error:
                    if manifest.path_of(path).exists():
                        raise
                    problem = f"it has no manifest, and cannot be read: {error}"
                else:
                    if not manifest.path_of(path).exists():
                        warnings.warn(
                            f"the checkpoint {path} is unverified: it has no manifest of checksums", stacklevel=2
                        )
                    return restored
            if asked:
                raise CheckpointError(f"the checkpoint {path} is damaged: {problem}; restore another of {self.names()}")
            self._set_aside(path, problem)
        return None

    def _read(self, path: Path, like: TrainState, regroup: bool) -> Restored:
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(facts=ocp.args.JsonRestore())
        facts: dict[str, Any] = self._checkpointer().restore(path, args=args)["facts"]
        differs = differences(facts, like)
        if differs and not regroup:
            raise CheckpointError(
                f"the checkpoint {path} does not fit the state that is asked for:{listed_lines(differs)}\nrestore it"
                " with the update that it was saved from, or, if only parts or optimizers are others, regroup=True"
            )
        specs = {**facts["leaves"], **facts["window_leaves"]}
        empty = {name for name in specs if math.prod(shape_dtype(specs[name])[0]) == 0}
        where = places(specs, facts["configuration"], like)
        targets = {name: target(name, specs[name], where[name]) for name in specs if name not in empty}
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(targets, restore_args=restore_args))
        read = self._checkpointer().restore(path, args=args)["state"]
        leaves = {name: own(leaf, where[name]) for name, leaf in read.items()}
        for name in empty:
            leaves[name] = jax.device_put(jnp.zeros(*shape_dtype(specs[name])), where[name])
        if differs:
            leaves, report = regrouped(leaves, facts, like)
            print(report)
        state = rebuilt(leaves, like, facts["window"])
        return Restored(state, decoded(facts["data"]), facts["metrics"], decoded(facts["extra"]), path)

    def _set_aside(self, path: Path, problem: str) -> None:
        is_reader = self._thread is None
        with contextlib.suppress(CheckpointError, SaveError):
            self.open()
        name = path.name
        if self._lock is not None:
            name = manifest.set_aside(path).name
        self._agreed(None)
        if is_reader:
            self._release()
        warnings.warn(
            f"THE CHECKPOINT {path} IS DAMAGED and is not used: {problem}. What is left of it is kept as {name!r};"
            " training goes on from an older one",
            stacklevel=3,
        )

    def _agreed(self, problem: str | None) -> str | None:
        """What process 0 found, in every process."""
        if jax.process_count() == 1:
            return problem
        text = np.zeros(1000, np.uint8)
        encoded = (problem or "").encode()[:1000]
        text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        return bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0").decode() or None
