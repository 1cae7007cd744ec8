"""Checkpoints written one after the other while training goes on."""

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from functrain.errors import SaveError
from functrain.loop.checkpoint.contents import Contents
from functrain.loop.checkpoint.sending import Sender
from functrain.loop.checkpoint.staging import Staging
from functrain.loop.checkpoint.storage import Storage
from functrain.tree.warn import warn


class Writer:
    """A thread that finishes what was begun, and remembers a failure until a later checkpoint is whole.

    Args:
      storage: what writes.
      staging: where to.
      sender: what sends it elsewhere from there; None where it stays.
    """

    def __init__(self, storage: Storage, staging: Staging, sender: Sender | None = None) -> None:
        self._failure: SaveError | None = None
        self._storage, self._staging, self._sender = storage, staging, sender
        self._thread: ThreadPoolExecutor | None = None
        self._finishing: Future[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it takes checkpoints."""
        return self._thread is not None

    @property
    def is_whole(self) -> bool:
        """Whether all that was to be written is on disk, and where it is sent to."""
        is_written = self._finishing is None or self._finishing.done()
        return is_written and (self._sender is None or self._sender.is_done) and self.failure is None

    @property
    def failure(self) -> SaveError | None:
        """What the last write failed with, or its being sent; None where it did not."""
        return self._failure or (self._sender.failure if self._sender else None)

    def start(self) -> None:
        """Makes the thread."""
        if self._sender is not None and jax.process_index() == 0:
            self._sender.start()
        self._thread = ThreadPoolExecutor(1, "functrain-checkpoints")
        self._process = os.getpid()
        _RUNNING.add(self)

    def end(self) -> None:
        """Waits for the last checkpoint as the program ends, and says so if it failed."""
        try:
            if self._process == os.getpid():
                self.wait()
        except SaveError as error:
            warn(str(error))

    def write(
        self,
        name: str,
        leaves: Mapping[str, Any],
        contents: Contents,
        *,
        summary: Mapping[str, Any],
        then: Callable[[str], None],
    ) -> None:
        """Starts to write a checkpoint, and returns when its leaves may be overwritten.

        Args:
          name: what it is called.
          leaves: by name.
          contents: what is beside them.
          summary: for the manifest, which process 0 writes when all is there.
          then: what process 0 does after that.

        Raises:
          SaveError: it could not be begun.
        """
        assert self._thread is not None
        try:
            self._storage.write(self._staging.place(name), leaves, contents)
        except Exception as error:
            raise self._failed(name, error) from error
        self._finishing = self._thread.submit(self._finish, name, contents, summary, then)

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk, and is where it is sent.

        Raises:
          SaveError: it failed.
        """
        self.wait_for_disk()
        if self._sender is not None:
            self._sender.wait()

    def wait_for_disk(self) -> None:
        """Returns when the last checkpoint is on disk.

        Raises:
          SaveError: it failed.
        """
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the thread; it may be started again."""
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = None
        if self._sender is not None:
            self._sender.stop()

    def _finish(self, name: str, contents: Contents, summary: Mapping[str, Any], then: Callable[[str], None]) -> None:
        try:
            self._storage.wait()
            if jax.process_index() == 0:
                self._storage.check(self._staging.place(name), contents)
                self._staging.publish(name, summary)
        except Exception as error:
            self._failed(name, error)
            return
        self._failure = None
        if jax.process_index() == 0:
            try:
                then(name)
            except Exception as error:
                warn(f"{self._staging.directory / name} is written, but: {error}")

    def _failed(self, name: str, error: Exception) -> SaveError:
        path = self._staging.directory / name
        self._failure = SaveError(
            f"the checkpoint {path} could not be written: {type(error).__name__}: {error}; the one before it is whole,"
            " make room or mend the folder, the next save is tried as ever"
        )
        self._storage.give_up()
        if jax.process_index() == 0:
            self._staging.clear()
        return self._failure


_RUNNING: weakref.WeakSet[Writer] = weakref.WeakSet()


def _end_all() -> None:
    for writer in list(_RUNNING):
        writer.end()


# A program that ends without closing its checkpoints: atexit comes when no thread can be begun any more, on which Orbax
# relies; this comes before that, as concurrent.futures has its own of it.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
