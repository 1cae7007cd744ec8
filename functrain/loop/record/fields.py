"""The fields of JSON that somebody wrote: each of the kind that it should be, or told and left out."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from functrain.loop.lines import NON_FINITE

_Value = TypeVar("_Value")
_MOST_TOLD = 20


class Fields:
    """What is said under names.

    >>> problems = []
    >>> fields = Fields({"name": "digits", "step": "12"}, "run.json", problems)
    >>> fields.text("name"), fields.whole("step"), fields.text("why"), problems
    ('digits', None, None, ["run.json: 'step' is no whole number: '12'; it is left out"])

    Args:
      said: a dict.
      where: it is said, for a message.
      problems: where what is of another kind is told.
    """

    def __init__(self, said: dict[str, Any], where: str, problems: list[str]) -> None:
        self._said, self._where, self._problems = said, where, problems

    @property
    def names(self) -> list[str]:
        """What there is."""
        return [*self._said]

    def text(self, name: str) -> str | None:
        """A text; None where there is none."""
        return self._taken(name, "text", lambda value: value if isinstance(value, str) else None)

    def number(self, name: str) -> float | None:
        """A number."""
        return self._taken(name, "number", _number)

    def whole(self, name: str) -> int | None:
        """A whole number."""
        return self._taken(name, "whole number", _whole)

    def flag(self, name: str) -> bool | None:
        """Yes or no."""
        return self._taken(name, "yes or no", lambda value: value if isinstance(value, bool) else None)

    def items(self, name: str) -> list[Any]:
        """A list; an empty one where there is none."""
        return self._taken(name, "list", lambda value: value if isinstance(value, list) else None) or []

    def mapping(self, name: str) -> dict[str, Any]:
        """What is under names; nothing where there is none."""
        return self._taken(name, "dict", lambda value: value if isinstance(value, dict) else None) or {}

    def fields(self, name: str) -> "Fields":
        """The same, as fields."""
        return Fields(self.mapping(name), f"{self._where}: {name!r}", self._problems)

    def each(self, name: str) -> "list[Fields]":
        """A list of fields."""
        told = {str(number): value for number, value in enumerate(self.items(name))}
        inner = Fields(told, f"{self._where}: {name!r}", self._problems)
        return [inner.fields(number) for number, value in told.items() if inner.mapping(number) is value]

    def texts(self, name: str) -> dict[str, str]:
        """Texts by name."""
        inner = self.fields(name)
        return {each: value for each in inner.names if (value := inner.text(each)) is not None}

    def numbers(self, name: str) -> dict[str, float]:
        """Numbers by name."""
        inner = self.fields(name)
        return {each: value for each in inner.names if (value := inner.number(each)) is not None}

    def wholes(self, name: str) -> dict[str, int]:
        """Whole numbers by name."""
        inner = self.fields(name)
        return {each: value for each in inner.names if (value := inner.whole(each)) is not None}

    def _taken(self, name: str, kind: str, take: Callable[[Any], _Value | None]) -> _Value | None:
        value = self._said.get(name)
        if value is None:
            return None
        taken = take(value)
        if taken is None:
            told = f"{self._where}: {name!r} is no {kind}: {repr(value)[:60]}; it is left out"
            if len(self._problems) == _MOST_TOLD:
                told = "... and more that is left out"
            if len(self._problems) <= _MOST_TOLD and told not in self._problems:
                self._problems.append(told)
        return taken


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return NON_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _whole(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 1 << 63 else None
