"""Threads that read, and hold up no process that ends."""

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

# Seconds after which one that waits for a thread waits anew: a signal that comes just as a wait begins, or to another
# thread, does not end it.
LOOK = 0.5
_PATIENCE = 0.5  # Seconds.

_started: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def started(call: Callable[..., None], *arguments: Any) -> threading.Thread:
    """A thread that runs a call, and that the end of the process waits for at most half a second."""
    thread = threading.Thread(target=call, args=arguments, daemon=True, name="functrain-reads")
    _started.add(thread)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> None:
    """Waits for a thread for at most half a second, and then no more, also at the end of the process."""
    thread.join(_PATIENCE)
    _started.discard(thread)


@atexit.register
def _end() -> None:
    # One that comes back from C++ when the interpreter is gone would abort the process.
    deadline = time.monotonic() + _PATIENCE
    for thread in [*_started]:
        thread.join(max(0.0, deadline - time.monotonic()))
