"""Warnings of a run, kept for its record while they are shown as ever."""

import collections
import warnings
from collections.abc import Callable
from typing import Any

_MOST = 100  # Texts; a run that warns of each batch fills no record.


class Heard:
    """Listens to the warnings of this process between `begin` and `end`.

    >>> heard = Heard()
    >>> heard.begin()
    >>> warnings.showwarning("the data has an end", UserWarning, "train.py", 3)
    >>> heard.end()
    >>> heard.counted()
    [('the data has an end', 1)]
    """

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._before: Callable[..., Any] = warnings.showwarning
        self._mine: Callable[..., Any] | None = None

    def begin(self) -> None:
        """Listens, from no warnings on."""
        if self._mine is not None:
            return
        before = warnings.showwarning

        def show(message: Any, *place: Any, **more: Any) -> None:
            if self._mine is show:
                self._count(str(message))
            before(message, *place, **more)

        self._counts = collections.Counter()
        self._mine, self._before = show, before
        warnings.showwarning = show

    def end(self) -> None:
        """Listens no more; where others listen since, or `warnings` puts it back, it hands on what it hears."""
        if self._mine is not None and warnings.showwarning is self._mine:
            warnings.showwarning = self._before
        self._mine = None

    def counted(self) -> list[tuple[str, int]]:
        """The texts so far, and how often each was shown; other threads may warn meanwhile."""
        return [*self._counts.items()]

    def _count(self, text: str) -> None:
        if text in self._counts or len(self._counts) < _MOST:
            self._counts[text] += 1
