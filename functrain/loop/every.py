"""How often something is done in a run."""

import dataclasses
from typing import NamedTuple

from functrain.errors import CadenceError


@dataclasses.dataclass(frozen=True)
class Every:
    """Every so many updates, epochs or minutes: exactly one of them.

    >>> Every(updates=100)
    Every(updates=100)

    Attributes:
      updates: optimizer steps.
      epochs: whole epochs; due at the end of one.
      minutes: of the clock; due after the update that is under way then.
    """

    updates: int | None = None
    epochs: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.updates, self.epochs, self.minutes) if value is not None]
        is_whole = all(isinstance(value, int) for value in (self.updates, self.epochs) if value is not None)
        if len(given) != 1 or not is_whole or not given[0] > 0:
            raise CadenceError(
                f"{self}: give one of updates and epochs, whole numbers, and minutes, above 0, ft.Every(updates=100)"
            )

    def __repr__(self) -> str:
        given = ((name, getattr(self, name)) for name in ("updates", "epochs", "minutes"))
        return f"Every({', '.join(f'{name}={value}' for name, value in given if value is not None)})"

    def due(self, before: "Moment", now: "Moment") -> bool:
        """Whether it is time, if it was last looked at `before`.

        >>> Every(updates=10).due(Moment(step=9), Moment(step=12))
        True
        """
        if self.updates is not None:
            return now.step // self.updates > before.step // self.updates
        if self.epochs is not None:
            return now.epoch // self.epochs > before.epoch // self.epochs
        assert self.minutes is not None
        return now.seconds // (60 * self.minutes) > before.seconds // (60 * self.minutes)


class Moment(NamedTuple):
    """A point in a run: finished steps and epochs, and seconds since it began."""

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
