"""What stands for a part in an optimizer: an optax transform, or `FROZEN`."""

from typing import Final, TypeAlias

import optax


class Frozen:
    """The type of `FROZEN`."""

    def __repr__(self) -> str:
        return "FROZEN"


FROZEN: Final = Frozen()
"""In the place of a transform: a part that is never updated, and costs no gradient and no state."""

Transform: TypeAlias = "optax.GradientTransformation | Frozen"


def state_name(part: str, other: str) -> str:
    """What the state of a part's other transform is called among the states of an optimizer.

    >>> state_name("shared", "aux")
    'shared@aux'
    """
    return f"{part}@{other}"
