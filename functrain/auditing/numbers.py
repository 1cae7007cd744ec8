"""The numbers of an operation in words: what went in, what came out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def told_of(name: str, values: Sequence[Any], out: Any) -> str:
    """What an operation made of what: of single numbers where these belong together, else of their ranges.

    >>> told_of("log", [jnp.array([1.0, 0.0])], jnp.array([0.0, -jnp.inf]))
    'log(0.0) is -inf at [1] of float32[2]'
    """
    made, place = _first_bad(out)
    shape, at = jnp.shape(out), _at(out, place)
    if all(jnp.shape(value) in ((), shape) and _is_number(value) for value in values):
        numbers = [np.asarray(value)[place if jnp.shape(value) else ()] for value in values]
        return f"{name}({', '.join(map(_spelled, numbers))}) is {made}{at}"
    return f"{name} of {', '.join(map(_ranged, values))} is {made}{at}"


def told(name: str, value: Any) -> str:
    """The first number of a value that is not finite.

    >>> told("x", jnp.array([1.0, jnp.nan]))
    'x is nan at [1] of float32[2]'
    """
    number, place = _first_bad(value)
    return f"{name} is {number}{_at(value, place)}"


def _first_bad(value: Any) -> tuple[str, tuple[int, ...]]:
    array = np.asarray(value)
    place = tuple(int(i) for i in np.unravel_index(np.argmin(np.isfinite(array)), array.shape))
    return _spelled(array[place]), place


def _at(value: Any, place: tuple[int, ...]) -> str:
    return f" at {list(place)} of {_shaped(value)}" if place else ""


def _shaped(value: Any) -> str:
    return f"{jnp.result_type(value)}[{','.join(map(str, jnp.shape(value)))}]"


def _is_number(value: Any) -> bool:
    return any(jnp.issubdtype(jnp.result_type(value), kind) for kind in (jnp.number, jnp.bool_))


def _spelled(number: Any) -> str:
    return str(float(number)) if jnp.issubdtype(number.dtype, jnp.floating) else str(number)


def _ranged(value: Any) -> str:
    """The shape of an operand, and the range of its finite numbers."""
    is_real = any(jnp.issubdtype(jnp.result_type(value), kind) for kind in (jnp.floating, jnp.integer))
    if not np.size(value) or not is_real:
        return _shaped(value)
    low, high = (float(end) for end in _range(value))
    return f"{_shaped(value)} of {low:g} to {high:g}"


@jax.jit
def _range(value: Any) -> tuple[jax.Array, jax.Array]:
    kept = jnp.where(jnp.isfinite(value), value, jnp.ravel(value)[0])
    return jnp.min(kept), jnp.max(kept)
