"""What is written beside the arrays of a checkpoint, as JSON: what it takes to read them back, and if they fit."""

import base64
import dataclasses
import functools
import importlib.metadata
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from functrain.errors import CheckpointError

ITEM = "facts"  # The folder that it is in.
FORMAT = 3
_READ = (2, FORMAT)  # In 2, every leaf is an array of its own.
_PACKAGES = ("functrain", "jax", "optax", "orbax-checkpoint", "numpy")


def contents_file(checkpoint: Path) -> Path:
    """The file that holds the `Contents` of a checkpoint."""
    return checkpoint / ITEM / "metadata"


@dataclasses.dataclass(frozen=True)
class Beside:
    """What the caller saves with a state, as JSON has it.

    Attributes:
      data: the position in the data, encoded.
      metrics: numbers by name.
      extra: more, encoded.
    """

    data: Any
    metrics: dict[str, float]
    extra: Any

    @classmethod
    def of(cls, data: Any, metrics: Mapping[str, float] | None, extra: Any) -> Self:
        """Encodes what the caller gave.

        Raises:
          CheckpointError: what JSON can't hold.
        """
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        return cls(_encoded("data", data), numbers, _encoded("extra", extra))

    @property
    def checksum(self) -> int:
        """What tells it from another one of the same state."""
        return zlib.crc32(json.dumps(dataclasses.asdict(self)).encode())


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, but for the arrays.

    Attributes:
      leaves: shape and dtype by name, of every leaf but those of a pending window, whose form follows from the rest.
      window: the containers of a pending window.
      window_leaves: shape and dtype of its leaves.
      packs: the names of the leaves that are kept together, in their order, by the name of their pack.
      configuration: what the update was made of.
      beside: what the caller saved with the state.
      versions: of the packages that wrote it.
      optimizer_leaves: how many leaves the optimizer state of each part has, in the order of `leaves`.
      format: the number of this format.
    """

    leaves: dict[str, str]
    window: Any
    window_leaves: dict[str, str]
    packs: dict[str, list[str]]
    configuration: dict[str, Any]
    beside: Beside
    versions: dict[str, str]
    optimizer_leaves: dict[str, int] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def specs(self) -> dict[str, str]:
        """Shape and dtype of every leaf."""
        return self.leaves | self.window_leaves

    @property
    def is_of_this_optax(self) -> bool:
        """Whether it was written with the optax that is here: in another, a transform may be made of others."""
        return self.versions.get("optax") == versions()["optax"]

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return vars(self) | {"beside": vars(self.beside)}

    @classmethod
    def from_json(cls, written: Mapping[str, Any], where: object) -> Self:
        """The inverse of `to_json`.

        Raises:
          CheckpointError: it was written in another format.
        """
        if (number := written.get("format", 1)) not in _READ:
            by, here = written.get("versions", {}).get("functrain", "another version"), versions()["functrain"]
            raise CheckpointError(
                f"the checkpoint {where} was written by functrain {by} in format {number}; this is functrain {here},"
                f" which reads formats {' and '.join(map(str, _READ))}: go on with functrain {by}, or start anew in"
                " another folder"
            )
        return cls(**{"packs": {}, **written, "beside": Beside(**written["beside"])})


def read_contents(checkpoint: Path) -> Contents:
    """What a checkpoint holds, but for the arrays; read without Orbax, and not compared with its checksum.

    Raises:
      CheckpointError: it can't be read, or was written in another format.
    """
    try:
        written = json.loads(contents_file(checkpoint).read_bytes())
        return Contents.from_json(written, checkpoint)
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"what the checkpoint {checkpoint} holds can't be read: {problem}; have it verified")


def _encoded(name: str, value: Any) -> Any:
    """A value that JSON can hold, or bytes."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}= of a checkpoint: {error}; give what JSON can hold, or bytes") from None
    return {"json": value}


def decoded(value: Any) -> Any:
    """The data or extra of a `Beside` as the caller gave it."""
    return base64.b64decode(value["bytes"]) if "bytes" in value else value["json"]


@functools.cache
def versions() -> dict[str, str]:
    """The packages that a checkpoint is written with; looking it up takes milliseconds."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
