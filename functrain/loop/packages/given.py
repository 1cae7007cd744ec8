"""What a package is given, looked at before it computes: shapes, NaN, labels, and whether scikit-learn is there."""

import importlib.util
from typing import Any

import numpy as np

from functrain.errors import EvaluationError

_LEFT_OUT = "give these examples the weight 0, or mend what eval_step returns"


def check_names(package: Any, **names: Any) -> None:
    """Raises where the name of an output is none.

    Raises:
      EvaluationError: shows it, and what to write.
    """
    for field, name in names.items():
        if not isinstance(name, str):
            call = f"{type(package).__name__}({field}="
            raise EvaluationError(f"{call}{name!r:.100}): give the name of an output of eval_step, {call}'{field}')")


def check_installed(package: Any) -> None:
    """Raises without scikit-learn: here, as the numbers are wanted at the end of a run.

    Raises:
      EvaluationError: says what to install.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise EvaluationError(
            f"{type(package).__name__} computes by scikit-learn, which is not installed: write pip install"
            " 'functrain[record]'"
        )


def reals(package: Any, name: str, array: np.ndarray, *, ndim: int | None = None) -> np.ndarray:
    """An output as float64, (examples, ...).

    Raises:
      EvaluationError: there is no example, one is not finite, or has another shape.
    """
    what = type(package).__name__
    if not len(array):
        raise EvaluationError(f"{what}: no example has a weight above 0: give data with examples")
    if ndim is not None and array.ndim != ndim:
        raise EvaluationError(
            f"{what}: {name!r} is of shape {array.shape}: return {'one number' if ndim == 1 else 'one row'} for each"
            " example"
        )
    reals = np.asarray(array, np.float64)
    refuse(package, ~np.isfinite(reals.reshape(len(reals), -1)).all(axis=1), f"a {name!r} that is NaN or infinite")
    return reals


def refuse(package: Any, are_bad: Any, what: str, instead: str = _LEFT_OUT) -> None:
    """Raises where an example is marked, bool (examples,).

    Raises:
      EvaluationError: counts them, and says which is the first.
    """
    if np.any(are_bad):
        raise EvaluationError(
            f"{type(package).__name__}: {np.count_nonzero(are_bad)} of {len(are_bad)} examples, the first is number"
            f" {np.argmax(are_bad)}, have {what}: {instead}"
        )


def whole(package: Any, name: str, array: np.ndarray) -> np.ndarray:
    """An output as whole numbers, (examples,).

    Raises:
      EvaluationError: it is of another shape, or a number is not whole.
    """
    if array.ndim != 1:
        raise EvaluationError(
            f"{type(package).__name__}: {name!r} is of shape {array.shape}: return one whole number for each example;"
            f" of what is one-hot, {name}.argmax(-1)"
        )
    if array.dtype.kind not in "iub":
        found = reals(package, name, array)
        refuse(package, found != np.round(found), f"a {name!r} that is no whole number")
    return array.astype(np.int64)


def indices(package: Any, name: str, array: np.ndarray, most: int, kind: str) -> np.ndarray:
    """An output as numbers from 0 on, (examples,), of `most` things of a kind, such as "classes".

    Raises:
      EvaluationError: they are not whole, or outside of that.
    """
    found = whole(package, name, array)
    outside = found[(found < 0) | (found >= most)]
    if len(outside):
        raise EvaluationError(
            f"{type(package).__name__}: {len(outside)} of {len(found)} examples have a {name!r} outside of 0 to"
            f" {most - 1}, such as {outside[0]}, and there are {most} {kind}: give them the weight 0, or more {kind}"
        )
    return found
