"""Whether a run goes on with the data that it was saved with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functrain.errors import FitError
from functrain.loop.data import Data
from functrain.tree.warn import warn


def described(data: Any) -> dict[str, Any] | None:
    """What the batches of `from_arrays` and the like follow from, for a checkpoint; None of other data.

    >>> import functrain as ft, numpy as np
    >>> described(ft.from_arrays({"x": np.arange(5)}, batch_size=2, seed=7))
    {'batch_size': 2, 'examples': 5, 'seed': 7, 'shuffle': True, 'last': 'keep'}
    """
    if not isinstance(data, Data):
        return None
    numbers = {name: int(getattr(data, name)) for name in ("batch_size", "examples", "seed")}
    return {**numbers, "shuffle": bool(data.shuffle), "last": data.last}


def check_same(saved: Mapping[str, Any] | None, data: Any, *, path: Path, epoch: int, read: int) -> None:
    """Warns of data that is described otherwise than where it was saved.

    Args:
      saved: what `described` gave; None of a checkpoint that does not say.
      data: what the run goes on with.
      path: the checkpoint.
      epoch: in which it was saved.
      read: the batches of that epoch that were trained on.

    Raises:
      FitError: within an epoch, whose position would be that of other examples.
    """
    now = described(data)
    if saved is None or now is None:
        return
    others = {name: (value, now[name]) for name, value in saved.items() if name in now and now[name] != value}
    if not others:
        return
    was = ", ".join(f"{name}={before!r}" for name, (before, _) in others.items())
    given = ", ".join(f"{name}={after!r}" for name, (_, after) in others.items())
    if read and others.keys() - {"last"}:
        raise FitError(
            f"{path} was saved after {read} batches of epoch {epoch}, of data with {was}, and the data given has"
            f" {given}: some of its examples would be trained on twice in this epoch, or not at all; go on with {was}"
            " to the end of the epoch and change it there, or begin anew, fit(..., fresh=True)"
        )
    warn(f"{path} was saved with data of {was}: the run goes on with {given}")
