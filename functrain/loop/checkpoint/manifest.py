"""The manifest of a checkpoint: a checksum of every file, written when all of them are there."""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK = 1 << 18


def path_of(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is: beside it, so that it outlives the folder."""
    return checkpoint.with_name(f"{checkpoint.name}.manifest.json")


def publish(checkpoint: Path, summary: Mapping[str, Any]) -> None:
    """Writes the manifest of a committed checkpoint, whole or not at all, with some words about it.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    files = _checksums(checkpoint)
    if not files:
        raise FileNotFoundError(f"there is nothing in {checkpoint}")
    body = json.dumps({"files": files, **summary}, sort_keys=True)
    write_whole(path_of(checkpoint), json.dumps({"body": body, "crc32": zlib.crc32(body.encode())}))


def load(checkpoint: Path) -> dict[str, Any] | None:
    """What a manifest says; None if there is none.

    Raises:
      ValueError: it is damaged itself.
    """
    name = path_of(checkpoint).name
    try:
        written = path_of(checkpoint).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{name!r} cannot be read: {error}") from None
    try:
        outer = json.loads(written)
        if zlib.crc32(outer["body"].encode()) == outer["crc32"]:
            body: dict[str, Any] = json.loads(outer["body"])
            return body
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f"{name!r} is not what was written")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if all is as it was written, or if there is no manifest to tell.

    >>> import tempfile
    >>> step = Path(tempfile.mkdtemp()) / "12"
    >>> step.mkdir()
    >>> _ = (step / "weights").write_bytes(b"1234")
    >>> publish(step, {})
    >>> damage(step)
    >>> _ = (step / "weights").write_bytes(b"1235")
    >>> damage(step)
    "'weights' is not what was written"
    """
    try:
        manifest = load(checkpoint)
    except ValueError as error:
        return str(error)
    if not checkpoint.is_dir():
        return "its folder is missing"
    if manifest is None:
        return None if any(checkpoint.iterdir()) else "its folder is empty"
    for name, (size, checksum) in manifest["files"].items():
        file = checkpoint / name
        try:
            if not file.is_file():
                return f"{name!r} is missing"
            if file.stat().st_size != size:
                return f"{name!r} has {file.stat().st_size} bytes, not {size}"
            if _checksum(file) != checksum:
                return f"{name!r} is not what was written"
        except OSError as error:
            return f"{name!r} cannot be read: {error}"
    return None


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint to 'N.corrupt', and its manifest with it; returns what it is called now."""
    aside, count = checkpoint.with_name(f"{checkpoint.name}.corrupt"), 1
    while aside.exists() or path_of(aside).exists():
        count += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.corrupt{count}")
    # The folder first: killed between the two, no damaged folder is left that has no manifest to tell.
    if checkpoint.exists():
        checkpoint.rename(aside)
    if path_of(checkpoint).exists():
        path_of(checkpoint).rename(path_of(aside))
    return aside


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint; killed at any point, it leaves a whole one or none."""
    path_of(checkpoint).unlink(missing_ok=True)
    trash = checkpoint.with_name(f".removed-{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def clear(directory: Path) -> None:
    """Removes what a process that was killed left half written or half removed."""
    for left in [*directory.glob("*.orbax-checkpoint-tmp*"), *directory.glob(".removed-*")]:
        shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(".*.manifest.json.tmp"):
        left.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is either not there or complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _checksums(checkpoint: Path) -> dict[str, tuple[int, int]]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {str(file.relative_to(checkpoint)): (file.stat().st_size, _checksum(file)) for file in files}


def _checksum(file: Path) -> int:
    # Into one small buffer: to map and unmap memory for every chunk stalls all threads, those of an update too.
    checksum, buffer = 0, memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(buffer):
            checksum = zlib.crc32(buffer[:size], checksum)
    return checksum
