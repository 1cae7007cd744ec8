"""The arrays of a checkpoint that a command is given."""

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from functrain.cli.place import meant

if TYPE_CHECKING:
    from functrain.loop.checkpoint.alone import Leaves

PARAMS = "params/"


def leaves_in(given: str, is_asked: Callable[[str], bool]) -> tuple["Leaves", tuple[str, ...]]:
    """Reads leaves by name, of a checkpoint or of the newest sound one of a run; and what there is to warn of.

    Raises:
      CheckpointError: there is none, or it is damaged.
      StorageError: an address that can't be read.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # A GPU is for who trains.
    from functrain.loop.checkpoint.alone import host_leaves

    folder, step = meant(given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leaves = host_leaves(folder, step, is_asked)
    return leaves, tuple(str(each.message) for each in caught)
