"""Orbax, as far as checkpoints need it: leaves by name, and what is beside them as JSON, in a folder."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from functrain.loop.checkpoint.contents import Contents
from functrain.loop.checkpoint.leaves import shape_dtype
from functrain.loop.checkpoint.placement import owned, to_read, to_write
from functrain.loop.checkpoint.plain import PlainPaths

_ARRAYS, _CONTENTS = "state", "facts"


def contents_file(checkpoint: Path) -> Path:
    """The file that holds the `Contents` of a checkpoint."""
    return checkpoint / _CONTENTS / "metadata"


class Storage:
    """Writes and reads checkpoints; a write goes on in the background."""

    def __init__(self) -> None:
        self._orbax: Any = None
        self._plain = PlainPaths()
        self._spare: dict[str, jax.Array] = {}

    def write(self, checkpoint: Path, leaves: Mapping[str, Any], contents: Contents) -> None:
        """Starts to write, and returns when the leaves may be overwritten."""
        import orbax.checkpoint as ocp

        # Orbax refuses empty leaves.
        filled = {name: leaf for name, leaf in leaves.items() if jnp.size(leaf)}
        filled, self._spare = to_write(filled, self._spare)
        items = {_ARRAYS: ocp.args.PyTreeSave(filled), _CONTENTS: ocp.args.JsonSave(contents.to_json())}
        self._checkpointer().save(self._plain.of(checkpoint), args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when all is written; raises what went wrong in the background."""
        if self._orbax is not None:
            self._orbax.wait_until_finished()

    def contents(self, checkpoint: Path) -> Contents:
        """What a checkpoint holds, but for the arrays.

        Raises:
          CheckpointError: it was written in another format.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(**{_CONTENTS: ocp.args.JsonRestore()})
        return Contents.from_json(self._read(checkpoint, args)[_CONTENTS], checkpoint)

    def leaves(self, checkpoint: Path, specs: Mapping[str, str], places: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a checkpoint, each where its place says."""
        import orbax.checkpoint as ocp

        empty = {name for name, spec in specs.items() if math.prod(shape_dtype(spec)[0]) == 0}
        targets = {name: to_read(name, specs[name], places[name]) for name in specs if name not in empty}
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        args = ocp.args.Composite(**{_ARRAYS: ocp.args.PyTreeRestore(targets, restore_args=restore_args)})
        read = self._read(checkpoint, args)[_ARRAYS]
        leaves = {name: owned(leaf, places[name]) for name, leaf in read.items()}
        return leaves | {name: jax.device_put(jnp.zeros(*shape_dtype(specs[name])), places[name]) for name in empty}

    def give_up(self) -> None:
        """Forgets a write that failed."""
        # An Orbax checkpointer that failed reports it again, and loses the next save.
        broken, self._orbax = self._orbax, None
        self._spare = {}
        if broken is not None:
            with contextlib.suppress(Exception):
                broken.close()

    def close(self) -> None:
        """Gives back threads and memory; it may be used again."""
        if self._orbax is not None:
            self._orbax.close()
        self._orbax, self._spare = None, {}
        self._plain.close()

    def _read(self, checkpoint: Path, args: Any) -> Any:
        return self._checkpointer().restore(self._plain.of(checkpoint), args=args)

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp

            # Compressing takes five times the processor time of writing, and trained weights hardly shrink.
            arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers = {_ARRAYS: arrays, _CONTENTS: ocp.JsonCheckpointHandler()}
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        return self._orbax
