"""What the attacks are made with."""

import pytest
from faults import compiled


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library that strikes, one for all processes, so that they have one parent."""
    return compiled(tmp_path_factory.mktemp("shim"))
