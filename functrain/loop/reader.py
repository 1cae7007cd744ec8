"""The one owner of the position in the data."""

import collections
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from functrain.errors import FitError
from functrain.loop.batches import are_alike
from functrain.loop.prefetch import Prefetched
from functrain.loop.tensors import arrays_of
from functrain.loop.workers import Workers
from functrain.tree.warn import warn

_END = object()


def _at_once(call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


class Reader:
    """Reads the batches of one epoch after the other, and knows where it stands.

    >>> reader = Reader([1, 2, 3])
    >>> reader.begin(epoch=0)
    >>> reader.next_chunk(2), reader.next_chunk(2), reader.next_chunk(2), reader.read
    ([1, 2], [3], [], 3)

    What waits for the data is called through `wait`, such as `StopSignals.awaited`, which returns None where it gave
    up. Nothing of the reader changes before it returns: then it stands where it stood.

    Args:
      data: batches, in an iterable that is read once an epoch, or one with `epoch(number)`. Where its iterators have
        `get_state` and `set_state`, a position in the middle of an epoch can be gone back to.
      prefetch: how many batches a thread reads in advance; with 0 none does.
      place: what that thread sends each with to where it is needed.

    Attributes:
      data: as given.
      read: how many batches of this epoch were given out; 0 between two epochs.
    """

    def __init__(self, data: Iterable[Any], prefetch: int = 0, place: Callable[[Any], Any] | None = None) -> None:
        if not isinstance(prefetch, int) or prefetch < 0:
            raise FitError(f"prefetch={prefetch!r}: give the number of batches to read in advance, such as 2")
        self.read = 0
        self.data: Any = data
        self._prefetch = prefetch
        self._prepare: Callable[[Any], Any] = (lambda batch: place(arrays_of(batch))) if place else arrays_of
        self._batches: Iterator[Any] | None = None
        self._prefetched: Prefetched | None = None
        self._workers = Workers()
        self._is_resumable = False
        self._is_cut_off = False
        self._began_again = self._passes_over = False
        self._position: Any = None  # After the last batch given out, where batches were read ahead of it, or may be.
        self._ahead: collections.deque[tuple[Any, Any]] = collections.deque()  # With the position after each.

    @property
    def batches_an_epoch(self) -> int | None:
        """How many batches an epoch has; None where the data does not tell."""
        return len(self.data) if hasattr(self.data, "__len__") else None

    @property
    def position(self) -> Any:
        """What to save, to go on behind the last batch that was given out; None between two epochs."""
        is_known = self._ahead or self._is_cut_off or self._batches is None
        return self._position if is_known else self._reached()

    def resume(self, position: Any, read: int) -> None:
        """Takes a saved position, within an epoch of which so many batches were given out."""
        self._position, self.read = position, read

    def again(self, position: Any, read: int) -> "Reader | None":
        """A reader of the same data from a position that this one was at; None where the data can't go back there."""
        is_sequence, is_spent = isinstance(self.data, Sequence), isinstance(self.data, Iterator)
        if not (self._is_resumable or is_sequence) or (is_spent and position is None):
            return None
        if read and not self._is_resumable and self._began_again:
            return None  # Nobody knows whether it was read before the epoch began again, or after.
        other = Reader(self.data)
        other.resume(position, read)
        other._passes_over = not self._is_resumable
        return other

    def begin(self, epoch: int, wait: Callable[..., Any] = _at_once) -> None:
        """Begins an epoch, or goes on within it from a position that was resumed; not where `wait` gives up."""
        batches = wait(self._begun, epoch)
        if batches is None:
            return
        self._is_resumable = _can_be_resumed(batches)
        is_known = self._is_resumable and self._position is not None
        if self.read and not is_known and self._passes_over:
            collections.deque(itertools.islice(batches, self.read), maxlen=0)
        elif self.read and not is_known:
            warn(
                f"the data can't be resumed: epoch {epoch} starts again at its beginning, after {self.read} batches"
                " of it; give data whose iterator has get_state and set_state, such as ft.from_arrays or Grain's"
            )
            self.read, self._began_again = 0, True
        self._batches, self._position = batches, None
        if self._prefetch:
            self._prefetched = Prefetched(batches, self._prefetch, self._prepare)

    def next_chunk(self, count: int = 1, wait: Callable[..., Any] = _at_once) -> list[Any] | None:
        """The next batches, as many as asked for if these are alike, else one; none at the end of the epoch.

        Returns:
          The batches; None where `wait` gives up.
        """
        if not self._ahead:
            if count == 1:
                self._position = self._reached()
                chunk: list[Any] | None = wait(list, itertools.islice(self._left(), 1))
                self._is_cut_off = chunk is None
                self.read += len(chunk or ())
                return chunk
            if not self._looked_ahead(count, wait):
                return None
        chunk = [batch for batch, _ in self._ahead]
        if len(chunk) != count or not are_alike(chunk):
            chunk = chunk[:1]
        for _ in chunk:
            _, self._position = self._ahead.popleft()
        self.read += len(chunk)
        return chunk

    def is_at_end(self, wait: Callable[..., Any] = _at_once) -> bool:
        """Whether the epoch is known to have no more batches; the position stays what it is."""
        return not self._ahead and self._looked_ahead(1, wait) and not self._ahead

    def end_epoch(self) -> None:
        """Stands between two epochs."""
        self.read, self._batches, self._prefetched, self._position = 0, None, None, None

    def rest(self) -> None:
        """Reads no more in advance: the data is the program's again."""
        if self._prefetched is not None:
            self._prefetched.stop()

    def close(self) -> None:
        """Ends the processes that read ahead, of a run that ends here; at most some two seconds."""
        self._workers.end(self._batches)

    def _begun(self, epoch: int) -> Any:
        batches: Any = iter(self.data.epoch(epoch) if callable(getattr(self.data, "epoch", None)) else self.data)
        if self.read and self._position is not None and _can_be_resumed(batches):
            batches.set_state(self._position)
        return batches

    def _looked_ahead(self, count: int, wait: Callable[..., Any]) -> bool:
        self._position = self._reached()
        found = wait(self._next_batches, count)
        self._is_cut_off = found is None
        self._ahead.extend(found or ())
        return not self._is_cut_off

    def _next_batches(self, count: int) -> list[tuple[Any, Any]]:
        return [(batch, self._reached()) for batch in itertools.islice(self._left(), count)]

    def _left(self) -> Iterator[Any]:
        # By `next` alone: there are iterators whose `__iter__` begins anew.
        source = self._source()
        while (batch := next(source, _END)) is not _END:
            yield arrays_of(batch)

    def _reached(self) -> Any:
        """The position behind the last batch that was read: a copy, as an iterator may give an object that it keeps."""
        return copy.deepcopy(self._source().get_state()) if self._is_resumable else None

    def _source(self) -> Any:
        assert self._batches is not None
        return self._prefetched or self._batches


def _can_be_resumed(batches: Any) -> bool:
    return hasattr(batches, "get_state") and hasattr(batches, "set_state")
