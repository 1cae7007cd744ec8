"""What differs between two starts of a run, and what does not."""

import pytest

from functrain.loop.record.facts import changes


def test_what_differs_is_told_by_key_and_a_command_line_as_one():
    old = {"config": {"rates": {"body": 0.1}}, "command": ["train.py", "--out", "a b"], "versions": {"jax": "0.9.0"}}
    new = {"config": {"rates": {"body": 0.2}}, "command": ["train.py"], "versions": {"jax": "0.10.2"}}
    assert changes(old, new) == {
        "config/rates/body": [0.1, 0.2],
        "command": ["train.py --out 'a b'", "train.py"],
        "versions/jax": ["0.9.0", "0.10.2"],
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"versions": {"jax": "0.9.0", "grain": "0.2"}}, {"versions": {"jax": "0.9.0", "optax": "0.2"}}),
        ({"git": {"commit": "a", "dirty": False}}, {"git": {"commit": "a", "dirty": True}}),
        ({"model": {"optimizers": "a", "audit": None}}, {"model": {"optimizers": "b", "audit": "c"}}),
        (
            {"model": {"parts": {"body": {"hyperparameters": {"learning_rate": 0.1}}}}},
            {"model": {"parts": {"body": {"hyperparameters": {"learning_rate": 0.05}}}}},
        ),
        ({"source": {"file": "source.tar.gz", "digest": "a"}}, {"source": {"file": "source-2.tar.gz", "digest": "a"}}),
        ({"sections": []}, {"sections": [{}]}),
    ],
)
def test_what_is_imported_later_or_was_trained_since_or_is_told_elsewhere_is_no_change(old, new):
    assert changes(old, new) == {}
