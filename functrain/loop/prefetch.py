"""Batches that are read while the ones before them are computed with."""

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from functrain.loop.threads import LOOK, ended, started


class Prefetched:
    """An iterator whose items a thread reads and prepares in advance.

    >>> batches = Prefetched(iter([1, 2, 3]), 2, prepare=lambda batch: 10 * batch)
    >>> next(batches), next(batches), next(batches), next(batches, "end")
    (10, 20, 30, 'end')

    What reading an item raises is raised where that item is asked for.

    Args:
      batches: the iterator; no other thread may read it before `stop`.
      count: how many items are read in advance.
      prepare: what is done with each on the thread, such as sending it to the device.
    """

    def __init__(self, batches: Iterator[Any], count: int, prepare: Callable[[Any], Any]) -> None:
        self._batches, self._prepare = batches, prepare
        self._position = self._reached()
        self._to_read = threading.Semaphore(count)
        self._read: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_over = False
        config: Any = jax.config  # Of which a `with` sets these for one thread alone.
        self._x64, self._device = config.jax_enable_x64, config.jax_default_device

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        if self._thread is None:
            self._thread = started(self._read_all)
        batch, position, error = self._awaited()
        if error is not None:
            self._is_over = True
            raise error
        self._position = position
        self._to_read.release()
        return batch

    def get_state(self) -> Any:
        """The position behind the last item that was given out; None where the iterator has none."""
        return self._position

    def stop(self) -> None:
        """Has the thread end, after the item that it reads; waits for that for at most half a second."""
        self._is_over = True
        self._to_read.release()
        if self._thread is not None:
            ended(self._thread)

    def _awaited(self) -> tuple[Any, Any, BaseException | None]:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._read.get(timeout=LOOK)

    def _read_all(self) -> None:
        with jax.enable_x64(self._x64), jax.default_device(self._device):
            while self._read_one():
                pass

    def _read_one(self) -> bool:
        """Reads an item when there is room for it; False where it was the last."""
        self._to_read.acquire()
        if self._is_over:
            return False
        try:
            batch = next(self._batches)
            if not self._is_over:
                self._read.put((self._prepare(batch), self._reached(), None))
        except BaseException as error:
            self._read.put((None, None, error))
            return False
        return True

    def _reached(self) -> Any:
        # A copy, as the thread reads on, and an iterator may give an object that it keeps.
        return copy.deepcopy(self._batches.get_state()) if hasattr(self._batches, "get_state") else None
