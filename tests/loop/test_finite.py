"""What is not finite ends a run, or is told."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import Scripted, X, Y, counted, loss_fn, scripted, start, update_of

import functrain as ft
from functrain.errors import NonFiniteError

BATCHES = 6
ADVICE = "give checkpoints=ft.Checkpoints(...), and the error says which batch and which operation it was;"
NEVER = ft.Every(updates=1000)


def data(bad):
    """Six batches of two, of which one is bad."""
    return [{"x": X[i : i + 2], "y": Y[i : i + 2], "bad": np.array(i // 2 == bad)} for i in range(0, 2 * BATCHES, 2)]


class Later:
    """Other batches in each epoch, the last ones for ever."""

    def __init__(self, epochs):
        self.epochs = epochs

    def epoch(self, number):
        return iter(self.epochs[min(number, len(self.epochs) - 1)])


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
        "step 6: 'train/loss' is not finite, nor are the parameters of part 'body', 'head'; give"
        " checkpoints=ft.Checkpoints(...), and the error says which batch and which operation it was; lower the rate,"
        ' or leave such updates out: make_update(..., nonfinite="skip")'
    )
    with pytest.raises(NonFiniteError, match=f"^{re.escape(problem)}$"):
        ft.fit(update, update.init(start()), data(bad), epochs=1, log=NEVER)


def test_a_window_that_is_left_pending_and_is_nan_does_not_return():
    update = update_of(nan_loss, accumulate=4, remainder="carry")
    with pytest.raises(NonFiniteError, match="step 1: 'train/loss' is not finite, nor are the pending gradients of"):
        ft.fit(update, update.init(start()), data(BATCHES - 1), epochs=1, log=NEVER)


def test_an_evaluation_is_not_begun_with_parameters_that_are_nan():
    update, evaluation = update_of(nan_loss), scripted(1, 2, 3, every=ft.Every(updates=2))
    with pytest.raises(NonFiniteError, match=r"step 4: .* all was finite at step 2, the last that was"):
        ft.fit(update, update.init(start()), data(3), epochs=1, log=NEVER, evaluation=evaluation)
    assert evaluation.data.left == [2, 3]


def test_updates_that_are_left_out_return():
    update = update_of(nan_loss, nonfinite="skip")
    result = ft.fit(update, update.init(start()), data(3), epochs=1, log=NEVER)
    assert int(result.state.step) == 6


def infinite_loss(params, batch):
    """Infinite for the bad batch, with gradients that are sound."""
    loss = loss_fn(params, batch)
    return ft.Loss(loss.value + jnp.where(batch["bad"], jnp.inf, 0.0), weight=loss.weight)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 6),  # At the end of an epoch,
        ({"steps": 6}, 6),  # of the run,
        ({"unroll": 3}, 6),  # of several updates in one,
        ({"evaluation": "valid"}, 6),  # before an evaluation,
        ({"checkpoints": True}, 6),  # or a save.
    ],
)
def test_a_loss_that_is_not_finite_is_found_without_a_log_of_it(options, step, tmp_path):
    """Parameters stay finite, so that nothing else tells."""
    sixth = ft.Every(updates=6)
    if "evaluation" in options:
        options = {"evaluation": scripted(1, every=sixth)}
    if "checkpoints" in options:
        options = {"checkpoints": ft.Checkpoints(tmp_path, every=sixth), "autopsy": False}
    update = update_of(infinite_loss)
    with pytest.raises(NonFiniteError, match=f"step {step}: 'train/loss' is not finite; "):
        ft.fit(update, update.init(start()), data(BATCHES - 1), epochs=2, log=NEVER, **options)


def test_a_loss_of_a_phase_before_the_last_one_is_found(tmp_path):
    phases = ft.alternate(ft.Phase("one", infinite_loss, "body"), ft.Phase("other", loss_fn, "head"))
    update, checkpoints = update_of(phases), ft.Checkpoints(tmp_path, every=ft.Every(updates=4))
    with pytest.raises(NonFiniteError, match="step 4: 'train/one/loss' is not finite; "):
        ft.fit(update, update.init(start()), data(2), epochs=1, log=NEVER, checkpoints=checkpoints, autopsy=False)


def test_nan_is_found_at_the_end_of_its_epoch():
    update = update_of(nan_loss)
    with pytest.raises(
        NonFiniteError, match=r"step 12: .* all was finite at step 6, the last that was looked at; give"
    ):
        ft.fit(update, update.init(start()), Later([data(None), data(0)]), epochs=9, log=NEVER)


def test_parameters_are_looked_at_with_each_row_of_the_log():
    """An optimizer makes them NaN; no loss is computed of them before the log."""
    late = optax.GradientTransformation(lambda params: 0, lambda grads, step, params: (
        jax.tree.map(lambda grad: jnp.where(step == 3, jnp.nan, grad), grads), step + 1))  # fmt: skip
    update = update_of(body=late)
    with pytest.raises(NonFiniteError, match=r"^step 4: the parameters of part 'body' are not finite; all was finite"):
        ft.fit(update, update.init(start()), data(None), epochs=1, log=ft.Every(updates=2))


def test_a_run_that_stops_early_is_looked_at():
    update = update_of(nan_loss)
    evaluation = ft.Evaluation(
        lambda params, batch: {"loss": batch["x"]}, Scripted(1, 1, 1, 1), every=ft.Every(updates=1)
    )
    with pytest.raises(NonFiniteError, match=r"step 2: .* all was finite at step 1, "):
        ft.fit(update, update.init(start()), data(1), epochs=1, log=NEVER, evaluation=evaluation,
               stop=ft.EarlyStopping("valid/loss", patience=1))  # fmt: skip


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("nonfinite", ["ignore", "skip"])
def test_model_state_that_is_not_finite_is_neither_saved_nor_returned(tmp_path, saves, nonfinite):
    """Gradients are sound, so that nothing is left out; what was infinite from the beginning is the user's."""
    update = update_of(averaging, nonfinite=nonfinite)
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=2)) if saves else None
    way = "leave such updates out" if nonfinite == "ignore" else "keep it finite where it is made"
    before = f"the last sound checkpoint is {tmp_path / '2'}; restore it and" if saves else ADVICE
    problem = (
        f"step {4 if saves else 6}: the leaves of the model state 'norm/mean' are not finite; {before} lower the rate,"
        f" or {way}"
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


def test_a_state_that_was_consumed_with_a_rate_that_the_run_is_to_have_is_told(tmp_path):
    update = update_of(averaging)
    state = begun(update)
    update(state, next(iter(data(None))))
    with pytest.raises(ft.UpdateError, match="this state was consumed by an earlier call"):
        ft.fit(update, state, data(None), epochs=1, checkpoints=ft.Checkpoints(tmp_path))


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
