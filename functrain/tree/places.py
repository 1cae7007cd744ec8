"""The line of a user's program that an operation of a traced program derives from."""

import dataclasses
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jaxlib

_PACKAGE = str(Path(__file__).parent.parent)
_OF_JAX = (str(Path(jax.__file__).parent), str(Path(jaxlib.__file__).parent))
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class Place(NamedTuple):
    """A line of a program, in a function; an unknown one has no file."""

    file: str = ""
    line: int = 0
    function: str = ""


@dataclasses.dataclass(frozen=True)
class Level:
    """A traced function in which an operation stands, and the operation.

    Attributes:
      file: where the function is written; empty if that is not known.
      begins: its first line.
      frames: the calls that led to the operation when it was traced, innermost first.
      turn: of the loop whose body the function is.
    """

    file: str
    begins: int
    frames: tuple[Any, ...] = ()
    turn: int | None = None

    @classmethod
    def of(cls, jaxpr: Any, turn: int | None = None) -> Self:
        """The function that a jaxpr was traced from."""
        told = str(getattr(jaxpr.debug_info, "func_src_info", "") or "")  # "loss_fn at /home/me/train.py:12".
        file, _, line = told.partition(" at ")[2].rpartition(":")
        return cls(file, int(line) if line.isdigit() else 0, turn=turn)

    def at(self, eqn: Any) -> Self:
        """The same function, at an operation of it."""
        info = eqn.source_info
        frames = tuple(info.traceback.frames) if info.traceback is not None else ()
        return dataclasses.replace(self, frames=frames)

    @property
    def inside(self) -> tuple[Any, ...]:
        """The frames within the function; of one of JAX that is traced once, not those of whoever called it first."""
        for i, frame in enumerate(self.frames):
            if frame.file_name == self.file and frame.function_start_line == self.begins:
                return self.frames[: i + 1]
        return self.frames if _is_not_of_jax(self.file) else ()


def place_of(levels: tuple[Level, ...]) -> Place:
    """The innermost line that is of the user's program, else of a library that is not JAX, else of functrain."""
    frames = [frame for level in levels[::-1] for frame in level.inside]
    for is_asked_for in (_is_users, _is_of_library, _is_not_of_jax):
        for frame in frames:
            if is_asked_for(frame.file_name):
                return Place(frame.file_name, frame.line_num, frame.function_name.rpartition(".")[2])
    return Place()


def _is_users(file: str) -> bool:
    return _is_of_library(file) and not file.startswith((*_INSTALLED, "<frozen"))


def _is_of_library(file: str) -> bool:
    return _is_not_of_jax(file) and not file.startswith(_PACKAGE)


def _is_not_of_jax(file: str) -> bool:
    return not file.startswith(_OF_JAX)
