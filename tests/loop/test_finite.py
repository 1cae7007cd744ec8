"""What is not finite ends a run, or is told."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import X, Y, counted, loss_fn, scripted, start, update_of

import functrain as ft
from functrain.errors import NonFiniteError

BATCHES = 6
NEVER = ft.Every(updates=1000)


def data(bad):
    """Six batches of two, of which one is bad."""
    return [{"x": X[i : i + 2], "y": Y[i : i + 2], "bad": np.array(i // 2 == bad)} for i in range(0, 2 * BATCHES, 2)]


def nan_loss(params, batch):
    """NaN, and so its gradients, for the bad batch."""
    loss = loss_fn(params, batch)
    return ft.Loss(jnp.where(batch["bad"], jnp.nan, 1.0) * loss.value, weight=loss.weight)


def averaging(params, batch, model_state):
    """Statistics that a bad batch makes infinite, in a loss and gradients that are sound."""
    mean = 0.9 * model_state["norm"]["mean"] + jnp.where(batch["bad"], jnp.inf, 0.1)
    least = jnp.minimum(model_state["least"], jnp.where(batch["bad"], jnp.nan, jnp.inf))
    state = {"norm": {"mean": mean}, "least": least, "mask": model_state["mask"], "count": model_state["count"] + 1}
    return ft.Loss(loss_fn(params, batch).value, weight=2, model_state=state)


def begun(update):
    """A state whose mask, and least value so far, are infinite from the beginning."""
    model_state = {"norm": {"mean": jnp.zeros(2)}, "least": jnp.full((), jnp.inf),
                   "mask": jnp.array([0.0, -jnp.inf]), "count": 0}  # fmt: skip
    return update.init(start(), model_state=model_state)


@pytest.mark.parametrize("bad", [0, 3, BATCHES - 1])
def test_training_that_became_nan_does_not_return(bad):
    """Without a checkpoint and without a log."""
    update = update_of(nan_loss)
    problem = (
        "step 6: the parameters of part 'body', 'head' are not finite; the last sound checkpoint is none; restore it"
        ' and lower the rate, or leave such updates out: make_update(..., nonfinite="skip")'
    )
    with pytest.raises(NonFiniteError, match=f"^{re.escape(problem)}$"):
        ft.fit(update, update.init(start()), data(bad), epochs=1, log=NEVER)


def test_a_window_that_is_left_pending_and_is_nan_does_not_return():
    update = update_of(nan_loss, accumulate=4, remainder="carry")
    with pytest.raises(NonFiniteError, match="step 1: the pending gradients of part 'body', 'head' are not finite; "):
        ft.fit(update, update.init(start()), data(BATCHES - 1), epochs=1, log=NEVER)


def test_an_evaluation_is_not_begun_with_parameters_that_are_nan():
    update, evaluation = update_of(nan_loss), scripted(1, 2, 3, every=ft.Every(updates=2))
    with pytest.raises(NonFiniteError, match=r"step 4: the parameters of part 'body', 'head' are not finite"):
        ft.fit(update, update.init(start()), data(3), epochs=1, log=NEVER, evaluation=evaluation)
    assert evaluation.data.left == [2, 3]


def test_updates_that_are_left_out_return():
    update = update_of(nan_loss, nonfinite="skip")
    result = ft.fit(update, update.init(start()), data(3), epochs=1, log=NEVER)
    assert int(result.state.step) == 6


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("nonfinite", ["ignore", "skip"])
def test_model_state_that_is_not_finite_is_neither_saved_nor_returned(tmp_path, saves, nonfinite):
    """Gradients are sound, so that nothing is left out; what was infinite from the beginning is the user's."""
    update = update_of(averaging, nonfinite=nonfinite)
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=2)) if saves else None
    way = "leave such updates out" if nonfinite == "ignore" else "keep it finite where it is made"
    problem = (
        f"step {4 if saves else 6}: the leaves of the model state 'norm/mean' are not finite; the last sound"
        f" checkpoint is {tmp_path / '2' if saves else 'none'}; restore it and lower the rate, or {way}"
    )
    with pytest.raises(NonFiniteError, match=re.escape(problem)):
        ft.fit(update, begun(update), data(2), epochs=1, log=NEVER, checkpoints=checkpoints)
    if checkpoints is not None:
        assert [path.name for path in checkpoints.steps()] == ["2"]


def test_model_state_that_is_as_it_should_be_is_saved(tmp_path):
    update = update_of(averaging)
    for epochs in (1, 2):
        checkpoints = ft.Checkpoints(tmp_path)
        result = ft.fit(update, begun(update), data(None), epochs=epochs, log=NEVER, checkpoints=checkpoints)
    assert result.state.model_state["mask"].tolist() == [0.0, -np.inf]
    assert [path.name for path in checkpoints.steps()] == ["6", "12"]


def test_a_state_that_an_earlier_run_consumed_may_be_what_a_run_goes_on_like(tmp_path):
    update = update_of(averaging, head=optax.sgd(0.1))
    state = begun(update)
    for epochs in (1, 2):
        result = ft.fit(update, state, data(None), epochs=epochs, checkpoints=ft.Checkpoints(tmp_path))
    assert int(result.state.step) == 12


def test_a_result_that_is_not_finite_is_told_once_of_each_name():
    evaluation = [
        scripted(1, np.nan, np.nan, 2, every=ft.Every(updates=2)),
        scripted(1, 2, 3, np.inf, every=ft.Every(updates=2), name="test"),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ft.fit(*counted(update_of()), steps=8, evaluation=evaluation)
    assert [str(each.message).partition(": it is never best")[0] for each in caught] == [
        "step 4: the result 'valid/loss' of an evaluation is nan",
        "step 8: the result 'test/loss' of an evaluation is inf",
    ]
    assert all(each.filename == __file__ for each in caught)
    assert "see which examples give it" in str(caught[0].message)
    assert int(result.state.step) == 8
