"""Warnings at the line of the program that called us, however deep we are."""

import sys
import warnings

_NOT_THE_USERS = (__name__.partition(".")[0], "jax")  # JAX traces what it is told of.


def warn(text: str) -> None:
    """Warns at the innermost line that is neither of this package nor of JAX.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn("the data can't be resumed")
    >>> str(caught[0].message)
    "the data can't be resumed"
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
