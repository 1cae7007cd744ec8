"""What the processes of one run agree on."""

import contextlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from functrain import errors

_LENGTH = 1000
_LOOKS, _PAUSE = 20, 0.1  # Seconds.
_ERRORS = (errors.CheckpointError, errors.SaveError, errors.StorageError)


def agreed(text: str | None) -> str | None:
    """What process 0 found, in every process: the first thousand bytes of a text, or None."""
    if jax.process_count() == 1:
        return text
    sent = np.zeros(_LENGTH, np.uint8)
    encoded = (text or "").encode()[:_LENGTH]
    sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).rstrip(b"\0").decode(errors="ignore") or None


def found_by_first(find: Callable[[], str | None]) -> str | None:
    """What a function finds in process 0, in every process.

    Raises:
      CheckpointError, SaveError, StorageError: the function raised it; in every process.
    """
    found, problem = None, None
    if jax.process_index() == 0:
        try:
            found = find()
        except _ERRORS as error:
            problem = error
    kind, _, told = (agreed(None if problem is None else f"{type(problem).__name__}:{problem}") or "").partition(":")
    if problem is not None:
        raise problem
    if kind:
        raise getattr(errors, kind)(told)
    return agreed(found)


def check_shared(directory: Path) -> None:
    """Raises in every process where they do not all see one folder.

    Raises:
      CheckpointError: one sees another.
    """
    if jax.process_count() == 1:
        return
    file = directory / ".shared"
    if jax.process_index() == 0:
        file.write_text(uuid.uuid4().hex)
    text = found_by_first(file.read_text)
    is_seen = np.asarray(multihost_utils.process_allgather(np.asarray(_reads(file, text))))
    if jax.process_index() == 0:
        file.unlink(missing_ok=True)
    if not is_seen.all():
        raise errors.CheckpointError(
            f"the processes {np.flatnonzero(~is_seen.ravel()).tolist()} see another folder {directory} than process 0:"
            " give one that all of them see, Checkpoints(..., staging=)"
        )


def _reads(file: Path, text: str | None) -> bool:
    """Whether a file is there with a text, which a file system of several machines may show a little later."""
    for _ in range(_LOOKS):
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                return True
        time.sleep(_PAUSE)
    return False
