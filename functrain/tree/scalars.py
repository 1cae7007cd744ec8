"""Numbers that users give: whether they are any."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def wrong_scalar(value: Any, *, least: float = 0.0) -> str:
    """Says why a value is no finite real number of at least some size; empty where it is one.

    >>> wrong_scalar(0.1), wrong_scalar(float("nan")), wrong_scalar("0.1"), wrong_scalar(-1.0)
    ('', 'nan', "'0.1', of type str", '-1.0, which is below 0')

    What is on a device, or traced, is known by its shape and dtype alone: its value is not read.
    """
    if isinstance(value, bool | str) or (not hasattr(value, "dtype") and not isinstance(value, int | float)):
        return f"{value!r}, of type {type(value).__name__}"
    if jnp.shape(value) != ():
        return f"an array of shape {jnp.shape(value)}"
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating) and not jnp.issubdtype(
        jnp.result_type(value), jnp.integer
    ):
        return f"of dtype {jnp.result_type(value)}"
    if isinstance(value, jax.Array):
        return ""
    number = float(value)
    if not math.isfinite(number):
        return f"{number}"
    return f"{number}, which is below {least:g}" if number < least else ""
