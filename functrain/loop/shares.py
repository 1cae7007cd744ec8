"""Data of several processes: each reads the rows of its share, and those of one share read the same."""

import zlib
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
    """Data of functrain with the share that this process's devices hold; other data as it is."""
    first = first_of(sharding)
    if not isinstance(data, Data) or first is None or jax.process_count() == 1:
        return data
    return data.over(*share_of(first))


def check_sharers(batch: Any, data: Any, *, axis: int = 0) -> None:
    """Raises where processes hold the same rows of a batch and gave others, or hold others and gave the same.

    Args:
      batch: of all processes.
      data: what it is of; that of functrain reads no row for another, though examples may be alike.
      axis: of its rows.

    Raises:
      FitError: in every process.
    """
    repeats = []
    for path, leaf in flatten(batch).items():
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            continue
        places = {str(index): place for place, index in enumerate(_indices(leaf))}
        sums = np.full(len(places) + 1, -1, np.int32)  # JAX takes 32 bits.
        for shard in leaf.addressable_shards:
            held = np.asarray(shard.data)
            sums[places[str(shard.index)]] = zlib.crc32(held.tobytes()) >> 1
            sums[-1] = max(sums[-1], _varies(held, axis))
        gathered = np.asarray(multihost_utils.process_allgather(sums))
        found, varies = gathered[:, :-1], gathered[:, -1]
        is_held = found != -1
        if np.any(is_held & (found != found.max(0))):
            raise FitError(
                f"processes hold the same rows of {path or 'the batch'!r} and gave others: each reads those that its"
                " devices hold, as ft.from_arrays and ft.from_source do"
            )
        if np.any(is_held != is_held[0]) and varies.all():
            repeats.append(len({tuple(row[held]) for row, held in zip(found, is_held, strict=True)}) == 1)
    if repeats and all(repeats) and not isinstance(data, Data):
        raise FitError(
            f"each of {jax.process_count()} processes gave the same rows for a slice of its own: a batch would have"
            " them several times, and the run an order that depends on how many there are. Give examples by number,"
            " ft.from_source(dataset, batch_size), as of a grain.MapDataset before its batch: each process reads those"
            " that its devices hold; or cut the data yourself, in Grain by dataset.slice or ShardByJaxProcess()"
        )


def _varies(held: np.ndarray, axis: int) -> bool:
    """Whether rows that are equal to others are likely to be these: rows that are all alike say nothing."""
    rows = np.moveaxis(held, axis, 0) if held.ndim > axis else held
    rows = rows if len(rows) > 1 else rows.reshape(-1)
    return bool(np.any(rows != rows[:1]))


def _indices(leaf: jax.Array) -> list[Any]:
    found = leaf.sharding.devices_indices_map(leaf.shape).values()
    return list({str(index): index for index in found}.values())
