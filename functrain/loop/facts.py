"""What is written beside the arrays of a checkpoint, as JSON."""

import base64
import functools
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from functrain.errors import CheckpointError
from functrain.loop.fingerprint import fingerprint, named_leaves, spec, window_form
from functrain.update.state import TrainState

_PACKAGES = ("functrain", "jax", "optax", "orbax-checkpoint", "numpy")


def facts_of(state: TrainState, beside: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to read a state back and to tell whether it fits, with what the caller saves beside it.

    Raises:
      CheckpointError: the metrics of a pending window have no names.
    """
    pending = {name: spec(leaf) for name, leaf in named_leaves(state).items() if name.startswith("window/")}
    return {
        "leaves": fingerprint(state),
        "window": window_form(state.window),
        "window_leaves": pending,
        "configuration": json.loads(state.configuration),
        **beside,
        "versions": _versions(),
    }


def encoded(name: str, value: Any) -> Any:
    """A value that JSON can hold, or bytes.

    >>> decoded(encoded("data", b"12"))
    b'12'

    Raises:
      CheckpointError: it is neither.
    """
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}= of a checkpoint: {error}; give what JSON can hold, or bytes") from None
    return {"json": value}


def decoded(value: Any) -> Any:
    """The inverse of `encoded`."""
    return base64.b64decode(value["bytes"]) if "bytes" in value else value["json"]


@functools.cache
def _versions() -> dict[str, str]:
    """What a checkpoint is written with; looking it up takes milliseconds."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
