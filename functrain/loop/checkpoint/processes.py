"""What the processes of one run agree on."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from functrain import errors

_LENGTH = 1000
_ERRORS = (errors.CheckpointError, errors.SaveError)


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
      CheckpointError, SaveError: the function raised it; in every process.
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
