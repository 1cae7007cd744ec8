"""A run that goes on with other data, or another key, than it was saved with says so."""

import re
import warnings

import jax
import pytest
from runs import X, Y, noisy_loss, start, update_of

import functrain as ft


def fitted(directory, key=0, steps=None, epochs=None, examples=16, loss=None, **data):
    """The result of a run, and what was warned of."""
    update = update_of(loss) if loss else update_of()
    batches = ft.from_arrays({"x": X[:examples], "y": Y[:examples]}, **{"batch_size": 4} | data)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = ft.fit(
            update, update.init(start(), key=jax.random.key(key)), batches, steps=steps, epochs=epochs,
            checkpoints=ft.Checkpoints(directory), progress=False,
        )  # fmt: skip
    return result, [str(each.message) for each in warned]


OTHERS = [
    ({"batch_size": 2}, "batch_size=4", "batch_size=2"),
    ({"seed": 3}, "seed=0", "seed=3"),
    ({"shuffle": False}, "shuffle=True", "shuffle=False"),
    ({"examples": 12, "batch_size": 2}, "batch_size=4, examples=16", "batch_size=2, examples=12"),
]


@pytest.mark.parametrize(("other", "was", "now"), OTHERS)
def test_other_data_within_an_epoch_is_an_error(tmp_path, other, was, now):
    fitted(tmp_path, steps=2)
    told = (
        f"{tmp_path / '2'} was saved after 2 batches of epoch 0, of data with {was}, and the data given has {now}: some"
        f" of its examples would be trained on twice in this epoch, or not at all; go on with {was} to the end of the"
        " epoch and change it there, or begin anew, fit(..., fresh=True)"
    )
    with pytest.raises(ft.FitError, match=re.escape(told)):
        fitted(tmp_path, epochs=1, **other)
    result, warned = fitted(tmp_path, epochs=1)  # What it says to do works.
    assert (int(result.state.step), warned) == (4, [])


@pytest.mark.parametrize(("other", "was", "now"), OTHERS)
def test_other_data_from_an_epoch_on_is_warned_of(tmp_path, other, was, now):
    fitted(tmp_path, epochs=1)
    result, warned = fitted(tmp_path, epochs=2, **other)
    assert f"{tmp_path / '4'} was saved with data of {was}: the run goes on with {now}" in warned
    assert result.epochs == 2


def test_what_becomes_of_a_short_batch_may_change_within_an_epoch(tmp_path):
    fitted(tmp_path, steps=2)
    result, (warned,) = fitted(tmp_path, epochs=1, last="drop")
    assert warned.endswith("was saved with data of last='keep': the run goes on with last='drop'")
    assert int(result.state.step) == 4


def test_a_checkpoint_that_does_not_say_what_data_it_is_of_is_taken(tmp_path):
    update = update_of()
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(update.init(start(), key=jax.random.key(0)))
    result, warned = fitted(tmp_path, epochs=1, batch_size=2)
    assert (int(result.state.step), warned) == (8, [])


def test_another_key_is_warned_of_and_the_one_of_the_checkpoint_goes_on(tmp_path):
    fitted(tmp_path, steps=2, loss=noisy_loss)
    result, warned = fitted(tmp_path, key=5, epochs=1, loss=noisy_loss)
    assert warned == [
        "the run goes on with the random key of the checkpoint, [0, 0], and not with the one of update.init, [0, 5];"
        " for a run with that, give another folder, or fit(..., fresh=True)"
    ]
    assert jax.random.key_data(result.state.key).tolist() == [0, 0]
