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


def described(tx: Transform) -> str:
    """What made a transform: its factory for `with_lr`, for others as much as the name of its update function tells."""
    return "frozen" if isinstance(tx, Frozen) else tx.update.__qualname__.split(".<locals>")[0]
