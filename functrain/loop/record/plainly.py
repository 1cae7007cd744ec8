"""A configuration as JSON has it."""

import argparse
import dataclasses
import enum
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from functrain.errors import RecordError
from functrain.loop.lines import SPELLED

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_DEEPEST, _MOST_ELEMENTS, _MOST_CHARACTERS = 20, 64, 1000


def plainly(value: Any, where: str = "config") -> Any:
    """A value as JSON can hold it, the same for the same value in each process.

    >>> plainly({"rates": (1e-3, np.float32(0.5)), "name": argparse.Namespace(out=None), "init": math.sqrt})
    {'rates': [0.001, 0.5], 'name': {'out': None}, 'init': 'math.sqrt'}

    Args:
      value: numbers, texts, arrays, and in any depth mappings, sequences, dataclasses and namespaces of them; a
        function or a class by its name; of what is none of these what it says of itself.
      where: what it is called in an error.

    Raises:
      RecordError: it holds itself, or two of its keys have one name.
    """
    return _plainly(value, where, 0)


def _plainly(value: Any, where: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise RecordError(f"{where} is nested more than {_DEEPEST} deep, or holds itself: give the values that matter")
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else SPELLED[str(float(value))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        found = {str(key): _plainly(each, f"{where}[{key!r}]", depth + 1) for key, each in value.items()}
        if len(found) < len(value):
            raise RecordError(f"two keys of {where} read alike: {sorted(map(repr, value))}; give each its own name")
        return found
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return _of_array(value, where, depth)
    if isinstance(value, list | tuple | set | frozenset | range):
        each: Iterable[Any] = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [_plainly(one, f"{where}[{place}]", depth + 1) for place, one in enumerate(each)]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", str(value))[:_MOST_CHARACTERS]


def _of_array(value: Any, where: str, depth: int) -> Any:
    if np.size(value) > _MOST_ELEMENTS or np.asarray(value).dtype.kind not in "biuf":
        return f"{value.dtype}{list(np.shape(value))}"
    if np.ndim(value) == 0 and value.dtype.kind == "f":
        return _plainly(float(str(np.asarray(value))), where, depth + 1)  # 0.1 of float32 reads 0.1.
    return _plainly(np.asarray(value).tolist(), where, depth + 1)
