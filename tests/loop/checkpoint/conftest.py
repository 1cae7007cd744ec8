"""What the tests of checkpoints share."""

import pytest
from states import batch_of, simple

import functrain as ft


@pytest.fixture(autouse=True)
def of_every_test(no_donation_is_lost):
    """Saving and restoring never costs a copy."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with the checkpoints 1 and 2, of which each has its own data."""
    update, _, state = simple()
    with ft.Checkpoints(tmp_path_factory.mktemp("sound")) as checkpoints:
        for number in range(2):
            state, _ = update(state, batch_of(number))
            checkpoints.save(state, data={"position": number + 1})
    return checkpoints.directory
