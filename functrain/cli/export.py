"""`functrain export`: the parameters of a checkpoint as a file of safetensors."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from functrain.cli.answer import Answer
from functrain.cli.arrays import PARAMS, leaves_in
from functrain.cli.place import absolute
from functrain.errors import CheckpointError
from functrain.loop.checkpoint.durable import sync
from functrain.loop.checkpoint.held import owners
from functrain.tree.text import bytes_in_words, did_you_mean, leaves_in_words, listed

if TYPE_CHECKING:
    import numpy as np


def run(arguments: Namespace) -> Answer:
    """Writes the parameters, or those of some parts, each by its path.

    Raises:
      CheckpointError: safetensors is not installed, there is a file already, or no checkpoint, no such part, or a dtype
        that safetensors does not have.
      OSError: the file can't be written; nothing of it is.
    """
    _check_installed()
    out = absolute(arguments.out)
    if os.path.lexists(out) and not arguments.force:
        raise CheckpointError(f"{arguments.out} is there already: give another file, or --force to replace it")
    if not out.parent.is_dir():
        raise CheckpointError(f"there is no folder {out.parent} to write to: make it first")
    found, notes = leaves_in(arguments.checkpoint, lambda name: name.startswith(PARAMS))
    part_of = owners(found.contents)
    parts = sorted({part_of[name] for name in found.named})
    if unknown := [part for part in arguments.part or () if part not in parts]:
        raise CheckpointError(
            f"there is no part {listed(unknown)} in {found.shown}: there are"
            f" {listed(parts)}{did_you_mean(unknown, parts)}"
        )
    asked = arguments.part or parts
    leaves = {name.removeprefix(PARAMS): leaf for name, leaf in found.named.items() if part_of[name] in asked}
    about = {"functrain": found.contents.versions.get("functrain", "-"), "checkpoint": found.checkpoint.name}
    _write(leaves, out, about)
    size = out.stat().st_size
    data = {
        "checkpoint": found.shown,
        "file": str(out),
        "parts": asked,
        "bytes": size,
        "leaves": {name: {"shape": leaf.shape, "dtype": str(leaf.dtype)} for name, leaf in leaves.items()},
    }
    text = f"{arguments.out}: {leaves_in_words(len(leaves))} of {listed(asked)}, {bytes_in_words(size)}"
    return Answer(text, data, notes=notes)


def _check_installed() -> None:
    try:
        import safetensors.numpy  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"{error}; write pip install 'functrain[export]'") from error


def _write(leaves: Mapping[str, "np.ndarray"], out: Path, about: dict[str, str]) -> None:
    """Writes a file whole or not at all; until then it has a hidden name."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save_file({name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}, temporary, about)
        sync(temporary)
        temporary.replace(out)
    except SafetensorError as error:
        instead = "make room, or give another file" if "I/O error" in str(error) else "export other parts, --part"
        raise CheckpointError(f"{out} can't be written: {error}; {instead}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
