"""Batches of any source that is read at random, such as Grain's."""

from typing import Any

import numpy as np

from functrain.errors import DataError
from functrain.loop.data import Data, Last, data_of
from functrain.loop.maps import Batch, batch_of

_ENDLESS = 2**48  # As long is what Grain repeats without end.


def from_source(source: Any, batch_size: int, *, seed: int = 0, shuffle: bool = True, last: Last = "keep") -> Data:
    """Batches of a source that gives examples by number: of Grain, of PyTorch, or your own.

    >>> class Squares:
    ...     def __len__(self):
    ...         return 6
    ...     def __getitem__(self, number):
    ...         return {"x": number, "y": number**2}
    >>> [batch["y"].tolist() for batch in from_source(Squares(), batch_size=4, shuffle=False)]
    [[0, 1, 4, 9], [16, 25]]

    Each process makes the same source, and reads of it the examples that its devices hold, on whatever mesh. Batches,
    their order and epochs are functrain's; what is random in the source itself is the same in each epoch, so draw in
    `map_examples` what is not to be.

    Args:
      source: `source[number]` are `len(source)` examples, each a dict of arrays or numbers, nested or not, of one shape
        for all: a `grain.MapDataset` before its `batch`, a data source of Grain's, and the like. Several threads read.
      batch_size, seed, shuffle, last: as for `from_arrays`.

    Raises:
      DataError: the source has no length or no examples by number, or has no end; an example is no dict of arrays, or
        is of another shape than others, which may show only at a later batch; or as for `from_arrays`.

    Returns:
      Data whose batches are NumPy arrays, nested as the examples are.
    """
    what = f"from_source({type(source).__name__})"
    examples = _length(source, what)

    def fetch(rows: np.ndarray) -> Batch:
        return batch_of([source[row] for row in rows.tolist()], what)

    return data_of(fetch, examples, batch_size, seed=seed, shuffle=shuffle, last=last, read_ahead=4)


def _length(source: Any, what: str) -> int:
    try:
        examples = len(source) if hasattr(source, "__getitem__") else 0
    except (TypeError, OverflowError):
        examples = 0
    if not examples:
        raise DataError(
            f"{what} has no examples by number: give one with len(source) and source[0], such as"
            " grain.MapDataset.source(files).map(function), before it is batched or made an iterator"
        )
    if examples >= _ENDLESS:
        raise DataError(f"{what} repeats without end: leave repeat() out, and say how often in fit(..., epochs=)")
    return examples
