"""Stopping a run on request: SIGTERM and SIGINT end a loop between two steps, not within one."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import jax
from jax.experimental import multihost_utils

# SIGINT first, and put back last: once it is ours, no KeyboardInterrupt leaves the other one half installed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


class _WaitEnded(BaseException):
    """A first signal came within `awaited`; no `except Exception` of what is waited for takes it."""


class StopSignals:
    """Turns SIGTERM and SIGINT into a question that the loop asks, for as long as a `with` lasts.

    >>> with StopSignals() as signals:
    ...     for step in range(10):
    ...         if signals.should_stop(step):
    ...             break
    ...         if step == 3:
    ...             signal.raise_signal(signal.SIGTERM)
    >>> step, signals.received, signals.exit_code
    (4, <Signals.SIGTERM: 15>, 143)

    The first signal is only recorded, and ends a wait for data (`awaited`). A second one, of either kind, stops at
    once: the handlers from before are put back, and KeyboardInterrupt (SIGINT) or SystemExit(143) (SIGTERM) is raised
    where the program stands. Leaving the `with` puts them back too. A handler that was not installed from Python
    cannot be put back, so it is left alone; outside the main thread, where Python allows no handlers, all are.

    In a run of several processes no handler is installed. JAX has its own for SIGTERM, which makes all processes stop
    at one step (`jax.experimental.multihost_utils.reached_preemption_sync_point`), and which a handler of ours would
    disable; SIGINT stays Python's KeyboardInterrupt. Every process must then ask at every step. Where JAX's preemption
    service is turned off, nothing is recorded.

    Attributes:
      received: the signal that asked for the stop, None while there was none. In a run of several processes it is
        SIGTERM in all of them, also if only one was sent it.
    """

    received: signal.Signals | None = None

    def __init__(self) -> None:
        self._former: dict[signal.Signals, Any] = {}
        self._several_processes = False
        self._step: int | None = None
        self._turns = 0
        self._is_waiting = False

    @property
    def exit_code(self) -> int | None:
        """What a process that stopped for this exits with: 128 + the signal's number; None if there was none."""
        return None if self.received is None else 128 + self.received

    def should_stop(self, step: int) -> bool:
        """Whether to stop before this step; once True, it stays True.

        Args:
          step: the step that would come next. It may rise by any stride, and be asked about more than once.
        """
        if self._several_processes and self.received is None and self._reached_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def awaited(self, wait: Callable[..., T], *arguments: Any) -> T | None:
        """What a call returns that may wait for long, as for data; None if a first signal came and ended the wait.

        >>> batches = iter([1, 2])
        >>> with StopSignals() as signals:
        ...     signals.awaited(next, batches), signal.raise_signal(signal.SIGTERM), signals.awaited(next, batches)
        (1, None, None)

        Python raises in the call, where it sleeps or reads, and throws away what it was about to return: go on from
        where the data stood before. What waits in C and does not look for signals ends when it returns. In a run of
        several processes a signal ends no wait, as all of them stop at one step.

        Args:
          wait: the call.
          *arguments: for it.
        """
        try:
            self._is_waiting = True
            try:
                return wait(*arguments) if self.received is None else None
            finally:
                self._is_waiting = False
        except _WaitEnded:
            return None

    def __enter__(self) -> Self:
        self.received = None
        self._several_processes = jax.process_count() > 1
        if not self._several_processes and threading.current_thread() is threading.main_thread():
            # None is how Python shows a handler that it did not install.
            kept = {number: signal.getsignal(number) for number in _SIGNALS}
            self._former = {number: handler for number, handler in kept.items() if handler is not None}
            for number in self._former:
                signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put_back()

    def _record(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signal.Signals(number)
        if again:
            self._put_back()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.exit_code)
        if self._is_waiting:
            self._is_waiting = False
            raise _WaitEnded

    def _put_back(self) -> None:
        for number, handler in reversed(self._former.items()):
            signal.signal(number, handler)
        self._former = {}

    def _reached_sync_point(self, step: int) -> bool:
        # JAX agrees on the highest count of all processes plus one, which a loop that counts in strides steps over.
        if step != self._step:
            self._step, self._turns = step, self._turns + 1
        try:
            return multihost_utils.reached_preemption_sync_point(self._turns)
        except RuntimeError:  # The preemption service is turned off.
            return False
