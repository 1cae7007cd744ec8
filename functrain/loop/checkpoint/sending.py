"""Checkpoints that are sent while training goes on, and sent again when that failed."""

import threading
import time
from collections.abc import Callable

from functrain.errors import SaveError

_PAUSES = (1.0, 300.0)  # Seconds before what failed is tried again: at first, and at most.


class Sender:
    """A thread that does what it is asked for as soon as it can, once for all that was asked meanwhile.

    Args:
      send: sends what there is to send; it has a time limit of its own.

    Attributes:
      failure: what the last try failed with; None where it did not.
    """

    def __init__(self, send: Callable[[], None]) -> None:
        self.failure: SaveError | None = None
        self._send = send
        self._asked = self._done = 0
        self._is_told = self._is_ended = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def is_done(self) -> bool:
        """Whether all that was asked for is done."""
        return self._done >= self._asked

    def start(self) -> None:
        """Begins to do what it is asked for."""
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="functrain-sender", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Asks for what there is to be sent."""
        with self._changed:
            self._asked += 1
            self._is_told = False
            self._changed.notify_all()

    def wait(self) -> None:
        """Returns when all that was asked for is done; what failed is tried once more before that is told.

        Raises:
          SaveError: it failed.
        """
        with self._changed:
            if self._thread is not None:
                if self.failure is not None and self._done == self._asked and not self._is_told:
                    self._asked += 1
                    self._changed.notify_all()
                until = self._asked
                self._changed.wait_for(lambda: self._done >= until)
            if self.failure is not None:
                self._is_told = True
                raise self.failure

    def stop(self) -> None:
        """Ends when what goes on is done; it may be started again."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        pause = _PAUSES[0]
        while True:
            with self._changed:
                again = time.monotonic() + pause
                self._changed.wait_for(
                    lambda: self._is_ended or self._asked > self._done,
                    None if self.failure is None else max(0.0, again - time.monotonic()),
                )
                if self._is_ended:
                    return
                asked = self._asked
            try:
                self._send()
            except Exception as error:
                self.failure = error if isinstance(error, SaveError) else SaveError(str(error))
                pause = min(2 * pause, _PAUSES[1])
            else:
                self.failure, pause = None, _PAUSES[0]
            with self._changed:
                self._done = max(self._done, asked)
                self._changed.notify_all()
