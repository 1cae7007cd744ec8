"""Orbax, as far as checkpoints need it: leaves by name, and what is beside them as JSON, in a folder."""

import contextlib
import itertools
import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from functrain.errors import SaveError
from functrain.loop.checkpoint.contents import ITEM, Contents, contents_file
from functrain.loop.checkpoint.packs import target, unpacked
from functrain.loop.checkpoint.placement import Copy, owned, placed, to_read, to_write
from functrain.loop.checkpoint.plain import PlainPaths
from functrain.loop.checkpoint.specs import shape_dtype

_ARRAYS = "state"


class Storage:
    """Writes and reads checkpoints; a write goes on in the background."""

    def __init__(self) -> None:
        self._orbax: Any = None
        self._plain = PlainPaths()
        self._spare: dict[str, Copy] = {}

    def write(self, checkpoint: Path, leaves: Mapping[str, Any], contents: Contents) -> None:
        """Starts to write, and returns when the leaves may be overwritten."""
        import orbax.checkpoint as ocp

        specs = contents.specs
        # Orbax refuses empty leaves.
        filled = {name: leaf for name, leaf in leaves.items() if not _is_empty(specs[name])}
        arrays, self._spare = to_write(filled, contents.packs, self._spare)
        items = {_ARRAYS: ocp.args.PyTreeSave(arrays), ITEM: ocp.args.JsonSave(contents.to_json())}
        self._checkpointer().save(self._plain.of(checkpoint), args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when all is written; raises what went wrong in the background."""
        if self._orbax is not None:
            self._orbax.wait_until_finished()

    def check(self, checkpoint: Path, contents: Contents) -> None:
        """Reads back what a written checkpoint says that it holds.

        Raises:
          SaveError: it is not what was given to write.
        """
        import orbax.checkpoint as ocp

        # Not by Orbax, which would have all processes read.
        written = json.loads(contents_file(checkpoint).read_bytes())
        is_whole = json.dumps(written) == json.dumps(contents.to_json())
        arrays = ocp.PyTreeCheckpointHandler().metadata(self._plain.of(checkpoint) / _ARRAYS).tree
        packed = {*itertools.chain(*contents.packs.values())}
        large = {name for name, spec in contents.specs.items() if name not in packed and not _is_empty(spec)}
        if not is_whole or arrays.keys() != {*contents.packs, *large}:
            raise SaveError(f"Orbax wrote {checkpoint} without an error, and it does not hold what was given to write")

    def contents(self, checkpoint: Path) -> Contents:
        """What a checkpoint holds, but for the arrays.

        Raises:
          CheckpointError: it was written in another format.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(**{ITEM: ocp.args.JsonRestore()})
        return Contents.from_json(self._read(checkpoint, args)[ITEM], checkpoint)

    def leaves(
        self,
        checkpoint: Path,
        contents: Contents,
        places: Mapping[str, Any],
        *,
        only: Container[str] | None = None,
    ) -> dict[str, Any]:
        """The leaves of a checkpoint with these contents, or some of them by name, each where its place says."""
        import orbax.checkpoint as ocp

        is_asked = (lambda name: True) if only is None else only.__contains__
        packs = {pack: names for pack, names in contents.packs.items() if any(map(is_asked, names))}
        packed = {*itertools.chain(*packs.values())}
        specs = {name: spec for name, spec in contents.specs.items() if is_asked(name) or name in packed}
        empty = {name: [name] for name, spec in specs.items() if _is_empty(spec)}
        on_host = {*empty, *packed}
        targets = {name: to_read(name, specs[name], places[name]) for name in specs if name not in on_host}
        targets |= {pack: target(names, specs) for pack, names in packs.items()}
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        arrays = ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=only is not None)
        args = ocp.args.Composite(**{_ARRAYS: arrays})
        read = self._read(checkpoint, args)[_ARRAYS]
        small = [unpacked(read.pop(pack), names, specs) for pack, names in packs.items()]
        small += [unpacked(target(names, specs), names, specs) for names in empty.values()]
        large = {name: owned(leaf, places[name]) for name, leaf in read.items()}
        asked = {name: leaf for each in small for name, leaf in each.items() if is_asked(name)}
        return large | placed(asked, specs, places)

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
            handlers = {_ARRAYS: arrays, ITEM: ocp.JsonCheckpointHandler()}
            # Threads that wait for a folder which can't be made keep a program from ending for ten minutes.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            composite = ocp.CompositeOptions(async_options=options)
            handler = ocp.CompositeCheckpointHandler(composite_options=composite, **handlers)
            self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        return self._orbax


def _is_empty(spec: str) -> bool:
    return 0 in shape_dtype(spec)[0]
