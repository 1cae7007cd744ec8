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
