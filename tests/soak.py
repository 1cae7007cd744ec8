"""How much of what could go on for ever a session does: 1 in `make test`, more in `make soak`."""

import os

import pytest

SOAK = int(os.environ.get("SOAK", "1"))


def some(cases, each):
    """Each second, third, ... of some cases, from the first one on; in `make soak` all."""
    return [*cases][:: each if SOAK == 1 else 1]


in_soak = pytest.mark.skipif(SOAK == 1, reason="`make soak` runs it")
