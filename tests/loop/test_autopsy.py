"""What a run says that ended for NaN: the update, the batch, the leaves, and the operation with its line."""

import copy
import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import Recorder
from soak import SOAK

import functrain as ft
from functrain.errors import NonFiniteError

HERE, LINES = os.path.relpath(__file__), Path(__file__).read_text().splitlines()
X = np.random.default_rng(0).uniform(0.5, 1.5, size=(24, 3)).astype(np.float32)
BAD = 15  # The example with which something is wrong, where it is one.
START = {"body": {"b": jnp.zeros(()), "w": jnp.full(3, 0.5)}, "head": {"w": jnp.full(3, 0.1)}}
SOMETIMES = ft.Every(updates=2)


def at(mark):
    """The line of this file that has a mark."""
    (number,) = (number for number, line in enumerate(LINES, start=1) if line.endswith(f"# {mark}"))
    return f"{HERE}:{number}, in "


def changed(value):
    x = X.copy()
    x[BAD, 1] = value
    return x


# Five programs, each with the first operation that goes wrong marked.


def log_of_zero(w, x):
    return jnp.log(jnp.prod(x, axis=1)) * w[0]  # log


def zero_by_zero(w, x):
    short = x[:, 1:2] * w[1:2]
    return (short / jnp.abs(short))[:, 0] + w[1]  # division


def overflow(w, x):
    return jnp.exp(x @ w / 2)  # overflow


def plain(w, x):
    return jnp.tanh(x * w).sum(1)  # data


def poisson(w, x):
    return jnp.exp(x @ w) - x @ w  # divergence


PROGRAMS = {
    "log": (log_of_zero, changed(0.0), {}, "log(0.0) is -inf"),
    "division": (zero_by_zero, changed(0.0), {}, "div(0.0, 0.0) is nan"),
    "overflow": (overflow, changed(60.0), {"compute_dtype": jnp.float16}, "exp("),
    "data": (plain, changed(np.nan), {}, "'x' of the batch is nan at ["),
    "divergence": (poisson, X, {}, "exp("),
}


def sound_loss(params, batch):
    return jnp.sum(jnp.tanh(params["head"]["w"]))


def made(program, *, phases=False, noisy=False, rate=0.01, **options):
    """An update with such a program in the loss of its body."""

    def loss_fn(params, batch):
        w = params["body"]["w"]
        body = program(w, batch["x"].astype(w.dtype)).mean() + params["body"]["b"]
        return body + (0.0 if phases else sound_loss(params, batch))

    def noisy_loss(params, batch, key):
        w = params["body"]["w"]
        noise = 0.01 * jax.random.bernoulli(key, 0.2, w.shape)
        return loss_fn({**params, "body": {**params["body"], "w": w + noise.astype(w.dtype)}}, batch)

    loss = noisy_loss if noisy else loss_fn
    parts = ft.partition(START, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": optax.sgd(rate), "head": optax.adam(0.01)})
    if phases:
        loss = ft.alternate(ft.Phase("still", sound_loss, "head"), ft.Phase("moving", loss, "body"))
    return ft.make_update(loss, optim, **options)


def first_bad(update, state, data):
    """The number of the update, epoch and batch with which something is first not finite, by a loop of one's own."""
    for epoch in range(200):
        for number, batch in enumerate(data.epoch(epoch)):
            step = int(state.step) + 1
            state, metrics = update(state, batch)
            looked_at = (metrics, state.params, state.window)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(looked_at)):
                return step, epoch, number
        state, _ = update.flush(state)
    raise AssertionError("all is finite")


def ended(update, state, data, directory, **options):
    """The error that ends a run, which saves at every second update."""
    checkpoints = ft.Checkpoints(directory, every=SOMETIMES, asynchronous=False)
    with pytest.raises(NonFiniteError) as raised:
        ft.fit(update, state, data, **{"epochs": 200, "checkpoints": checkpoints} | options)
    return str(raised.value)


VARIANTS = ["alone", "accumulated", "phases", "keys"]
CASES = [(name, variant) for name in PROGRAMS for variant in VARIANTS]


@pytest.mark.parametrize(("name", "variant"), [case for case in CASES if SOAK > 1 or "alone" in case or "log" in case])
def test_the_update_the_batch_the_leaf_and_the_line_are_found(name, variant, tmp_path):
    program, x, options, numbers = PROGRAMS[name]
    options = options | ({"accumulate": 2} if variant == "accumulated" else {})
    rate = 100.0 if name == "divergence" else 0.01
    update = made(program, phases=variant == "phases", noisy=variant == "keys", rate=rate, **options)
    data = ft.from_arrays({"x": x}, batch_size=2, seed=3)
    state = update.init(START, key=jax.random.key(0))
    step, epoch, number = first_bad(update, copy.deepcopy(state), data)
    assert step > 2, "it is after a checkpoint"
    problem = ended(update, state, data, tmp_path)
    first, *_ = lines = problem.splitlines()[2:]
    assert f"update {step}, " in first
    assert f"with batch {number} of epoch {epoch}" in first
    assert ("of the 2 of its window" in first) == (variant == "accumulated")
    assert ("of phase 'moving'" in first) == (variant == "phases")
    assert first.endswith("in the loss ('loss') and the gradients of part 'body' ('body/w')")
    assert at(name) in lines[1]
    assert numbers in lines[1]
    assert lines[2].strip() == LINES[int(re.search(r":(\d+), in", lines[1])[1]) - 1].strip()


# What else may have made it.


def test_an_optimizer_that_makes_it_is_found_in_its_parameters(tmp_path):
    def late(grads, step, params):
        return jax.tree.map(lambda grad: grad / (4.0 - step), grads), step + 1  # transform

    parts = ft.partition(START, {"body": "body", "head": "head"})
    transform = optax.GradientTransformation(lambda params: jnp.zeros(()), late)
    update = ft.make_update(sound_or(plain), ft.Optimizer(parts, {"body": optax.sgd(0.1), "head": transform}))
    lines = ended(update, update.init(START), data_of(X), tmp_path).splitlines()[2:]
    assert lines[0] == (
        "  update 5, with batch 4 of epoch 0 (counted from 0), is the first that is not finite, in the parameters of"
        " part 'head' ('head/w')"
    )
    assert lines[1].startswith(f"  it is made at {at('transform')}<lambda>: div(")


def test_a_function_of_gradients_that_makes_it_is_found_by_its_line(tmp_path):
    def surgery(grads, *, per_loss, step):
        norm = jnp.sqrt(jnp.sum(per_loss["head"]["head"]["head/w"] ** 2))
        return jax.tree.map(lambda grad: grad * norm / (3.0 - step), grads)  # surgery

    def losses(params, batch):
        return {
            "body": plain(params["body"]["w"], batch["x"]).mean() + params["body"]["b"],
            "head": sound_loss(params, batch),
        }

    parts = ft.partition(START, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": optax.sgd(0.1), "head": optax.adam(0.1)})
    update = ft.make_update(losses, optim, accumulate=2, gradients=surgery)
    lines = ended(update, update.init(START), data_of(X), tmp_path).splitlines()[2:]
    assert "number 1 of the 2 of its window (counted from 0), is the first that is not finite, in the param" in lines[0]
    assert lines[1].startswith(f"  it is made at {at('surgery')}<lambda>: div(")


def sound_or(program):
    def loss_fn(params, batch):
        return program(params["body"]["w"], batch["x"]).mean() + params["body"]["b"] + sound_loss(params, batch)

    return loss_fn


def data_of(x):
    return ft.from_arrays({"x": x}, batch_size=2, seed=3)


def lines_of(directory, data=None, of_update=(), **options):
    update = made(log_of_zero, **dict(of_update))
    state = update.init(START, key=jax.random.key(0))
    return ended(update, state, data or data_of(changed(0.0)), directory, **options).splitlines()


FOUND = "is the first that is not finite, in the loss ('loss') and the gradients of part 'body' ('body/w')"


@pytest.mark.parametrize("options", [{"unroll": 2}, {"of_update": (("microbatches", 2),)}, {"data": "list"}])
def test_it_is_found_in_several_updates_at_once_in_slices_and_in_a_list(options, tmp_path):
    data = data_of(changed(0.0))
    (number,) = (i for i, batch in enumerate(data.epoch(0)) if (batch["x"] == 0).any())
    if "data" in options:
        options = {"data": [*data.epoch(0)]}
    lines = lines_of(tmp_path, data=options.pop("data", data), **options)
    assert lines[2] == f"  update {number + 1}, with batch {number} of epoch 0 (counted from 0), {FOUND}"
    assert at("log") in lines[3]


def test_it_is_found_over_several_devices_in_a_scan_of_slices(tmp_path):
    """In a layer that is computed again for its gradient; JAX computes what the turns share before the scan."""

    def layer(h, w, rows):
        return h * w, jnp.log(jnp.prod(rows, axis=1)).mean()  # layer

    def loss_fn(params, batch):
        remembered = jax.checkpoint(lambda h, w: layer(h, w, batch["x"]))
        h, logs = jax.lax.scan(remembered, 1.0, params["body"]["w"])
        return h + params["body"]["b"] + logs.sum() * params["body"]["w"].sum() + sound_loss(params, batch)

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    replicated, by_example = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    params = jax.device_put(START, replicated)
    optim = ft.Optimizer(ft.partition(params, {"body": "body", "head": "head"}), dict.fromkeys(START, optax.adam(0.1)))
    update = ft.make_update(loss_fn, optim, microbatches=2)
    x = np.concatenate([X[:16], X[:16], X[:16], changed(0.0)[:16]])
    data = ft.from_arrays({"x": x}, batch_size=16, shuffle=False)
    lines = ended(update, update.init(params), data, tmp_path, sharding=by_example).splitlines()[2:]
    assert lines[0].startswith("  update 4, with batch 3 of epoch 0 (counted from 0), is the first that is not finite")
    assert lines[1].startswith(f"  it is made at {at('layer')}layer, in turn ")


def test_a_window_that_an_epoch_cuts_short_is_named(tmp_path):
    """Its optimizer makes NaN of sound gradients, at the end of the second epoch."""
    late = optax.GradientTransformation(
        lambda params: jnp.zeros(()),
        lambda grads, step, params: (jax.tree.map(lambda grad: grad / (5.0 - step), grads), step + 1),
    )
    parts = ft.partition(START, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": late, "head": optax.sgd(0.1)})
    update = ft.make_update(sound_or(plain), optim, accumulate=5)
    problem = ended(update, update.init(START), data_of(X), tmp_path)
    assert "update 6, with the window that the end of epoch 1 cuts short, is the first that is not finite" in problem


def test_nothing_of_the_run_is_touched(tmp_path):
    """Hooks hear nothing of the replay, no row and no checkpoint is written, and the state can still be read."""
    recorder = Recorder(of=lambda run: (run.step, float(run.state.params["body"]["w"][0])))
    lines_of(tmp_path, hooks=[recorder], log=ft.Every(updates=1))
    assert len(recorder.at("update_ended")) == recorder.at("run_ended")[0][0]
    assert recorder.events[-1][0] == "run_ended"
    assert "the autopsy:" in str(recorder.error)
    rows = [row["step"] for row in ft.read_json_lines(tmp_path / "log.jsonl")]
    assert rows == [*range(1, recorder.events[-1][1][0])]
    saved = [step for step in rows if step % 2 == 0]
    assert [int(path.name) for path in ft.Checkpoints(tmp_path).steps()] == saved[-2:]


# Where there is none, or not all of it.


class Plain:
    """Data that is read anew each epoch, and can't be resumed."""

    def __iter__(self):
        yield from data_of(changed(0.0)).epoch(0)


def test_it_is_left_out_where_that_is_asked_for(tmp_path):
    assert len(lines_of(tmp_path, autopsy=False)) == 1


def test_data_that_cannot_be_read_again_is_told(tmp_path):
    assert lines_of(tmp_path, data=Plain())[1:] == [
        "the autopsy:",
        "  the data can't be resumed, and so not replayed: give data whose iterator has get_state and set_state, such"
        " as ft.from_arrays or Grain's, or a list",
    ]


def test_a_run_that_ends_before_its_first_checkpoint_says_how_to_have_one(tmp_path):
    update, x = made(log_of_zero), np.where(X < 9, np.float32(0), X)
    state = update.init(START)
    problem = ended(update, copy.deepcopy(state), data_of(x), tmp_path, log=ft.Every(updates=1))
    assert problem.endswith(
        "the autopsy:\n  no checkpoint was saved before it, from which to replay: save what the run begins with,"
        " checkpoints.save(state) before ft.fit(...)"
    )
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    assert f"update 1, with batch 0 of epoch 0 (counted from 0), {FOUND}" in ended(update, state, data_of(x), tmp_path)


def test_a_state_that_a_hook_made_nan_is_told(tmp_path):
    class Spoiling(ft.Hook):
        def update_ended(self, run):
            if run.step == 3:
                params = jax.tree.map(lambda leaf: leaf * jnp.nan, run.state.params)
                run.state = dataclasses.replace(run.state, params=params)

    lines = lines_of(tmp_path, data=data_of(X), hooks=[Spoiling()])
    assert lines[2] == (
        f"  the replay from {tmp_path / '2'} stayed finite: what was not is not of the update and its data alone, but"
        " of a hook that changes the state, or of data that is another each time"
    )


def test_a_replay_that_fails_does_not_hide_what_ended_the_run(tmp_path):
    """The disk from which the data comes is gone when it is read again."""

    class Gone:
        def __init__(self):
            self.reads = 0

        def epoch(self, number):
            self.reads += 1
            if self.reads > 1:
                raise OSError("the disk is gone")
            return data_of(changed(0.0)).epoch(number)

    lines = lines_of(tmp_path, data=Gone(), epochs=1)
    assert "is not finite" in lines[0]
    assert lines[1:] == ["the autopsy:", "  it got no further: OSError: the disk is gone"]


def test_what_was_found_until_it_failed_is_said(tmp_path):
    """The loss reads a file whenever it is traced, which is gone by the time that the update is looked into."""
    file = tmp_path / "weight"
    file.write_text("1.0")

    class Removing:
        def __init__(self):
            self.reads = 0

        def epoch(self, number):
            self.reads += 1
            if self.reads > 2:
                file.unlink()
            return data_of(changed(0.0)).epoch(number)

    def loss_fn(params, batch):
        return sound_or(log_of_zero)(params, batch) * float(file.read_text())

    parts = ft.partition(START, {"body": "body", "head": "head"})
    update = ft.make_update(loss_fn, ft.Optimizer(parts, dict.fromkeys(START, optax.sgd(0.1))))
    options = {"epochs": 1, "log": ft.Every(updates=1)}
    lines = ended(update, update.init(START), Removing(), tmp_path / "run", **options).splitlines()
    number = next(i for i, batch in enumerate(data_of(changed(0.0)).epoch(0)) if (batch["x"] == 0).any())
    assert lines[2].startswith(
        f"  update {number + 1}, with batch {number} of epoch 0 (counted from 0), is the first that is not finite, in"
    )
    assert lines[3].startswith("  it got no further: FileNotFoundError: ")
