"""What a state says that an update has consumed: its arrays are deleted, and the state that came back has new ones."""

from collections.abc import Sequence
from typing import Any

import jax

from functrain.errors import UpdateError


def is_deleted(leaves: Sequence[Any]) -> bool:
    """Whether one of these leaves was deleted."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)


def check_not_deleted(leaves: Sequence[Any], field: str = "") -> None:
    """Raises if a leaf of a state, or of one of its fields, was deleted.

    Raises:
      UpdateError: says what to go on from.
    """
    if is_deleted(leaves):
        gone = f", which deleted its {field}" if field else ""
        raise UpdateError(
            f"this state was consumed by an earlier call{gone}, and every shallow copy with it: go on from the state"
            " that the call returned, state, metrics = update(state, batch), or copy.deepcopy(state) before it"
        )
