"""The one owner of the position in the data."""

import collections
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from functrain.loop.batches import are_alike


class Reader:
    """Reads the batches of one epoch after the other, and knows where it stands.

    >>> reader = Reader([1, 2, 3])
    >>> reader.begin(epoch=0)
    >>> reader.next_chunk(2), reader.next_chunk(2), reader.next_chunk(2), reader.read
    ([1, 2], [3], [], 3)

    Args:
      data: batches, in an iterable that is read once an epoch, or one with `epoch(number)`. Where its iterators have
        `get_state` and `set_state`, a position in the middle of an epoch can be gone back to.

    Attributes:
      read: how many batches of this epoch were given out; 0 between two epochs.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.read = 0
        self._data: Any = data
        self._batches: Iterator[Any] | None = None
        self._is_resumable = False
        self._position: Any = None  # After the last batch given out, where batches were read ahead of it.
        self._ahead: collections.deque[tuple[Any, Any]] = collections.deque()  # With the position after each.

    @property
    def position(self) -> Any:
        """What to save, to go on behind the last batch that was given out; None between two epochs."""
        return self._position if self._ahead or self._batches is None else self._reached()

    def resume(self, position: Any, read: int) -> None:
        """Takes a saved position, within an epoch of which so many batches were given out."""
        self._position, self.read = position, read

    def begin(self, epoch: int) -> None:
        """Begins an epoch, or goes on within it from a position that was resumed."""
        batches = iter(self._data.epoch(epoch) if callable(getattr(self._data, "epoch", None)) else self._data)
        self._is_resumable = hasattr(batches, "get_state") and hasattr(batches, "set_state")
        if self.read and self._is_resumable and self._position is not None:
            batches.set_state(self._position)
        elif self.read:
            warnings.warn(
                f"the data can't be resumed: epoch {epoch} starts again at its beginning, after {self.read} batches"
                " of it; give data whose iterator has get_state and set_state, such as ft.from_arrays or Grain's",
                stacklevel=6,
            )
            self.read = 0
        self._batches, self._position = batches, None

    def next_chunk(self, count: int = 1) -> list[Any]:
        """The next batches, as many as asked for if these are alike, else one; none at the end of the epoch."""
        if not self._ahead:
            if count == 1:
                chunk = [*itertools.islice(self._source(), 1)]
                self.read += len(chunk)
                return chunk
            self._look_ahead(count)
        chunk = [batch for batch, _ in self._ahead]
        if len(chunk) != count or not are_alike(chunk):
            chunk = chunk[:1]
        for _ in chunk:
            _, self._position = self._ahead.popleft()
        self.read += len(chunk)
        return chunk

    def is_at_end(self) -> bool:
        """Whether the epoch has no more batches; the position stays what it is."""
        if not self._ahead:
            self._look_ahead(1)
        return not self._ahead

    def end_epoch(self) -> None:
        """Stands between two epochs."""
        self.read, self._batches, self._position = 0, None, None

    def _look_ahead(self, count: int) -> None:
        self._position = self._reached()
        for batch in itertools.islice(self._source(), count):
            self._ahead.append((batch, self._reached()))

    def _reached(self) -> Any:
        """The position behind the last batch that was read."""
        return self._source().get_state() if self._is_resumable else None

    def _source(self) -> Any:
        assert self._batches is not None
        return self._batches
