"""One epoch of batches that are found by their number."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import grain

from functrain.errors import DataError
from functrain.loop.threads import LOOK, started


class Epoch(grain.DatasetIterator):  # type: ignore[misc]
    """An iterator as Grain has them, whose state is the number of batches that it gave.

    Grain's own measures each batch, which takes longer than to gather a small one; and its threads hold a process up
    for as long as they wait for data.

    Args:
      batch: the batch of a number.
      count: how many there are.
      read_ahead: how many are read in advance, each on a thread of its own.
    """

    def __init__(self, batch: Callable[[int], dict[str, Any]], count: int, read_ahead: int) -> None:
        super().__init__()
        self._batch, self._count, self._read_ahead = batch, count, read_ahead
        self._next = 0
        self._ahead: dict[int, Future[dict[str, Any]]] = {}  # By number.

    def __next__(self) -> dict[str, Any]:
        if self._next >= self._count:
            raise StopIteration
        batch = self._read_by_thread() if self._read_ahead else self._batch(self._next)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The number of batches that it gave."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on behind so many batches."""
        if not 0 <= state["next_index"] <= self._count:
            raise DataError(
                f"set_state({state}): the epoch has {self._count} batches; give the state of an epoch of the same data,"
                " in batches of the same size"
            )
        self._next = state["next_index"]
        self._ahead.clear()

    def _read_by_thread(self) -> dict[str, Any]:
        # A signal may end this anywhere; then it can be called again.
        for number in range(self._next, min(self._next + self._read_ahead + 1, self._count)):
            if number not in self._ahead:
                future: Future[dict[str, Any]] = Future()
                started(_read, self._batch, number, future)
                self._ahead[number] = future
        while not self._ahead[self._next].done():
            wait([self._ahead[self._next]], LOOK)
        return self._ahead.pop(self._next).result()


def _read(batch: Callable[[int], dict[str, Any]], number: int, future: "Future[dict[str, Any]]") -> None:
    try:
        future.set_result(batch(number))
    except BaseException as error:
        future.set_exception(error)
