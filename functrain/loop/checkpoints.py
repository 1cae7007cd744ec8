"""Checkpoints: the whole state of a run on disk, verified before it is trained on."""

import base64
import contextlib
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from functrain.loop import manifest
from functrain.loop.every import Every
from functrain.loop.fingerprint import (
    CheckpointError,
    differences,
    fingerprint,
    listed_lines,
    named_leaves,
    rebuilt,
    shape_dtype,
    spec,
    window_form,
)
from functrain.loop.regroup import regrouped
from functrain.paths import flatten
from functrain.state import TrainState, replicated_over

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/.*")
_NAME = re.compile(r"(\d+)(?:\+(\d+))?(?:~(\d+))?")
_COUNTERS = ("step", "batches", "pending")
_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")
_VERSIONS = ("functrain", "jax", "optax", "orbax-checkpoint", "numpy")


class SaveError(OSError):
    """A checkpoint that could not be written. The one before it is whole, and the next save is tried as ever."""


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


class Checkpoints:
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
        beside = {"data": _encoded("data", data), "metrics": metrics, "extra": _encoded("extra", extra)}
        content = zlib.crc32(json.dumps(beside).encode())
        name = self._agreed(self._name(state, content) if jax.process_index() == 0 else None)
        if name is None:
            return
        if self._failure is not None:
            warnings.warn(f"{self._failure}; saving again now", stacklevel=2)
        step = self.directory / name
        named = named_leaves(state)
        facts = {
            "leaves": fingerprint(state),
            "window": window_form(state.window),
            "window_leaves": {name: spec(leaf) for name, leaf in named.items() if name.startswith("window/")},
            "configuration": json.loads(state.configuration),
            **beside,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        }
        leaves = _apart({name: leaf for name, leaf in named.items() if jnp.size(leaf)})  # Orbax refuses empty ones.
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

    def _name(self, state: TrainState, content: int) -> str | None:
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
            kept = self._kept() | {step}
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
        if broken is not None:
            with contextlib.suppress(Exception):
                broken.close()
        if jax.process_index() == 0:
            for left in self.directory.glob(f"{step.name}.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        return self._failure

    # Looking.

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

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the metrics have a finite value of `keep_best` that is better than that of every checkpoint."""
        if self.keep_best is None:
            return False
        with contextlib.suppress(SaveError):
            self.wait()
        is_better = jax.process_index() == 0 and self._is_better(metrics)
        return self._agreed("it is" if is_better else None) is not None

    def _is_better(self, metrics: Mapping[str, Any]) -> bool:
        assert self.keep_best is not None
        value = float(metrics.get(self.keep_best, math.nan))
        best = self.best()
        if best is None or not math.isfinite(value):
            return math.isfinite(value)
        before = self._summary(best)["metrics"][self.keep_best]
        return bool(value < before if self.mode == "min" else value > before)

    def _kept(self) -> set[Path]:
        best = self.best()
        return set(self.steps()[-self.keep_last :]) | ({best} if best else set())

    def _summary(self, step: Path) -> dict[str, Any]:
        """What the manifest says of a checkpoint, or where a killed process wrote none, what it holds itself."""
        with contextlib.suppress(ValueError, OSError):
            found = manifest.read(step)
            return json.loads((step / "facts" / "metadata").read_bytes()) if found is None else found
        return {}

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
        for path in [self._asked_for(step)] if asked else self._newest_first():
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
                raise CheckpointError(
                    f"the checkpoint {path} is damaged: {problem}; restore another of {self._names()}"
                )
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
        places = _places(specs, facts["configuration"], like)
        targets = {name: _target(name, specs[name], places[name]) for name in specs if name not in empty}
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(targets, restore_args=restore_args))
        read = self._checkpointer().restore(path, args=args)["state"]
        leaves = {name: _own(leaf, places[name]) for name, leaf in read.items()}
        for name in empty:
            leaves[name] = jax.device_put(jnp.zeros(*shape_dtype(specs[name])), places[name])
        if differs:
            leaves, report = regrouped(leaves, facts, like)
            print(report)
        state = rebuilt(leaves, like, facts["window"])
        return Restored(state, _decoded(facts["data"]), facts["metrics"], _decoded(facts["extra"]), path)

    def _newest_first(self) -> list[Path]:
        """Every checkpoint, and those of which only the manifest is left."""
        suffix = manifest.path_of(Path("N")).name.removeprefix("N")
        of_manifests = {path.with_name(path.name.removesuffix(suffix)) for path in self.directory.glob(f"*{suffix}")}
        return sorted({*self.steps(), *(path for path in of_manifests if _order(path))}, key=_order, reverse=True)

    def _asked_for(self, step: int | Path | None) -> Path:
        if isinstance(step, Path):
            return step.absolute()
        found = [path for path in self._newest_first() if path.name.split("~")[0] == str(step)]
        if not found:
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.directory}: there are {self._names()}"
            )
        return found[0]

    def _names(self) -> str:
        return ", ".join(path.name for path in self.steps()) or "none"

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


def _order(path: Path) -> Any:
    """What orders checkpoints in time; None for what is none."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    step, pending, batches = (int(number or 0) for number in match.groups())
    return step, batches, pending


def _places(names: Iterable[str], configuration: Mapping[str, Any], like: TrainState) -> dict[str, Any]:
    """The sharding of each leaf: where the state that is asked for has it; None where JAX may move it, as in there."""

    def asked(leaf: Any) -> Any:
        return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None

    here = {name: asked(leaf) for name, leaf in named_leaves(like).items()}
    of_params = {path: asked(leaf) for path, leaf in flatten(like.params).items()}
    for part, paths in configuration.get("parts", {}).items():
        here |= {f"window/sums/0/{part}/{path}": of_params.get(path) for path in paths}
    return {name: here.get(name) or replicated_over(like.params) for name in names}


def _target(name: str, written: str, place: Any) -> Any:
    """What Orbax is to restore a leaf as: with its saved shape and dtype."""
    shape, dtype = shape_dtype(written)
    if name in _COUNTERS:
        return np.zeros(shape, dtype)
    of_dtype = _key_dtypes()[dtype] if dtype.startswith("key<") else dtype
    somewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(shape, of_dtype, sharding=place or somewhere)


@functools.cache
def _key_dtypes() -> dict[str, Any]:
    """The dtypes of random keys by name: 'key<fry>'."""
    made = [jax.eval_shape(functools.partial(jax.random.key, 0, impl=impl)) for impl in _KEYS]
    return {str(key.dtype): key.dtype for key in made}


def _apart(leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves for Orbax to read while training goes on.

    On a CPU Orbax reads JAX's own buffers, which an update can't write into meanwhile: it would take new ones for the
    whole state, five times as slow as a copy for Orbax. From an accelerator Orbax copies by itself.
    """
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    if any(device.platform != "cpu" for leaf in arrays.values() for device in leaf.devices()):
        return leaves
    copies: dict[str, Any] = _copied(arrays)
    return leaves | copies


@jax.jit
def _copied(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.copy(array) for name, array in arrays.items()}


def _own(leaf: Any, place: Any) -> Any:
    """A leaf in memory that is JAX's own, as the first update overwrites it; on no device for good without a place."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if place is not None:
        return jnp.array(leaf, copy=True)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jnp.array(np.asarray(jax.random.key_data(leaf)), copy=True)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.array(np.asarray(leaf), copy=True)


def _encoded(name: str, value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}= of a checkpoint: {error}; give what JSON can hold, or bytes") from None
    return {"json": value}


def _decoded(value: Any) -> Any:
    return base64.b64decode(value["bytes"]) if "bytes" in value else value["json"]
