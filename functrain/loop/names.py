"""What nested numbers are called."""

from collections.abc import Iterator, Mapping
from typing import Any


def named_values(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is in dicts in dicts, by "a/b".

    >>> list(named_values({"loss": 1.0, "parts": {"head": {"norm": 2.0}}}))
    [('loss', 1.0), ('parts/head/norm', 2.0)]
    """
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from named_values(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
