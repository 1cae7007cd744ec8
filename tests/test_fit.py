"""What `fit` does between two updates, and that it changes nothing in them."""

import copy
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_evaluation import compilations

import functrain as ft
from functrain.errors import CadenceError, CheckpointError, FitError, NonFiniteError
from functrain.loop.logs import read_json_lines

RNG = np.random.default_rng(0)
X = RNG.normal(size=(18, 3)).astype(np.float32)  # In batches of 4 the last one of the five is short.
Y = X @ np.float32([1, -2, 3])


def start():
    return {"body": {"w": jnp.full((3, 4), 0.5)}, "head": {"w": jnp.full(4, 0.1), "b": jnp.zeros(())}}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"]["w"])
    error = hidden @ params["head"]["w"] + params["head"]["b"] - batch["y"]
    return ft.Loss(jnp.mean(error**2), weight=len(batch["y"]))


def noisy_loss(params, batch, key):
    return loss_fn(params, {**batch, "x": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)})


def optim_of(body=None, head=None):
    body = body or ft.with_lr(optax.adamw, optax.cosine_decay_schedule(0.1, 40))
    transforms = {"body": body, "head": head or ft.with_lr(optax.sgd, 0.1)}
    return ft.Optimizer(ft.partition(start(), {"body": "body", "head": "head"}), transforms)


@functools.cache  # An update has programs and nothing of a run: tests may share it.
def update_of(loss=loss_fn, body=None, head=None, **options):
    return ft.make_update(loss, optim_of(body, head), **options)


def data_of(batch_size=4, **options):
    return ft.from_arrays({"x": X, "y": Y}, batch_size=batch_size, **options)


def counted(update, batches_an_epoch=4):
    """An update, a new state of it, and data of as many batches an epoch."""
    data = ft.from_arrays({"x": X[: 2 * batches_an_epoch], "y": Y[: 2 * batches_an_epoch]}, batch_size=2)
    return update, update.init(start()), data


def bits(tree):
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def bits_of(state):
    """All of a state but its key, which never changes."""
    names = ("params", "opt_state", "model_state", "step", "batches", "pending", "window")
    return {name: bits(getattr(state, name)) for name in names}


class Scripted:
    """Evaluation data of one number, another one each time that it is read."""

    def __init__(self, *values):
        self.left = list(values)

    def __iter__(self):
        yield {"x": np.float32([self.left.pop(0)])}


def scripted(*values, **options):
    return ft.Evaluation(lambda params, batch: {"loss": batch["x"]}, Scripted(*values), **options)


class Recorder(ft.Hook):
    """The events of a run in their order, and what `of` takes from it at each."""

    def __init__(self, of=lambda run: (run.step, run.epoch)):
        self.events, self.of = [], of

    def run_started(self, run):
        self.events.append(("run_started", self.of(run)))

    def update_ended(self, run):
        self.events.append(("update_ended", self.of(run)))

    def evaluation_ended(self, run):
        self.events.append(("evaluation_ended", self.of(run)))

    def checkpoint_saved(self, run):
        self.events.append(("checkpoint_saved", self.of(run)))

    def run_ended(self, run, error):
        self.events.append(("run_ended", self.of(run)))
        self.error = error

    def at(self, event):
        return [what for name, what in self.events if name == event]


# The same bits as a loop of one's own


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_leaves_the_bits_of_a_loop_of_ones_own(accumulate):
    """It logs, which is a program of its own, and evaluates; and nothing of the state shows it."""
    update, data = update_of(noisy_loss, accumulate=accumulate), data_of()
    evaluation = ft.Evaluation(loss_fn, data)
    result = ft.fit(
        update, update.init(start(), key=jax.random.key(1)), data, epochs=3, evaluation=evaluation,
        log=ft.Every(updates=2),
    )  # fmt: skip
    state = update.init(start(), key=jax.random.key(1))
    for epoch in range(3):
        for batch in data.epoch(epoch):
            state, _ = update(state, batch)
        state, _ = update.flush(state)
    assert bits_of(result.state) == bits_of(state)
    assert (int(state.step), result.epochs, result.stopped) == (15 if accumulate == 1 else 9, 3, None)


@pytest.mark.parametrize(
    ("end", "step", "epochs"),
    [
        ({"epochs": 2}, 8, 2),
        ({"steps": 6}, 6, 1),
        ({"epochs": 2, "steps": 6}, 6, 1),
        ({"epochs": 2, "steps": 100}, 8, 2),
        ({"epochs": 0}, 0, 0),
        ({"steps": 0}, 0, 0),
    ],
)
def test_a_run_ends_after_its_epochs_or_its_steps_whichever_come_first(end, step, epochs):
    result = ft.fit(*counted(update_of()), **end)
    assert (int(result.state.step), result.epochs, result.stopped) == (step, epochs, None)


def test_steps_are_optimizer_steps_and_not_batches():
    result = ft.fit(*counted(update_of(accumulate=2)), steps=5)
    assert (int(result.state.step), int(result.state.batches)) == (5, 10)


@pytest.mark.parametrize(("remainder", "w"), [("flush", -6), ("drop", -4), ("carry", -5)])
def test_what_an_epoch_leaves_of_a_window_is_flushed_dropped_or_carried(remainder, w):
    """AIToolbox: the gradient 1, SGD of rate 1, windows of 2 over 5 batches, two epochs."""
    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(1.0)})
    update = ft.make_update(
        lambda params, batch: params["w"] * batch["x"].mean(), optim, accumulate=2, remainder=remainder
    )
    result = ft.fit(update, update.init(params), [{"x": np.ones(2, np.float32)}] * 5, epochs=2)
    assert float(result.state.params["w"]) == w
    assert (int(result.state.step), int(result.state.pending)) == (-w, 0)


@pytest.mark.parametrize(("accumulate", "remainder"), [(1, "flush"), (2, "flush"), (2, "drop"), (2, "carry")])
def test_unrolled_updates_leave_the_same_bits(accumulate, remainder):
    """Neither the short last batch nor an end within a scan shows; a scan takes 3 windows of 2, or 3 batches."""
    update, data = update_of(noisy_loss, accumulate=accumulate, remainder=remainder), data_of()
    for end in ({"epochs": 3}, {"steps": 7}, {"steps": 11}):
        one, many = [
            ft.fit(update, update.init(start(), key=jax.random.key(1)), data, unroll=unroll, **end) for unroll in (1, 3)
        ]
        assert bits_of(one.state) == bits_of(many.state)
        assert one.epochs == many.epochs


def test_unrolled_updates_are_dispatched_together():
    recorder = Recorder(of=lambda run: run.step)
    ft.fit(*counted(update_of(), batches_an_epoch=8), steps=7, unroll=3, hooks=[recorder])
    assert recorder.at("update_ended") == [3, 6, 7]


def test_batches_go_where_the_sharding_says_one_by_one_and_unrolled():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.device_put({"w": jnp.zeros(())}, jax.NamedSharding(mesh, jax.P()))
    seen = []

    def linear(params, batch):
        jax.debug.inspect_array_sharding(batch["x"], callback=seen.append)
        return params["w"] * batch["x"].sum()

    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(1.0)})
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    for unroll in (1, 2):
        update = ft.make_update(linear, optim)
        data = [{"x": np.arange(4, dtype=np.float32)}] * 4
        result = ft.fit(update, update.init(params), data, epochs=1, unroll=unroll, sharding=sharding)
        assert float(result.state.params["w"]) == -24
    assert seen
    assert all(each.is_equivalent_to(sharding, 1) for each in seen)


def test_a_part_with_the_rate_0_is_equal_to_the_bit_after_an_epoch_and_its_neighbour_is_not():
    """Burn's test of parameter groups."""
    update = update_of(body=ft.with_lr(optax.adam, 0.0))
    state = ft.fit(update, update.init(start()), data_of(), epochs=1).state
    assert bits(state.params["body"]) == bits(start()["body"])
    assert bits(state.params["head"]) != bits(start()["head"])


def test_alternating_phases_take_turns_across_epochs():
    gan = ft.alternate(
        ft.Phase("body", loss_fn, parts="body", repeat=3), ft.Phase("head", loss_fn, parts="head")
    )  # Five batches an epoch: the second one begins with the second turn of a cycle.
    update, data = update_of(gan), data_of()
    one, many = [ft.fit(update, update.init(start()), data, epochs=2, unroll=unroll) for unroll in (1, 2)]
    state = update.init(start())
    for epoch in range(2):
        for batch in data.epoch(epoch):
            state, _ = update(state, batch)
    assert bits_of(one.state) == bits_of(many.state) == bits_of(state)


# How often


def test_every_n_updates_is_after_each_nth_update():
    evaluation = scripted(*range(9), every=ft.Every(updates=3))
    recorder = Recorder(of=lambda run: run.step)
    result = ft.fit(*counted(update_of()), steps=10, evaluation=evaluation, log=ft.Every(updates=4), hooks=[recorder])
    assert recorder.at("evaluation_ended") == [3, 6, 9]
    assert [row["step"] for row in result.history if "train/loss" in row] == [4, 8]


def test_updates_are_counted_in_windows():
    evaluation = scripted(*range(9), every=ft.Every(updates=2))
    recorder = Recorder(of=lambda run: int(run.state.batches))
    ft.fit(*counted(update_of(accumulate=2)), epochs=3, evaluation=evaluation, hooks=[recorder])
    assert recorder.at("evaluation_ended") == [4, 8, 12]


def test_every_n_epochs_is_at_the_end_of_each_nth_epoch():
    each, second = scripted(*range(9)), scripted(*range(9), every=ft.Every(epochs=2), name="second")
    recorder = Recorder(of=lambda run: (run.step, run.epoch, sorted(run.evaluated)))
    ft.fit(*counted(update_of()), epochs=4, evaluation=[each, second], hooks=[recorder])
    assert recorder.at("evaluation_ended") == [
        (4, 1, ["valid/loss"]),
        (8, 2, ["second/loss", "valid/loss"]),
        (12, 3, ["valid/loss"]),
        (16, 4, ["second/loss", "valid/loss"]),
    ]


def test_every_n_minutes_is_after_the_update_under_way_then(monkeypatch):
    """Of a clock that goes on by 25 seconds at each update."""
    seconds = [0.0]
    monkeypatch.setattr("functrain.loop.run.time", types.SimpleNamespace(monotonic=lambda: seconds[0]))

    class Clock(Recorder):
        def update_ended(self, run):
            seconds[0] = 25.0 * run.step

    recorder = Clock(of=lambda run: run.step)
    evaluation = scripted(*range(9), every=ft.Every(minutes=1))
    result = ft.fit(*counted(update_of()), steps=10, evaluation=evaluation, log=ft.Every(minutes=1.5), hooks=[recorder])
    assert recorder.at("evaluation_ended") == [3, 5, 8, 10]
    assert [row["step"] for row in result.history if "train/loss" in row] == [4, 8]


def test_checkpoints_are_saved_as_often_as_they_say_and_at_the_end(tmp_path):
    recorder = Recorder(of=lambda run: run.step)
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=4), keep_last=9)
    ft.fit(*counted(update_of()), steps=10, checkpoints=checkpoints, hooks=[recorder])
    assert recorder.at("checkpoint_saved") == [4, 8, 10]
    assert [path.name for path in checkpoints.steps()] == ["4", "8", "10"]


def test_by_default_it_evaluates_and_saves_at_the_end_of_each_epoch(tmp_path):
    recorder = Recorder(of=lambda run: run.epoch)
    ft.fit(
        *counted(update_of()), epochs=3, evaluation=scripted(3, 2, 1), checkpoints=ft.Checkpoints(tmp_path),
        hooks=[recorder],
    )  # fmt: skip
    assert recorder.at("evaluation_ended") == recorder.at("checkpoint_saved") == [1, 2, 3]


def test_with_unroll_what_is_due_within_a_scan_is_done_after_it():
    evaluation = scripted(*range(9), every=ft.Every(updates=5))
    recorder = Recorder(of=lambda run: run.step)
    data = counted(update_of(), batches_an_epoch=9)
    ft.fit(*data, steps=18, unroll=3, evaluation=evaluation, hooks=[recorder])
    assert recorder.at("evaluation_ended") == [6, 12, 15]


def test_an_epoch_that_ends_with_the_last_of_the_steps_is_an_epoch():
    recorder = Recorder()
    result = ft.fit(*counted(update_of()), steps=8, evaluation=scripted(2, 1), hooks=[recorder])
    assert recorder.at("evaluation_ended") == [(4, 1), (8, 2)]
    assert result.epochs == 2


@pytest.mark.parametrize(
    "cadence",
    [
        {},
        {"updates": 0},
        {"updates": -1},
        {"minutes": 0.0},
        {"updates": 1, "epochs": 1},
        {"updates": 2.5},
        {"epochs": 0.5},
    ],
)
def test_a_cadence_is_one_number_above_0(cadence):
    problem = "give one of updates and epochs, whole numbers, and minutes, above 0, ft.Every(updates=100)"
    with pytest.raises(CadenceError, match=re.escape(problem)):
        ft.Every(**cadence)


# What is read from the device, and what is compiled


class WasReady(ft.Hook):
    """At each update, whether the device had finished the one before it."""

    def __init__(self):
        self.ready, self.before = [], None

    def update_ended(self, run):
        if self.before is not None:
            self.ready.append(self.before.is_ready())
        self.before = run.metrics["loss"]


@pytest.mark.parametrize("log_every", [1000, 1])
def test_the_loop_does_not_wait_for_the_device_except_to_log(log_every):
    """Each update takes the device far longer than the loop: one that read any result would find each one ready."""
    params = {"w": jnp.full((256, 256), 0.01)}

    def slow(params, batch):
        x = jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ jax.lax.stop_gradient(params["w"])), params["w"])
        return jnp.mean(x + params["w"]) * batch["x"].mean()

    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": ft.with_lr(optax.adam, 0.1)})
    update, watch = ft.make_update(slow, optim), WasReady()
    data = [{"x": np.ones(2, np.float32)}] * 12
    ft.fit(update, update.init(params), data, epochs=1, hooks=[watch], log=ft.Every(updates=log_every))
    assert all(watch.ready) if log_every == 1 else not all(watch.ready)


def test_nothing_is_compiled_after_the_first_epoch(tmp_path):
    """With short last batches, windows cut short, logs, evaluations and checkpoints."""
    update, data = ft.make_update(noisy_loss, optim_of(), accumulate=2), data_of()
    with compilations() as compiled:
        recorder = Recorder(of=lambda run: len(compiled))
        ft.fit(
            update, update.init(start(), key=jax.random.key(0)), data, epochs=4, log=ft.Every(updates=2),
            hooks=[recorder], evaluation=ft.Evaluation(loss_fn, data),
            checkpoints=ft.Checkpoints(tmp_path, keep_best="valid/loss"),
        )  # fmt: skip
    first, *others = recorder.at("checkpoint_saved")
    assert others == [others[0]] * 3
    # The second epoch, whose log falls on another batch of its window, may add the measured program, and no more.
    assert first > 0
    assert others[0] <= first + 1
    with compilations() as compiled:
        ft.fit(update, update.init(start(), key=jax.random.key(0)), data, epochs=2)
    assert compiled == []


# Logs


def test_a_row_names_the_loss_each_parts_telemetry_and_its_rate():
    result = ft.fit(*counted(update_of()), steps=4, log=ft.Every(updates=2), evaluation=scripted(7))
    of_part = ("grad_norm", "update_norm", "param_norm", "update_ratio", "learning_rate")
    for row in (row for row in result.history if "train/loss" in row):
        assert row.keys() == {
            "step", "epoch", "train/loss", "train/steps_per_second",
            "train/learning_rate/body", "train/learning_rate/head",
            *(f"train/parts/{part}/{name}" for part in ("body", "head") for name in of_part),
        }  # fmt: skip
        assert all(isinstance(value, int | float) for value in row.values())
    assert [row["step"] for row in result.history] == [2, 4, 4][: len(result.history)]


def test_what_is_logged_is_what_the_update_measured():
    update = update_of()
    logged = ft.fit(*counted(update), steps=3, log=ft.Every(updates=3)).history
    data, state = counted(update)[2], update.init(start())
    batches = list(data.epoch(0))
    for batch in batches[:2]:
        state, _ = update(state, batch)
    _, metrics = update.measured(state, batches[2])
    (row,) = logged
    assert row["train/loss"] == float(metrics["loss"])
    assert row["train/parts/head/grad_norm"] == float(metrics["parts"]["head"]["grad_norm"])
    rate = float(np.float32(optax.cosine_decay_schedule(0.1, 40)(2)))
    assert row["train/learning_rate/body"] == row["train/parts/body/learning_rate"] == rate


def test_losses_and_metrics_are_logged_under_their_own_names():
    """AIToolbox swapped them."""

    def named(params, batch):
        loss = loss_fn(params, batch).value
        return ft.Loss({"main": loss, "aux": 0 * loss + 3}, metrics={"of": {"batch": len(batch["y"])}})

    (row,) = ft.fit(*counted(update_of(named)), steps=1, log=ft.Every(updates=1)).history
    assert (row["train/aux"], row["train/of/batch"]) == (3.0, 2.0)
    assert row["train/loss"] == row["train/main"] + 3


def test_the_log_of_a_window_is_its_mean():
    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.0)})
    update = ft.make_update(lambda params, batch: params["w"] + batch["x"].mean(), optim, accumulate=2)
    data = [{"x": np.float32([each])} for each in (1, 3, 5)]
    result = ft.fit(update, update.init(params), data, epochs=1, log=ft.Every(updates=1))
    assert [row["train/loss"] for row in result.history] == [2.0, 5.0]


def test_the_phase_of_an_update_names_its_metrics():
    phases = ft.alternate(ft.Phase("a", loss_fn, parts="body"), ft.Phase("b", loss_fn, parts="head"))
    history = ft.fit(*counted(update_of(phases)), steps=2, log=ft.Every(updates=1)).history
    assert [{name for name in row if name.endswith("/loss")} for row in history] == [{"train/a/loss"}, {"train/b/loss"}]
    assert "train/a/parts/body/grad_norm" in history[0]


def test_with_unroll_the_log_has_the_last_update_of_the_scan():
    one, many = [
        ft.fit(*counted(update_of()), steps=4, log=ft.Every(updates=4), unroll=unroll).history for unroll in (1, 4)
    ]
    assert one[0]["train/loss"] == many[0]["train/loss"]
    assert many[0]["step"] == 4


def test_the_log_may_be_once_an_epoch():
    result = ft.fit(*counted(update_of()), epochs=2, log=ft.Every(epochs=1))
    assert [row["step"] for row in result.history] == [4, 8]
    assert all("train/loss" in row for row in result.history)


def test_every_logger_gets_every_row_and_the_checkpoints_folder_one_more(tmp_path):
    logger = ft.JsonLines(tmp_path / "mine.jsonl")
    result = ft.fit(
        *counted(update_of()), epochs=2, log=ft.Every(updates=3), evaluation=scripted(2, 1), loggers=[logger],
        checkpoints=ft.Checkpoints(tmp_path / "run"),
    )  # fmt: skip
    rows = [read_json_lines(path) for path in (tmp_path / "mine.jsonl", tmp_path / "run" / "log.jsonl")]
    for row in itertools.chain(*rows):
        assert row.pop("time") > 0
    assert rows[0] == rows[1] == result.history
    assert [(row["step"], row["epoch"], row.get("valid/loss")) for row in result.history] == [
        (3, 0, None), (4, 1, 2.0), (6, 1, None), (8, 2, 1.0),
    ]  # fmt: skip


def test_what_is_no_number_is_in_the_results_and_not_in_the_log(tmp_path):
    data = [{"x": np.array([0, 1, 1])}]
    evaluation = ft.Evaluation(
        lambda params, batch: {"label": batch["x"], "prediction": batch["x"], "loss": batch["x"]},
        data,
        metrics={"confusion": ft.ConfusionMatrix(2)},
    )
    for _ in ("trained", "ended before it was started"):
        result = ft.fit(*counted(update_of()), epochs=1, evaluation=evaluation, checkpoints=ft.Checkpoints(tmp_path))
        assert result.results["valid/confusion"].tolist() == [[1, 0], [0, 2]]
        (row,) = result.history
        assert row.keys() == {"step", "epoch", "valid/loss"}


def test_the_history_of_a_run_that_goes_on_is_that_of_one_that_was_never_stopped(tmp_path):
    def run(directory, *ends):
        for epochs in ends:
            result = ft.fit(
                *counted(update_of()), epochs=epochs, log=ft.Every(updates=3), checkpoints=ft.Checkpoints(directory),
                evaluation=ft.Evaluation(loss_fn, data_of()),
            )  # fmt: skip
        return [{**row, "train/steps_per_second": None} for row in result.history]

    assert run(tmp_path / "cut", 1, 3) == run(tmp_path / "whole", 3)


def test_a_constant_rate_that_is_another_in_the_checkpoint_is_warned_of(tmp_path):
    def run(rate, epochs, hooks=()):
        update = update_of(head=ft.with_lr(optax.sgd, rate))
        return ft.fit(*counted(update), epochs=epochs, checkpoints=ft.Checkpoints(tmp_path), hooks=hooks)

    class Set(ft.Hook):
        def run_started(self, run):
            rates = run.update.optim.with_learning_rates(run.state.opt_state, {"head": 0.05})
            run.state = dataclasses.replace(run.state, opt_state=rates)

    def rate_of(result):
        return float(result.state.opt_state["head"].setting)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rate_of(run(0.1, 1)) == rate_of(run(0.1, 2)) == np.float32(0.1)
    with pytest.warns(
        UserWarning, match=r"part 'head' goes on with the learning rate 0\.1 of .*not with the 0\.05 .*run_started"
    ):
        assert rate_of(run(0.05, 3)) == np.float32(0.1)
    with pytest.warns(UserWarning, match=r"'head': 0\.05"):
        assert rate_of(run(0.05, 4, [Set()])) == np.float32(0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rate_of(run(0.05, 5)) == np.float32(0.05)


# Early stopping, and what is best


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_run_stops_after_as_many_evaluations_without_an_improvement_as_it_has_patience(patience):
    """And not one later, as AIToolbox does."""
    evaluation = scripted(3, 2, 2, 2, 2, 2, 2)
    stop = ft.EarlyStopping("valid/loss", patience=patience)
    result = ft.fit(*counted(update_of()), epochs=100, evaluation=evaluation, stop=stop)
    assert result.epochs == 2 + patience
    assert result.stopped == f"valid/loss has not improved for {patience} evaluations"


def test_an_improvement_begins_the_count_anew_and_nan_is_none():
    values = (3, float("nan"), 2, 2, 1, float("nan"), float("nan"))
    stop = ft.EarlyStopping("valid/loss", patience=2)
    assert ft.fit(*counted(update_of()), epochs=100, evaluation=scripted(*values), stop=stop).epochs == 7


def test_larger_may_be_better_and_an_improvement_no_smaller_than_asked_for():
    stop = ft.EarlyStopping("valid/loss", patience=2, mode="max", least=0.5)
    result = ft.fit(*counted(update_of()), epochs=9, evaluation=scripted(1, 2, 2.25, 2.5, 2.75), stop=stop)
    assert result.epochs == 4  # A gain of 0.5 is not more than 0.5.


def test_a_run_stops_in_the_middle_of_an_epoch_where_it_is_evaluated_there():
    stop, evaluation = ft.EarlyStopping("valid/loss", patience=1), scripted(1, 2, every=ft.Every(updates=3))
    result = ft.fit(*counted(update_of()), epochs=9, evaluation=evaluation, stop=stop)
    assert (int(result.state.step), result.epochs) == (6, 1)


def test_patience_goes_on_where_the_run_goes_on(tmp_path):
    def run(epochs, *values):
        return ft.fit(
            *counted(update_of()), epochs=epochs, evaluation=scripted(*values),
            checkpoints=ft.Checkpoints(tmp_path), stop=ft.EarlyStopping("valid/loss", patience=3),
        )  # fmt: skip

    run(2, 1, 2)
    assert run(9, 2, 2).epochs == 4
    again = run(9)  # It is over: an evaluation would find no value.
    assert (again.epochs, again.stopped) == (4, "valid/loss has not improved for 3 evaluations")


def test_one_early_stopping_may_serve_two_runs():
    stop = ft.EarlyStopping("valid/loss", patience=2)
    for _ in range(2):
        assert ft.fit(*counted(update_of()), epochs=9, evaluation=scripted(1, 2, 2), stop=stop).epochs == 3


def test_a_result_that_there_is_not_is_told_by_the_first_evaluation():
    stop = ft.EarlyStopping("valid/accuracy", patience=1)
    problem = "EarlyStopping('valid/accuracy'): the results are ['valid/loss']; name one of them"
    with pytest.raises(ValueError, match=re.escape(problem)):
        ft.fit(*counted(update_of()), epochs=2, evaluation=scripted(1, 2), stop=stop)


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": 1, "mode": "least"}])
def test_early_stopping_needs_patience_and_a_direction(options):
    with pytest.raises(ValueError, match=r"EarlyStopping\(patience=.*give at least 1, and 'min' or 'max'"):
        ft.EarlyStopping("valid/loss", **options)


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 1)])
def test_the_best_state_comes_back_after_later_and_worse_ones(tmp_path, mode, best):
    """Catalyst's load_best_on_end."""
    recorder = Recorder(of=lambda run: bits(run.state.params))
    checkpoints = ft.Checkpoints(tmp_path, keep_last=1, keep_best="valid/loss", mode=mode)
    result = ft.fit(
        *counted(update_of()), epochs=5, evaluation=scripted(9, 1, 8, 7, 3), checkpoints=checkpoints,
        load_best_on_end=True, hooks=[recorder],
    )  # fmt: skip
    states = recorder.at("evaluation_ended")
    assert bits(result.state.params) == states[best - 1] != states[-1]
    assert int(result.state.step) == 4 * best
    assert {path.name for path in checkpoints.steps()} == {str(4 * best), "20"}
    assert result.results == {"valid/loss": 3.0}


def test_without_it_the_last_state_comes_back(tmp_path):
    checkpoints = ft.Checkpoints(tmp_path, keep_best="valid/loss")
    result = ft.fit(*counted(update_of()), epochs=3, evaluation=scripted(1, 2, 3), checkpoints=checkpoints)
    assert int(result.state.step) == 12


def test_what_is_best_is_saved_also_between_two_checkpoints(tmp_path):
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=100), keep_best="valid/loss", keep_last=1)
    evaluation = scripted(3, 1, 2, 2, every=ft.Every(updates=2))
    ft.fit(*counted(update_of()), epochs=2, evaluation=evaluation, checkpoints=checkpoints)
    assert [path.name for path in checkpoints.steps()] == ["4", "8"]
    assert checkpoints.best().name == "4"


def test_a_checkpoint_has_the_results_of_its_own_step_only(tmp_path):
    update, state, data = counted(update_of())
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=1), keep_last=9)
    ft.fit(update, state, data, steps=3, evaluation=scripted(5, every=ft.Every(updates=2)), checkpoints=checkpoints)
    like = update.abstract(start())
    assert [checkpoints.restore(like=like, step=step).metrics for step in (1, 2, 3)] == [{}, {"valid/loss": 5.0}, {}]


# Hooks


def test_hooks_are_told_each_event_once_and_in_order(tmp_path):
    """The state that a hook is given is that of the event; what is evaluated and saved follows the update."""
    recorder = Recorder()
    ft.fit(
        *counted(update_of(), batches_an_epoch=2), epochs=2, evaluation=scripted(1, 2), hooks=[recorder],
        checkpoints=ft.Checkpoints(tmp_path, keep_best="valid/loss"),
    )  # fmt: skip
    assert recorder.events == [
        ("run_started", (0, 0)),
        ("update_ended", (1, 0)),
        ("update_ended", (2, 0)),
        ("evaluation_ended", (2, 1)),
        ("checkpoint_saved", (2, 1)),
        ("update_ended", (3, 1)),
        ("update_ended", (4, 1)),
        ("evaluation_ended", (4, 2)),
        ("checkpoint_saved", (4, 2)),
        ("run_ended", (4, 2)),
    ]
    assert recorder.error is None


def test_a_step_that_ends_a_window_cut_short_is_told_once():
    recorder = Recorder(of=lambda run: run.step)
    ft.fit(*counted(update_of(accumulate=3)), epochs=2, hooks=[recorder])
    assert recorder.at("update_ended") == [1, 2, 3, 4]


class TroubleError(Exception):
    pass


@pytest.mark.parametrize("event", ["run_started", "update_ended", "evaluation_ended", "checkpoint_saved"])
def test_hooks_are_told_of_the_end_also_when_an_exception_is_it(event, tmp_path):
    class Failing(ft.Hook):
        pass

    def fail(self, run):
        raise TroubleError(event)

    setattr(Failing, event, fail)
    recorder = Recorder()
    with pytest.raises(TroubleError, match=event):
        ft.fit(
            *counted(update_of()), epochs=2, evaluation=scripted(1, 2), checkpoints=ft.Checkpoints(tmp_path),
            hooks=[recorder, Failing()],
        )  # fmt: skip
    assert recorder.events[-1][0] == "run_ended"
    assert isinstance(recorder.error, TroubleError)


def test_hooks_are_told_of_data_that_fails_and_of_an_interrupt():
    for error in (TroubleError(), KeyboardInterrupt()):

        def data(error=error):
            yield from data_of()
            raise error

        update, recorder = update_of(), Recorder()
        with pytest.raises(type(error)):
            ft.fit(update, update.init(start()), data(), epochs=2, hooks=[recorder])
        assert recorder.error is error


class Averaging(ft.Hook):
    """Counts updates, and stops a run."""

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def update_ended(self, run):
        self.count += 1
        if run.step == self.stop_at:
            run.stop("enough")

    def state(self):
        return {"count": self.count}

    def load(self, state):
        self.count = state["count"]


def test_what_a_hook_keeps_is_saved_and_loaded_with_the_checkpoints(tmp_path):
    for epochs in (1, 3):
        hook = Averaging()
        recorder = Recorder(of=lambda run, hook=hook: hook.count)
        ft.fit(
            *counted(update_of()), steps=4 * epochs - 1, checkpoints=ft.Checkpoints(tmp_path), hooks=[hook, recorder]
        )
    assert recorder.at("run_started") == [3]  # Loaded before the run is told to start.


def test_a_hook_that_is_added_leaves_the_others_what_they_saved(tmp_path):
    ft.fit(*counted(update_of()), steps=3, checkpoints=ft.Checkpoints(tmp_path), hooks=[Averaging()])
    hook = Averaging()
    stop = ft.EarlyStopping("valid/loss", patience=2)
    ft.fit(*counted(update_of()), steps=3, checkpoints=ft.Checkpoints(tmp_path), hooks=[hook], stop=stop)
    assert hook.count == 3
    assert np.isnan(stop.best)


def test_a_hook_ends_a_run_after_the_update_under_way():
    result = ft.fit(*counted(update_of()), epochs=9, hooks=[Averaging(stop_at=6)])
    assert (int(result.state.step), result.epochs, result.stopped) == (6, 1, "enough")


# The progress bar


def test_the_progress_bar_counts_steps_and_shows_the_newest_losses(capsys):
    ft.fit(
        *counted(update_of(accumulate=3)), epochs=2, progress=True, log=ft.Every(updates=1), evaluation=scripted(5, 7)
    )
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "train/loss=" in shown
    assert "step" in shown


def test_the_progress_bar_is_off_if_told_and_where_there_is_no_terminal(capsys):
    for progress in (False, None):
        ft.fit(*counted(update_of()), epochs=1, progress=progress)
    assert capsys.readouterr().err == ""


# What is not finite


def breaking(params, batch):
    """NaN from the fourth batch of the first epoch on."""
    loss = loss_fn(params, batch)
    return ft.Loss(jnp.where(jnp.any(batch["bad"]), jnp.nan, 1.0) * loss.value, weight=loss.weight)


def bad_data():
    return [{"x": X[i : i + 2], "y": Y[i : i + 2], "bad": np.array([i == 6, False])} for i in range(0, 12, 2)]


def test_a_loss_that_is_nan_ends_the_run_and_is_told_with_parts_step_and_checkpoint(tmp_path):
    update, recorder = update_of(breaking), Recorder()
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=2), asynchronous=False)
    problem = (
        "step 4: 'train/loss' is not finite, nor are the parameters of part 'body', 'head'; the last sound checkpoint"
        f" is {tmp_path / '2'}; restore it and lower the rate, or leave such updates out: make_update(...,"
        ' nonfinite="skip")'
    )
    with pytest.raises(NonFiniteError, match=re.escape(problem)):
        ft.fit(
            update, update.init(start()), bad_data(), epochs=1, log=ft.Every(updates=1), checkpoints=checkpoints,
            hooks=[recorder],
        )  # fmt: skip
    assert isinstance(recorder.error, NonFiniteError)
    assert [path.name for path in checkpoints.steps()] == ["2"]


def test_parameters_that_are_nan_are_not_saved(tmp_path):
    update = update_of(breaking, body=ft.FROZEN)
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=5))
    problem = "step 5: the parameters or the pending gradients of part 'head' are not finite; the last sound"
    with pytest.raises(NonFiniteError, match=re.escape(problem)):
        ft.fit(update, update.init(start()), bad_data(), epochs=1, checkpoints=checkpoints)
    assert checkpoints.steps() == []


def test_an_update_that_leaves_out_what_is_not_finite_goes_on_and_logs_it():
    update = update_of(breaking, nonfinite="skip")
    result = ft.fit(update, update.init(start()), bad_data(), epochs=1, log=ft.Every(updates=1))
    assert [row["train/skipped"] for row in result.history] == [0, 0, 0, 1, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.params))


# Freezing, and unfreezing from an epoch on


def test_a_part_is_frozen_until_an_epoch_and_trained_from_then_on(tmp_path, capsys):
    """NeMo's unfreezing, as two calls: the second takes the checkpoint of the first."""
    data, recorder = data_of(), Recorder(of=lambda run: run.epoch)

    def fit(epochs, body, **options):
        update = update_of(body=body, head=ft.with_lr(optax.adam, 0.01))
        checkpoints = ft.Checkpoints(tmp_path)
        return ft.fit(update, update.init(start()), data, epochs=epochs, checkpoints=checkpoints, **options).state

    frozen = fit(2, ft.FROZEN)
    assert bits(frozen.params["body"]) == bits(start()["body"])
    assert bits(frozen.params["head"]) != bits(start()["head"])
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit .*saved with the optimizer frozen, now adam.*regroup=True"
    ):
        fit(3, ft.with_lr(optax.adam, 0.001))
    kept = copy.deepcopy(frozen)
    unfrozen = fit(3, ft.with_lr(optax.adam, 0.001), regroup=True, hooks=[recorder])
    assert "head: carried over from 'head': " in capsys.readouterr().out
    assert recorder.at("run_started") == [2]
    assert bits(unfrozen.params["body"]) != bits(frozen.params["body"])

    # The same by hand, with Adam's moments and count of the head, and new ones of the body.
    before = update_of(body=ft.FROZEN, head=ft.with_lr(optax.adam, 0.01))
    update = update_of(body=ft.with_lr(optax.adam, 0.001), head=ft.with_lr(optax.adam, 0.01))
    state, _ = update.adopt(before, kept)
    for batch in data.epoch(2):
        state, _ = update(state, batch)
    assert bits_of(unfrozen) == bits_of(state)


def test_the_best_state_comes_back_also_if_it_was_saved_before_a_part_was_unfrozen(tmp_path):
    for body, epochs, values in ((ft.FROZEN, 2, (1, 2)), (optax.sgd(0.1), 3, (3,))):
        update = update_of(body=body)
        result = ft.fit(
            update, update.init(start()), data_of(), epochs=epochs, evaluation=scripted(*values), regroup=True,
            checkpoints=ft.Checkpoints(tmp_path, keep_best="valid/loss"), load_best_on_end=True,
        )  # fmt: skip
    assert int(result.state.step) == 5
    update(result.state, next(data_of().epoch(0)))


# Imports

IMPORTED = """
import json, sys
import functrain as ft
OPTIONAL = ("flax", "grain", "orbax", "tensorboardX", "tensorflow_datasets", "tqdm")
seen = [[name for name in OPTIONAL if name in sys.modules]]
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_platforms", "cpu")
params = {"w": jnp.zeros(())}
optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
update = ft.make_update(lambda params, batch: jnp.mean((params["w"] - batch["x"]) ** 2), optim)
data = [{"x": np.ones(2, np.float32)}] * 4
evaluation = ft.Evaluation(lambda params, batch: {"loss": (params["w"] - batch["x"]) ** 2}, data)
result = ft.fit(update, update.init(params), data, epochs=2, evaluation=evaluation, progress=False)
assert int(result.state.step) == 8
seen.append([name for name in OPTIONAL if name in sys.modules])
print(json.dumps(seen))
"""


def test_neither_functrain_nor_a_plain_fit_imports_what_is_optional():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], []]


# Errors


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "fit needs an end: give epochs= or steps="),
        ({"epochs": 1, "unroll": 0}, "unroll=0: give a whole number of at least 1"),
        ({"epochs": 1, "unroll": 2.0}, "unroll=2.0: give a whole number of at least 1"),
        (
            {"epochs": 1, "evaluation": [scripted(1), scripted(1)]},
            "two evaluations have one name: ['valid', 'valid']; give each its own, Evaluation(..., name=)",
        ),
        (
            {"epochs": 1, "load_best_on_end": True},
            "load_best_on_end=True needs checkpoints=ft.Checkpoints(..., keep_best='valid/loss')",
        ),
    ],
)
def test_options_that_do_not_fit_each_other_are_told_before_anything_runs(options, problem):
    recorder = Recorder()
    with pytest.raises(FitError, match=re.escape(problem)):
        ft.fit(*counted(update_of()), hooks=[recorder], **options)
    assert recorder.events == []


def test_a_best_that_no_evaluation_gives_is_told_before_anything_runs(tmp_path):
    checkpoints = ft.Checkpoints(tmp_path / "run", keep_best="test/loss")
    problem = "keep_best='test/loss': the evaluations are ['valid']; name a result of one, 'valid/loss'"
    with pytest.raises(FitError, match=re.escape(problem)):
        ft.fit(*counted(update_of()), epochs=1, evaluation=scripted(1), checkpoints=checkpoints)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["evaluation", "checkpoints"])
def test_several_processes_have_no_common_clock(what, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    every = ft.Every(minutes=1)
    options = {"evaluation": scripted(1, every=every)}
    if what == "checkpoints":
        options = {"checkpoints": ft.Checkpoints(tmp_path, every=every)}
    problem = "the clocks of several processes differ: write Every(updates=) or Every(epochs=), not minutes="
    with pytest.raises(FitError, match=re.escape(problem)):
        ft.fit(*[None] * 3, epochs=1, **options)


@pytest.mark.parametrize(("data", "epoch"), [([], 0), (iter([{"x": X[:2], "y": Y[:2]}]), 1)])
def test_an_epoch_without_a_batch_is_told(data, epoch):
    update = update_of()
    problem = (
        f"the data gave no batch in epoch {epoch}: an iterator can be read only once, give an iterable that begins"
        " anew, or end after one epoch"
    )
    with pytest.raises(FitError, match=re.escape(problem)):
        ft.fit(update, update.init(start()), data, epochs=2)


@pytest.mark.parametrize("unroll", [1, 2])
def test_the_batches_of_an_epoch_may_be_a_list(unroll):
    class Listed:
        def epoch(self, number):
            return [jnp.float32(number), jnp.float32(1), jnp.float32(2), jnp.float32(3)]

    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(1.0)})
    update = ft.make_update(lambda params, batch: params["w"] * batch, optim)
    result = ft.fit(update, update.init(params), Listed(), epochs=2, steps=8, unroll=unroll)
    assert (int(result.state.step), result.epochs, float(result.state.params["w"])) == (8, 2, -13.0)
