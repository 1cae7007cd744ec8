"""What a checkpoint gives back."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.asked import Asked, differences, of_leaves, of_numbers, places
from functrain.loop.checkpoint.contents import decoded
from functrain.loop.checkpoint.leaves import COUNTERS, FIELDS, WINDOW, window_of
from functrain.loop.checkpoint.regroup import regrouped
from functrain.loop.checkpoint.storage import Storage
from functrain.optim.adoption import Adoption
from functrain.tree.paths import unflatten
from functrain.tree.text import listed_lines
from functrain.update.state import TrainState


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: the state, ready for the next update.
      data: the position in the data that was saved with it.
      metrics: the metrics that were saved with it.
      extra: what else was saved with it.
      path: its folder.
      changed: the numbers of optimizers that were others, as was warned of: what was, what is now.
      report: with `regroup=True`, what became of optimizer state and averages, for `print`; None where nothing was
        regrouped.
    """

    state: TrainState
    data: Any
    metrics: dict[str, float]
    extra: Any
    path: Path
    changed: tuple[str, ...] = ()
    report: Adoption | None = None


def read(storage: Storage, checkpoint: Path, asked: Asked, *, regroup: bool) -> Restored:
    """Reads a checkpoint as the state that is asked for.

    Raises:
      CheckpointError: it does not fit; says what differs.
    """
    contents = storage.contents(checkpoint)
    differs = differences(contents, asked)
    if differs and not regroup:
        of_state = [
            line for line in of_leaves(contents.leaves, asked.specs) if not line.startswith(("opt_state/", "ema/"))
        ]
        how = (
            "with the model and the update that it was saved from; regroup=True, for other parts and optimizers, can't"
            " mend that"
            if of_state
            else "with the update that it was saved from, or, as only parts, optimizers or ema= are others,"
            " regroup=True"
        )
        raise CheckpointError(
            f"the checkpoint {checkpoint} does not fit the state that is asked for:{listed_lines(differs)}\nrestore it"
            f" {how}"
        )
    leaves, report = storage.leaves(checkpoint, contents, places(contents, asked)), None
    window = window_of(contents.window, leaves)
    if differs:
        leaves, report = regrouped(leaves, contents, asked)
    values = unflatten({name: leaf for name, leaf in leaves.items() if not name.startswith(WINDOW)}, like=asked.fields)
    counters = {name: np.asarray(values[name], np.int64) for name in COUNTERS}
    state = TrainState(
        **{**dict.fromkeys(FIELDS), **values, **counters}, window=window, configuration=asked.written_configuration
    )
    beside = contents.beside
    data, extra, numbers = decoded(beside.data), decoded(beside.extra), of_numbers(contents, asked)
    return Restored(state, data, beside.metrics, extra, checkpoint, numbers, report)
