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
    >>> dict(heard.counts)
    {'the data has an end': 1}

    Attributes:
      counts: how often each was shown, by its text.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._before: Callable[..., Any] | None = None

    def begin(self) -> None:
        """Listens."""
        if self._before is None:
            self.counts = collections.Counter()
            self._before = warnings.showwarning
            self._mine = self._show
            warnings.showwarning = self._mine

    def end(self) -> None:
        """Listens no more."""
        if self._before is not None and warnings.showwarning is self._mine:
            warnings.showwarning = self._before
        self._before = None

    def _show(self, message: Any, *place: Any, **more: Any) -> None:
        text = str(message)
        if text in self.counts or len(self.counts) < _MOST:
            self.counts[text] += 1
        if self._before is not None:
            self._before(message, *place, **more)
