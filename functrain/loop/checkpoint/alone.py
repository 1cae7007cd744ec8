"""Parameters without the optimizer that trained them: for inference, or to begin another run with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.asked import of_leaves
from functrain.loop.checkpoint.best import best_in
from functrain.loop.checkpoint.contents import Contents
from functrain.loop.checkpoint.finding import Finder
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.checkpoint.leaves import leaf_spec
from functrain.loop.checkpoint.placement import HOST
from functrain.loop.checkpoint.places import folder_of
from functrain.loop.checkpoint.retention import Retention
from functrain.loop.checkpoint.storage import Storage
from functrain.tree.arrays import committed_sharding
from functrain.tree.paths import flatten, unflatten
from functrain.tree.rest import apart
from functrain.tree.text import listed_lines
from functrain.tree.warn import warn

_Read = TypeVar("_Read")


def load_params(
    directory: str | os.PathLike[str], *, like: Any, step: int | Path | None = None, best: bool | str = False
) -> Any:
    """Reads the parameters of a checkpoint, and nothing else of it.

    >>> import functrain as ft, jax, jax.numpy as jnp, optax, tempfile
    >>> params = {"w": jnp.ones(2)}
    >>> optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    >>> update = ft.make_update(lambda params, batch: jnp.sum(params["w"] * batch), optim)
    >>> with ft.Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(update.init(params))
    >>> load_params(checkpoints.directory, like=jax.eval_shape(lambda: params))["w"].tolist()
    [1.0, 1.0]

    Args:
      directory: the folder of checkpoints, or their address: what is read is kept in the user's cache.
      like: parameters, or `jax.ShapeDtypeStruct`s in their place: structure, shapes, dtypes, and where each leaf goes.
        What is no array in it, such as the functions in a module of Equinox, stays as it is.
      step: the number of a step, or a folder of `Checkpoints.steps()`; by default the newest sound one.
      best: True for the best checkpoint by its run's `keep_best`, or the name of one of several.

    Returns:
      A tree of the structure of `like`.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, or its parameters are not those that are asked for.
    """
    return _load("params", directory, like, step, best)


def load_model_state(
    directory: str | os.PathLike[str], *, like: Any, step: int | Path | None = None, best: bool | str = False
) -> Any:
    """Reads the model state of a checkpoint, such as the statistics of batch norm; otherwise as `load_params`."""
    return _load("model_state", directory, like, step, best)


def _load(field: str, directory: str | os.PathLike[str], like: Any, step: int | Path | None, best: bool | str) -> Any:
    folder = folder_of(directory)
    folder.look()
    if best is not False:
        if step is not None:
            raise CheckpointError(f"step={step} beside best={best!r}: give one of them")
        step = best_in(folder, Retention(), best if isinstance(best, str) else None)
        if step is None:
            raise CheckpointError(f"no checkpoint in {folder.where} has a finite value of what the best is kept by")
    return _found(folder, step, lambda storage, checkpoint: _read(storage, checkpoint, field, like))[0]


class Leaves(NamedTuple):
    """Leaves of a checkpoint by name, on the host; which one it is, for a message too, and what else it holds."""

    checkpoint: Path
    shown: str
    contents: Contents
    named: dict[str, np.ndarray]


def host_leaves(folder: Folder, step: int | Path | None, is_asked: Callable[[str], bool]) -> Leaves:
    """Reads leaves of a checkpoint by name, as they were saved and on no device; random keys as what they consist of.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
    """

    def read(storage: Storage, checkpoint: Path) -> Leaves:
        contents = storage.contents(checkpoint)
        places = dict.fromkeys(filter(is_asked, contents.specs), HOST)
        return Leaves(
            checkpoint, folder.shown(checkpoint), contents, storage.leaves(checkpoint, contents, places, only=places)
        )

    return _found(folder, step, read)


def _found(folder: Folder, step: int | Path | None, read: Callable[[Storage, Path], _Read]) -> _Read:
    storage = Storage()
    finder = Finder(folder, lambda checkpoint: checkpoint.name)
    try:
        found = finder.found(step, lambda checkpoint: read(storage, checkpoint))
    finally:
        storage.close()
        for text in finder.told:
            warn(text)
    if found is None:
        raise CheckpointError(f"there is no checkpoint in {folder.where}: give the folder of a run's checkpoints")
    return found


def _read(storage: Storage, checkpoint: Path, field: str, like: Any) -> tuple[Any]:
    arrays, whole = apart(like)
    contents, named = storage.contents(checkpoint), flatten({field: arrays})
    differs = of_leaves(
        {name: spec for name, spec in contents.leaves.items() if name == field or name.startswith(f"{field}/")},
        {name: leaf_spec(leaf) for name, leaf in named.items()},
    )
    if differs:
        raise CheckpointError(
            f"the {field} of the checkpoint {checkpoint} are not those that are asked for:{listed_lines(differs)}\n"
            f"give like= the {field} of the model that was trained"
        )
    places = {name: committed_sharding(leaf) for name, leaf in named.items()}
    leaves = storage.leaves(checkpoint, contents, places, only=named)
    return (whole(unflatten(leaves, like={field: arrays})[field]),)
