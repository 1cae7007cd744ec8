"""Data of several processes: each reads the rows of its share, and those of one share read the same."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from functrain.errors import FitError
from functrain.loop.data import Data
from functrain.mesh.shares import Shardings, first_of, share_of
from functrain.tree.paths import flatten
from functrain.update.update import Update


def where_batches_lie(sharding: Shardings, update: Update) -> Shardings:
    """Where batches go: as they are told to, or else as the update's layout says."""
    layout = update.optim.layout
    return sharding if sharding is not None or layout is None else layout.batch_shardings


def shared(data: Any, sharding: Shardings) -> Any:
    """Data of `from_arrays` and `from_tfds` with the share that this process's devices hold; other data as it is."""
    first = first_of(sharding)
    if not isinstance(data, Data) or first is None or jax.process_count() == 1:
        return data
    return data.over(*share_of(first))


def check_sharers(batch: Mapping[str, Any] | Any) -> None:
    """Raises where processes hold the same rows of a batch and gave others: each would train on its own.

    Raises:
      FitError: in every process; it names a leaf.
    """
    for path, leaf in flatten(batch).items():
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            continue
        places = {str(index): place for place, index in enumerate(_indices(leaf))}
        sums = np.full(len(places), -1, np.int32)  # JAX takes 32 bits.
        for shard in leaf.addressable_shards:
            sums[places[str(shard.index)]] = zlib.crc32(np.asarray(shard.data).tobytes()) >> 1
        found = np.asarray(multihost_utils.process_allgather(sums))
        most = found.max(0)
        if np.any((found != -1) & (found != most)):
            raise FitError(
                f"processes hold the same rows of {path or 'the batch'!r} and gave others: each reads those that its"
                " devices hold, as ft.from_arrays does with fit(..., sharding=)"
            )


def _indices(leaf: jax.Array) -> list[Any]:
    found = leaf.sharding.devices_indices_map(leaf.shape).values()
    return list({str(index): index for index in found}.values())
