"""What `fit` does between two updates, and that it changes nothing in them."""

import copy
import gc
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import (
    Recorder,
    X,
    Y,
    bits,
    bits_of,
    compilations,
    counted,
    data_of,
    loss_fn,
    noisy_loss,
    optim_of,
    scripted,
    start,
    update_of,
)

import functrain as ft
from functrain.errors import CheckpointError, FitError, NonFiniteError

# The same bits as a loop of one's own


@pytest.mark.slow
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
def test_the_loop_does_not_wait_for_the_device_except_to_log(log_every, tmp_path):
    """Nor to look for NaN. Each update takes the device far longer than the loop: reading finds it ready."""
    params = {"w": jnp.full((256, 256), 0.01)}

    def slow(params, batch):
        x = jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ jax.lax.stop_gradient(params["w"])), params["w"])
        return jnp.mean(x + params["w"]) * batch["x"].mean()

    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": ft.with_lr(optax.adam, 0.1)})
    update, watch = ft.make_update(slow, optim), WasReady()
    data = [{"x": np.ones(2, np.float32)}] * 12
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=1000))
    log = ft.Every(updates=log_every)
    ft.fit(update, update.init(params), data, epochs=1, hooks=[watch], log=log, checkpoints=checkpoints)
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
    problem = "step 5: 'train/loss' is not finite, nor are the parameters of part 'head'; lower the rate"
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
        ft.fit(*counted(update_of()), epochs=1, **options)


@pytest.mark.parametrize(("data", "epoch"), [(iter([]), 0), (iter([{"x": X[:2], "y": Y[:2]}]), 1)])
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


def test_a_run_that_goes_on_has_memory_for_one_state_alone(tmp_path):
    wide = {"w": jnp.ones((64, 1024))}
    optim = ft.Optimizer(ft.partition(wide, {"all": ...}), {"all": optax.adam(0.1)})
    update = ft.make_update(lambda params, batch: jnp.mean((params["w"] * batch["x"][0]) ** 2), optim)
    gc.collect()  # The arrays of other tests.
    before, held = sum(array.nbytes for array in jax.live_arrays()), []

    class Held(ft.Hook):
        def update_ended(self, run):
            held.append(sum(array.nbytes for array in jax.live_arrays()) - before)

    for epochs in (1, 2):
        ft.fit(
            update, update.init(wide), ft.from_arrays({"x": np.ones(4, np.float32)}, 2), epochs=epochs,
            checkpoints=ft.Checkpoints(tmp_path), hooks=[Held()], progress=False,
        )  # fmt: skip
    state = 3 * 64 * 1024 * 4
    assert all(state <= each < 1.1 * state for each in held), held
