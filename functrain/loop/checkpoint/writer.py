"""Checkpoints written one after the other while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from functrain.errors import SaveError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.contents import Contents
from functrain.loop.checkpoint.storage import Storage


class Writer:
    """A thread that finishes what was begun, and remembers a failure until a later checkpoint is whole.

    Attributes:
      failure: what the last write failed with; None where it did not.
    """

    def __init__(self, storage: Storage) -> None:
        self.failure: SaveError | None = None
        self._storage = storage
        self._thread: ThreadPoolExecutor | None = None
        self._finishing: Future[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it takes checkpoints."""
        return self._thread is not None

    def start(self) -> None:
        """Makes the thread."""
        self._thread = ThreadPoolExecutor(1, "functrain-checkpoints")

    def write(
        self,
        checkpoint: Path,
        leaves: Mapping[str, Any],
        contents: Contents,
        *,
        summary: Mapping[str, Any],
        then: Callable[[Path], None],
    ) -> None:
        """Starts to write a checkpoint, and returns when its leaves may be overwritten.

        Args:
          checkpoint: its folder.
          leaves: by name.
          contents: what is beside them.
          summary: for the manifest, which process 0 writes when all is there.
          then: what process 0 does after that.

        Raises:
          SaveError: it could not be begun.
        """
        assert self._thread is not None
        try:
            self._storage.write(checkpoint, leaves, contents)
        except Exception as error:
            raise self._failed(checkpoint, error) from error
        self._finishing = self._thread.submit(self._finish, checkpoint, summary, then)

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk.

        Raises:
          SaveError: it failed.
        """
        if self._finishing is not None:
            self._finishing.result()
            self._finishing = None
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Ends the thread; it may be started again."""
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = None

    def _finish(self, checkpoint: Path, summary: Mapping[str, Any], then: Callable[[Path], None]) -> None:
        try:
            self._storage.wait()
            if jax.process_index() == 0:
                manifest.publish(checkpoint, summary)
        except Exception as error:
            self._failed(checkpoint, error)
            return
        self.failure = None
        if jax.process_index() == 0:
            then(checkpoint)

    def _failed(self, checkpoint: Path, error: Exception) -> SaveError:
        self.failure = SaveError(
            f"the checkpoint {checkpoint} could not be written: {type(error).__name__}: {error}; the one before it is"
            " whole, make room or mend the folder, the next save is tried as ever"
        )
        self._storage.give_up(checkpoint)
        return self.failure
