"""The manifest of a checkpoint: a checksum of every file, written when all of them are there."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from functrain.loop.checkpoint.durable import files_in, insisted, write_whole

SUFFIX = ".manifest.json"
_CHUNK = 1 << 18


def path_of(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is: beside it, so that it outlives the folder."""
    return checkpoint.with_name(f"{checkpoint.name}{SUFFIX}")


def write(checkpoint: Path, summary: Mapping[str, Any]) -> None:
    """Writes the manifest of a complete checkpoint, whole or not at all, with some words about it.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    files = {
        str(file.relative_to(checkpoint)): [os.stat(file).st_size, _checksum(file)]
        for file in sorted(files_in(checkpoint))
    }
    if not files:
        raise FileNotFoundError(f"there is nothing in {checkpoint}")
    body = json.dumps({"files": files, **summary}, sort_keys=True)
    write_whole(path_of(checkpoint), json.dumps({"body": body, "crc32": zlib.crc32(body.encode())}))


def load(checkpoint: Path) -> dict[str, Any] | None:
    """What a manifest says; None if there is none.

    Raises:
      ValueError: it is damaged itself.
      OSError: it can't be read.
    """
    try:
        written = path_of(checkpoint).read_bytes()
    except FileNotFoundError:
        return None
    return parsed(written, path_of(checkpoint).name)


def parsed(written: bytes, name: str) -> dict[str, Any]:
    """What the bytes of a manifest say.

    Raises:
      ValueError: they are not what was written, or name files outside the checkpoint.
    """
    try:
        outer = json.loads(written)
        body = json.loads(outer["body"]) if zlib.crc32(outer["body"].encode()) == outer["crc32"] else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        body = None
    if isinstance(body, dict) and _is_manifest(body):
        return body
    raise ValueError(f"{name!r} is not what was written")


def was_one(checkpoint: Path) -> bool:
    """Whether a file by the name of a manifest is one, or could have been before it was damaged.

    Raises:
      OSError: it can't be read.
    """
    try:
        written = json.loads(path_of(checkpoint).read_bytes())
    except (ValueError, RecursionError):
        return True
    except FileNotFoundError:
        return False
    return isinstance(written, dict) and not written.keys().isdisjoint({"body", "crc32"})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, looked at twice; None if all is as it was written, or nothing was written of it.

    >>> import tempfile
    >>> step = Path(tempfile.mkdtemp()) / "12"
    >>> step.mkdir()
    >>> _ = (step / "weights").write_bytes(b"1234")
    >>> write(step, {"batches": 12, "content": 0, "metrics": {}, "time": 0.0})
    >>> damage(step)
    >>> _ = (step / "weights").write_bytes(b"1235")
    >>> damage(step)
    "'weights' is not what was written"

    Raises:
      OSError: it can't be read, which is no damage.
    """
    return insisted(lambda: next(_damages(checkpoint), None)) and insisted(lambda: next(_damages(checkpoint), None))


def damages(checkpoint: Path) -> list[str]:
    """All that is wrong with a checkpoint, file by file, looked at twice as `damage` does.

    Raises:
      OSError: it can't be read, which is no damage.
    """
    return insisted(lambda: [*_damages(checkpoint)]) and insisted(lambda: [*_damages(checkpoint)])


def _damages(checkpoint: Path) -> Iterator[str]:
    try:
        manifest = load(checkpoint)
    except ValueError as error:
        yield str(error)
        return
    if not checkpoint.exists():
        yield "its folder is missing"
        return
    for name, (size, checksum) in (manifest or {"files": {}})["files"].items():
        try:
            if (found := os.stat(checkpoint / name).st_size) != size:
                yield f"{name!r} has {found} bytes, not {size}"
            elif _checksum(checkpoint / name) != checksum:
                yield f"{name!r} is not what was written"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            yield f"{name!r} is missing"


def _is_manifest(body: Mapping[str, Any]) -> bool:
    files, metrics, best = body.get("files"), body.get("metrics"), body.get("best", {})
    if not isinstance(files, dict) or not isinstance(metrics, dict) or not isinstance(best, dict):
        return False
    if not all(map(_is_within, files)):
        return False
    numbers = [body.get("batches"), body.get("content"), *metrics.values()]
    entries = [isinstance(entry, list) and [*map(type, entry)] == [int, int] for entry in files.values()]
    return all(entries) and all(isinstance(number, int | float) for number in numbers)


def _is_within(name: str) -> bool:
    """Whether a file's name leads to no place outside the checkpoint, as it is read and written by that name."""
    return not {"", ".", ".."} & {*name.split("/")} and "\0" not in name


def _checksum(file: Path) -> int:
    # Into one small buffer: to map and unmap memory for every chunk stalls all threads, those of an update too.
    checksum, buffer = 0, memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(buffer):
            checksum = zlib.crc32(buffer[:size], checksum)
    return checksum
