"""What the files of W&B hold, of runs that are offline or were killed."""

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_BEGIN, _BLOCK, _HEAD = 7, 32768, 7  # Bytes: before all blocks, of one, and before each piece in it.
_WHOLE, _FIRST, _LAST = 1, 2, 4


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file `run-ID.wandb`; what a killed process left of the last one is none.

    Args:
      path: the file, of records as LevelDB's log has them, each a `Record` of W&B's.

    Yields:
      What was logged, by name, with "_step", the row's number.
    """
    for record in _records(path.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def is_ended(path: Path) -> bool:
    """Whether a file has the last record of a run: it is written by a process of W&B's, after `finish` has returned."""
    return any(record.WhichOneof("record_type") == "exit" for record in _records(path.read_bytes()))


def _records(data: bytes) -> Iterator[Any]:
    record_of = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    yield from map(record_of, _written(data))


def _written(data: bytes) -> Iterator[bytes]:
    """The records whose pieces are all there."""
    place, record = _BEGIN, b""
    while place + _HEAD <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _HEAD:  # Too little for a piece: the next one is in the next block.
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + _HEAD])
        place += _HEAD + size
        if kind not in range(_WHOLE, _LAST + 1) or place > len(data):
            return
        record = (b"" if kind in (_WHOLE, _FIRST) else record) + data[place - size : place]
        if kind in (_WHOLE, _LAST):
            yield record
