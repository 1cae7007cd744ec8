"""What `fit` is given in the place of what it takes is said before anything runs."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from runs import X, Y, counted, data_of, update_of

import functrain as ft


class Mine:
    def __repr__(self):
        return "Mine()"


def batches():
    yield {"x": X[:2], "y": Y[:2]}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"log": 10}, "log= takes Every, not 10 (int): write ft.Every(updates=10)"),
        ({"checkpoints": "runs"}, "checkpoints= takes Checkpoints, not 'runs' (str): write ft.Checkpoints('runs')"),
        ({"hooks": Mine()}, "hooks=Mine(): give a list, hooks=[hook]"),
        ({"hooks": [Mine()]}, "hooks= takes Hook, not Mine() (Mine): write a class with the base ft.Hook"),
        ({"loggers": Mine()}, "loggers=Mine(): give a list, loggers=[ft.JsonLines(path)]"),
        (
            {"evaluation": batches},
            "evaluation= takes Evaluation, not batches (function): write ft.Evaluation(eval_step, data)",
        ),
        ({"evaluation": [Mine()]}, "evaluation= takes Evaluation, not Mine() (Mine)"),
        ({"stop": 3}, "stop= takes EarlyStopping, not 3 (int): write ft.EarlyStopping('valid/loss', patience=3)"),
        ({"update": Mine()}, "update takes Update, not Mine() (Mine): write ft.make_update(loss_fn, optim)"),
        ({"state": {"w": 1}}, "state takes TrainState, not {'w': 1} (dict): write update.init(params)"),
        (
            {"data": batches},
            "the data is the function 'batches': give what it returns, or an object whose epoch(number)",
        ),
        ({"data": {"x": X, "y": Y}}, "the data is one dict: give batches, ft.from_arrays(data, batch_size=32)"),
        ({"data": X}, "the data is one ndarray: give batches"),
        ({"data": jnp.ones(3)}, "give batches, ft.from_arrays(data, batch_size=32)"),
        ({"data": []}, "the data is an empty list: give at least one batch"),
        ({"rates": "mine"}, "rates='mine': write rates='program' or rates='checkpoint'"),
        ({"data": 3}, "the data is 3: give an iterable of batches"),
    ],
)
def test_what_is_of_another_kind(tmp_path, options, told):
    update, state, data = counted(update_of())
    given = {"update": update, "state": state, "data": data, "epochs": 1} | options
    with pytest.raises(ft.FitError, match=re.escape(told)):
        ft.fit(**given)


def test_how_often_is_said_with_every(tmp_path):
    with pytest.raises(ft.CheckpointError, match=re.escape("every=7: give an Every, ft.Every(updates=7)")):
        ft.Checkpoints(tmp_path, every=7)
    with pytest.raises(ft.EvaluationError, match=re.escape("every=7: give an Every, ft.Every(updates=7)")):
        ft.Evaluation(lambda params, batch: {"loss": jnp.ones(2)}, data_of(), every=7)


def test_what_can_be_read_is_read():
    update, _, _ = counted(update_of())

    class Epochs:
        def epoch(self, number):
            return batches()

    def start():
        return counted(update_of())[1]

    for data in (batches(), Epochs(), [{"x": X[:2], "y": Y[:2]}], ({"x": X[:2], "y": Y[:2]},), map(dict, batches())):
        assert int(ft.fit(update, start(), data, epochs=1).state.step) == 1
    assert np.isfinite(ft.fit(update, start(), [{"x": X, "y": Y}] * 2, epochs=1).history[-1]["train/loss"])
