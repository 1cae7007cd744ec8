"""What `fit` is given in the place of what it takes is said before anything runs."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from runs import Recorder, X, Y, compilations, counted, data_of, scripted, start, update_of

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
            {"loggers": ["x.jsonl"]},
            "loggers=: 'x.jsonl' is no logger, as it has no 'log', 'resume', 'close': write ft.JsonLines('x.jsonl')",
        ),
        (
            {"loggers": [Mine()]},
            "loggers=: Mine() is no logger, as it has no 'log', 'resume', 'close': write"
            " ft.JsonLines(path), or an object that has them",
        ),
        (
            {"evaluation": batches},
            "evaluation= takes Evaluation, not batches (function): write ft.Evaluation(eval_step, data)",
        ),
        ({"evaluation": [Mine()]}, "evaluation= takes Evaluation, not Mine() (Mine)"),
        ({"stop": 3}, "stop= takes EarlyStopping, not 3 (int): write ft.EarlyStopping('valid/loss', patience=3)"),
        ({"update": Mine()}, "update takes Update, not Mine() (Mine): write ft.make_update(loss_fn, optim)"),
        ({"state": {"w": 1}}, "state takes TrainState, not {'w': 1} (dict): write update.init(params)"),
        ({"state": {"w": jnp.ones(2)}}, "state takes TrainState, not dict: write update.init(params)"),
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


@pytest.mark.parametrize(
    ("eval_step", "data", "told"),
    [
        (
            lambda params, batch, key: {"loss": batch["x"]},
            [],
            "eval_step declares 'key', which an evaluation does not give: write eval_step(params, batch), or"
            " eval_step(params, batch, model_state); draw with a key that is made in it, jax.random.key(0)",
        ),
        (lambda params, batch, rate, *rest, at=1: 0, [], "eval_step declares 'rate', which an evaluation does not"),
        ([1], lambda params, batch: 0, "eval_step=[1] (list) is no function, which comes first: write ft.Evaluation("),
        (batches, 3, "data=3 is no iterable of batches: write ft.Evaluation(eval_step, data)"),
    ],
)
def test_an_evaluation_of_another_kind_is_told_where_it_is_made(eval_step, data, told):
    with pytest.raises(ft.EvaluationError, match=re.escape(told)):
        ft.Evaluation(eval_step, data)


@pytest.mark.parametrize("given", ["5", 2.5, 0])
def test_what_is_counted_is_a_whole_number(given):
    told = f"EarlyStopping(patience={given!r}): give a whole number of at least 1, patience=3"
    with pytest.raises(ft.FitError, match=re.escape(told)):
        ft.EarlyStopping("valid/loss", patience=given)
    with pytest.raises(ft.EvaluationError, match=re.escape(f"TopK(k={given!r}): give a whole number of at least 1")):
        ft.TopK(given)
    told = f"batch_size={given!r} ({type(given).__name__}): write a whole number" if given else "batch_size=0 over"
    with pytest.raises(ft.DataError, match=re.escape(told)):
        data_of(batch_size=given)
    if given:
        with pytest.raises(ft.DataError, match=re.escape(f"seed={given!r} ({type(given).__name__}): write a whole")):
            data_of(seed=given)


def test_a_batch_larger_than_the_data_is_warned_of_once():
    told = "batch_size=100 of 18 examples: an epoch is one batch of 18; write batch_size=18, or less for more updates"
    with pytest.warns(UserWarning, match=told) as warned:
        data = data_of(batch_size=100).map_batches(dict)
    assert (len(warned), len(data)) == (1, 1)


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


def squared(params, batch):
    return {"loss": (batch["x"] @ params["body"]["w"])[:, 0] ** 2, "label": jnp.zeros(len(batch["x"]), jnp.int32)}


def events_until(error, told, **options):
    """The events of a run that ends with an error."""
    recorder = Recorder()
    with pytest.raises(error, match=re.escape(told)):
        ft.fit(*counted(update_of()), epochs=2, hooks=[recorder, *options.pop("hooks", ())], **options)
    return recorder.events


def test_a_state_that_was_consumed_is_told_before_anything_runs():
    update, state, data = counted(update_of())
    update(state, next(iter(data)))
    recorder = Recorder()
    with pytest.raises(ft.UpdateError, match="this state was consumed by an earlier call, and every shallow copy"):
        ft.fit(update, state, data, epochs=1, hooks=[recorder])
    assert not recorder.events


@pytest.mark.parametrize("place", ["stop", "hooks", "checkpoints"])
def test_the_name_of_a_result_that_no_evaluation_gives_is_told_before_anything_runs(tmp_path, place):
    stop = ft.EarlyStopping("valid/accuracy", patience=1, mode="max")
    best = ft.Checkpoints(tmp_path / "run", keep_best={"valid/accuracy": "max"})
    options = {"stop": stop, "hooks": [stop], "checkpoints": best}[place]
    what = "keep_best='valid/accuracy'" if place == "checkpoints" else "EarlyStopping('valid/accuracy')"
    told = f"{what}: the results are ['valid/loss']; name one of them"
    assert not events_until(ft.FitError, told, evaluation=scripted(1, 2), **{place: options})
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_to_stop_by_a_result_needs_an_evaluation():
    told = (
        "EarlyStopping('valid/loss'): no evaluation gives a result: fit(..., evaluation=ft.Evaluation(eval_step, data))"
    )
    assert not events_until(ft.FitError, told, stop=ft.EarlyStopping("valid/loss", patience=1))


@pytest.mark.parametrize(
    ("eval_step", "options", "told"),
    [
        (lambda params, batch: batch["x"], {}, ": return a dict by name, or a Loss"),
        (lambda params, batch: {"x": batch["x"]}, {}, "eval_step returned 'x' of shape (4, 3): return a scalar or one"),
        (lambda params, batch: {"x": params["heda"]}, {}, "'heda'"),
        (
            lambda params, batch: {"label": jnp.zeros(4, jnp.int32), "scores": batch["x"]},
            {"metrics": {"top": ft.TopK(5)}},
            "TopK(5): the scores 'scores' are of shape (4, 3); give (batch, classes) with at least 5 classes, or"
            " TopK(3) at most",
        ),
        (
            lambda params, batch: {"label": jnp.zeros(4, jnp.int32), "scores": batch["y"]},
            {"metrics": {"top": ft.TopK(1)}},
            "TopK(1): the scores 'scores' are of shape (4,); give (batch, classes) with at least 1 classes",
        ),
        (squared, {"metrics": {"top": ft.TopK(2)}}, "metrics= takes 'scores', but eval_step returned"),
        (squared, {"metrics": {"loss": ft.OnHost(np.sum, "label")}}, "eval_step and metrics= both give 'loss': rename"),
        (squared, {"metrics": {"counts": ft.ConfusionMatrix(2, "loss", "label")}}, "integer"),
    ],
)
def test_an_evaluation_that_can_not_be_computed_is_told_before_anything_runs(eval_step, options, told):
    with compilations() as names:
        assert not events_until(Exception, told, evaluation=ft.Evaluation(eval_step, data_of(), **options))
    assert not [name for name in names if "functrain" in name]


def test_evaluation_data_without_a_batch_is_told_before_anything_runs():
    told = "the evaluation data has no batch: give data that can be read more than once"
    assert not events_until(ft.EvaluationError, told, evaluation=ft.Evaluation(squared, []))


def test_evaluation_data_that_is_read_only_once_is_left_to_the_evaluation():
    read = []

    def once():
        for i in (0, 4):
            read.append(i)
            yield {"x": X[i : i + 4]}

    recorder = Recorder(of=lambda run: [*read])
    evaluation = ft.Evaluation(squared, once())
    stop = ft.EarlyStopping("valid/loss", patience=1)
    result = ft.fit(*counted(update_of()), epochs=1, evaluation=evaluation, stop=stop, hooks=[recorder])
    assert recorder.at("run_started") == [[]]
    assert (
        result.results["valid/loss"]
        == ft.Evaluation(squared, [{"x": X[:4]}, {"x": X[4:8]}])(result.state.params)["loss"]
    )
    bad = ft.EarlyStopping("valid/los", patience=1, mode="min")
    with pytest.raises(
        ft.FitError, match=re.escape("EarlyStopping('valid/los'): the results are ['valid/label', 'val")
    ):
        ft.fit(*counted(update_of()), epochs=1, evaluation=ft.Evaluation(squared, once()), stop=bad)


def test_numbers_that_a_metric_computes_by_name_are_results(tmp_path):
    metrics = {"of": ft.OnHost(lambda label: {"mean": label.mean()}, "label")}
    evaluation = ft.Evaluation(squared, data_of(), metrics=metrics)
    best = ft.Checkpoints(tmp_path, keep_best={"valid/of/mean": "max"})
    assert (
        ft.fit(*counted(update_of()), epochs=1, evaluation=evaluation, checkpoints=best).results["valid/of/mean"] == 0
    )


def test_to_look_at_an_evaluation_traces_its_step_no_more_often_than_to_compute_it():
    traced = []

    def eval_step(params, batch, model_state):
        traced.append(batch["x"].shape)
        return {"loss": batch["x"][:, 0] * model_state}

    update, _, data = counted(update_of())
    state = update.init(start(), model_state=jnp.ones(()))
    ft.fit(update, state, data, epochs=2, evaluation=ft.Evaluation(eval_step, data))
    assert traced == [(2, 3)]
