"""What a checkpoint says that it holds: its parts, their optimizers and sizes, how far the run was."""

import contextlib
from pathlib import Path
from typing import NamedTuple

from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.contents import Contents, decoded, read_contents
from functrain.loop.checkpoint.folder import Entry
from functrain.loop.checkpoint.specs import nbytes

REST = "the rest"
_BY_PART = ("opt_state/", "ema/")  # The name of the part is behind it.


class Part(NamedTuple):
    """A part of a run: its optimizer, its parameters, the bytes of all that is kept of it."""

    optimizer: str
    paths: list[str]
    nbytes: int


class Held(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      parts: by name.
      rest: bytes of what belongs to no part.
      epoch: when it was saved; None where `fit` did not save it.
      seconds: of training until then; None likewise.
      versions: of the packages that wrote it.
    """

    parts: dict[str, Part]
    rest: int
    epoch: int | None
    seconds: float | None
    versions: dict[str, str]

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """The bytes of each part, and of the rest."""
        return {name: part.nbytes for name, part in self.parts.items()} | {REST: self.rest}


def held_in(checkpoint: Path) -> Held:
    """Reads what a checkpoint says of itself, without JAX; its arrays are not read.

    Raises:
      CheckpointError: it can't be read or makes no sense, or was written in another format.
    """
    contents = read_contents(checkpoint)
    try:
        return _held(contents)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"what the checkpoint {checkpoint} holds can't be read: {problem}; have it verified")


def saved_at(entry: Entry) -> float | None:
    """When a checkpoint was saved, in seconds since 1970; None where no manifest says it."""
    with contextlib.suppress(ValueError, OSError):
        when = (manifest.load(entry.path) or {}).get("time")
        return when if isinstance(when, int | float) else None
    return None


def _held(contents: Contents) -> Held:
    sizes = {REST: 0}
    for name, part in owners(contents).items():
        sizes[part] = sizes.get(part, 0) + nbytes(contents.specs[name])
    optimizers = contents.configuration.get("optimizers", {})
    parts = {
        part: Part(str(optimizers.get(part, "-")), [*map(str, paths)], sizes.get(part, 0))
        for part, paths in _paths(contents).items()
    }
    extra = decoded(contents.beside.extra)
    said = extra if isinstance(extra, dict) else {}
    epoch, seconds = said.get("epoch"), said.get("seconds")
    return Held(
        parts,
        sizes[REST],
        epoch if isinstance(epoch, int) else None,
        seconds if isinstance(seconds, int | float) else None,
        {str(name): str(version) for name, version in contents.versions.items()},
    )


def owners(contents: Contents) -> dict[str, str]:
    """The part of each leaf, by its name in the checkpoint; of those that belong to none, `REST`."""
    parts = _paths(contents)
    of_params = {f"params/{path}": part for part, paths in parts.items() for path in paths}
    longest_first = sorted(parts, key=len, reverse=True)

    def owner(name: str) -> str:
        field = next((field for field in _BY_PART if name.startswith(field)), None)
        if field is None:
            return of_params.get(name, REST)
        within = f"{name.removeprefix(field)}/"
        return next((part for part in longest_first if within.startswith(f"{part}/")), REST)

    return {name: owner(name) for name in contents.specs}


def _paths(contents: Contents) -> dict[str, list[str]]:
    return dict(contents.configuration.get("parts", {}))
