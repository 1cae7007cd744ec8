"""What is said while JAX traces a program: numbers that Python asks for, and batches for which it is traced anew."""

import contextlib
import re
import traceback
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import LossError
from functrain.tree.text import listed_lines
from functrain.tree.warn import warn

_OURS = tuple(f"{Path(package).parent}/" for package in (jax.__file__, Path(__file__).parent))
_DEPENDS = re.compile(r"depends on the values? of the arguments? (.*)\.")
_SAID = re.compile(r"\n(?:The error occurred|This concrete value|This value became|See https)")
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (
        jax.errors.TracerBoolConversionError,
        "in the place of a Python `if`, `while`, `and` or `assert` write jnp.where(condition, this, that), or"
        " jax.lax.cond(condition, this, that) for functions",
    ),
    (jax.errors.NonConcreteBooleanIndexError, "in the place of x[mask] write jnp.where(mask, x, 0)"),
    (
        jax.errors.TracerIntegerConversionError,
        "in the place of an index into a list write jnp.stack(them)[index], in that of a range jax.lax.fori_loop",
    ),
    (jax.errors.TracerArrayConversionError, "in the place of np write jnp"),
    (
        jax.errors.ConcretizationTypeError,
        "in the place of float(x), int(x) or x.item() leave x an array, x.astype(float); take a length from a shape",
    ),
)


@contextlib.contextmanager
def names_of_arguments(names: Callable[[], dict[str, str]]) -> Iterator[None]:
    """Has the error of a number that Python asks for say which leaves it depends on, and what to write.

    Args:
      names: gives what an argument is to the user, by what JAX calls it; asked only if there is such an error.

    Raises:
      LossError: from the error of JAX.
    """
    try:
        yield
    except tuple(kind for kind, _ in _ADVICE) as error:
        of = names()
        found = _DEPENDS.search(str(error))
        arguments = [of.get(each, each) for each in re.split(r", and | and |, ", found[1])] if found else []
        more = f" and {len(arguments) - 10} more" if len(arguments) > 10 else ""
        depends = f", which depends on {', '.join(arguments[:10])}{more}" if arguments else ""
        advice = next(text for kind, text in _ADVICE if isinstance(error, kind))
        raise LossError(
            f"{_line(error)} asks for a number that is not known while the step is compiled{depends}"
            f" (JAX: {' '.join(_SAID.split(str(error))[0].split())}): {advice}"
        ) from error


class Batches:
    """The batches for which programs were traced, one kind for each program that does not change."""

    def __init__(self) -> None:
        self._first: dict[Hashable, dict[str, str]] = {}
        self._is_told = False

    def see(self, program: Hashable, batch: Any) -> None:
        """Warns, once, of a batch for which a program is compiled anew; called whenever it is traced."""
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        shapes = {_path(keys): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for keys, leaf in leaves}
        first = self._first.setdefault(program, shapes)
        if shapes == first or self._is_told:
            return
        self._is_told = True
        paths = [path for path in {**first, **shapes} if first.get(path) != shapes.get(path)]
        differs = [f"{path!r}: {first.get(path, 'missing')}, and now {shapes.get(path, 'missing')}" for path in paths]
        warn(
            f"the step is compiled anew for a batch of another shape, and for each one more:{listed_lines(differs)}\n"
            "give all batches one shape: ft.from_arrays(..., last='pad') fills up a short last one, with weights, and"
            " last='drop' leaves it out"
        )


def field_and_path(path: str) -> str:
    """A leaf of a state in words.

    >>> field_and_path("params/conv1/kernel"), field_and_path("params")
    ("params 'conv1/kernel'", 'params')
    """
    field, _, rest = path.partition("/")
    return f"{field} {rest!r}" if rest else field


def described(argument: str, what: str, tree: Any) -> dict[str, str]:
    """What the leaves of an argument are to the user, by what JAX calls them: "the batch's 'image'"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        f"{argument}{jax.tree_util.keystr(keys)}": f"{what} {_path(keys)!r}" if keys else what for keys, _ in leaves
    }


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _line(error: Exception) -> str:
    """The innermost line of the traceback that is neither ours nor JAX's."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_OURS)]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}, {theirs[-1].line!r}," if theirs else "something"
