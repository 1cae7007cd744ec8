"""Orbax, as far as checkpoints need it: leaves by name, and what is beside them as JSON, in a folder."""

import contextlib
import itertools
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from functrain.loop.checkpoint.contents import Contents
from functrain.loop.checkpoint.leaves import shape_dtype
from functrain.loop.checkpoint.packs import target, unpacked
from functrain.loop.checkpoint.placement import Copy, owned, placed, to_read, to_write

_ARRAYS, _CONTENTS = "state", "facts"
_TRIES, _PAUSE = 20, 0.02  # Seconds.


def contents_file(checkpoint: Path) -> Path:
    """The file that holds the `Contents` of a checkpoint."""
    return checkpoint / _CONTENTS / "metadata"


class Storage:
    """Writes and reads checkpoints; a write goes on in the background."""

    def __init__(self) -> None:
        self._orbax: Any = None
        self._spare: dict[str, Copy] = {}

    def write(self, checkpoint: Path, leaves: Mapping[str, Any], contents: Contents) -> None:
        """Starts to write, and returns when the leaves may be overwritten."""
        import orbax.checkpoint as ocp

        # Orbax refuses empty leaves.
        filled = {name: leaf for name, leaf in leaves.items() if not _is_empty(contents.specs[name])}
        arrays, self._spare = to_write(filled, contents.packs, self._spare)
        items = {_ARRAYS: ocp.args.PyTreeSave(arrays), _CONTENTS: ocp.args.JsonSave(contents.to_json())}
        self._checkpointer().save(checkpoint, args=ocp.args.Composite(**items))

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
        return Contents.from_json(self._checkpointer().restore(checkpoint, args=args)[_CONTENTS], checkpoint)

    def leaves(self, checkpoint: Path, contents: Contents, places: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of a checkpoint with these contents, each where its place says."""
        import orbax.checkpoint as ocp

        specs, packs = contents.specs, contents.packs
        empty = {name: [name] for name, spec in specs.items() if _is_empty(spec)}
        on_host = {*empty, *itertools.chain(*packs.values())}
        targets = {name: to_read(name, specs[name], places[name]) for name in specs if name not in on_host}
        targets |= {pack: target(names, specs) for pack, names in packs.items()}
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        args = ocp.args.Composite(**{_ARRAYS: ocp.args.PyTreeRestore(targets, restore_args=restore_args)})
        read = self._checkpointer().restore(checkpoint, args=args)[_ARRAYS]
        small = [unpacked(read.pop(pack), names, specs) for pack, names in packs.items()]
        small += [unpacked(target(names, specs), names, specs) for names in empty.values()]
        large = {name: owned(leaf, places[name]) for name, leaf in read.items()}
        return large | placed(dict(itertools.chain(*map(dict.items, small))), specs, places)

    def give_up(self, checkpoint: Path) -> None:
        """Forgets a write that failed, and removes what there is of it."""
        # An Orbax checkpointer that failed reports it again, and loses the next save.
        broken, self._orbax = self._orbax, None
        self._spare = {}
        if broken is not None:
            with contextlib.suppress(Exception):
                broken.close()
        if jax.process_index() == 0:
            _remove_unfinished(checkpoint)

    def close(self) -> None:
        """Gives back threads and memory; it may be used again."""
        if self._orbax is not None:
            self._orbax.close()
        self._orbax, self._spare = None, {}

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp

            # Compressing takes five times the processor time of writing, and trained weights hardly shrink.
            arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers = {_ARRAYS: arrays, _CONTENTS: ocp.JsonCheckpointHandler()}
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        return self._orbax


def _is_empty(spec: str) -> bool:
    return 0 in shape_dtype(spec)[0]


def _remove_unfinished(checkpoint: Path) -> None:
    """Removes what there is of a checkpoint, also where threads of a failed write still add to it for a moment."""
    for _ in range(_TRIES):
        left = [*checkpoint.parent.glob(f"{checkpoint.name}.orbax-checkpoint-tmp*")]
        if not left:
            return
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_PAUSE)
