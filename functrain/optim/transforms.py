"""What stands for a part in an optimizer: an optax transform, or `FROZEN`."""

import inspect
from typing import Any, Final, TypeAlias

import optax


class Frozen:
    """The type of `FROZEN`."""

    def __repr__(self) -> str:
        return "FROZEN"


FROZEN: Final = Frozen()
"""In the place of a transform: a part that is never updated, and costs no gradient and no state."""

Transform: TypeAlias = "optax.GradientTransformation | Frozen"


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transform as one that may be given any extra argument, and ignores what it does not take."""
    # optax.MultiSteps takes extra arguments, but is not of the type that says so.
    if takes_extra_args(tx):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def takes_extra_args(tx: Any) -> bool:
    """Whether the `update` of a transform takes extra arguments."""
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(tx.update).parameters.values())
    return takes_any or isinstance(tx, optax.GradientTransformationExtraArgs)


def described(tx: Transform) -> str:
    """What made a transform: its factory for `with_lr`, for others as much as the name of its update function tells."""
    return "frozen" if isinstance(tx, Frozen) else tx.update.__qualname__.split(".<locals>")[0]
