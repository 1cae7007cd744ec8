"""What an update refuses, and what it says."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import batches_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0: give a whole number of at least 1"),
        ({"microbatches": 1.5}, "microbatches=1.5: give a whole number"),
        ({"remainder": "keep"}, "remainder='keep': write 'flush', 'drop' or 'carry'"),
        ({"nonfinite": "raise"}, "nonfinite='raise': write 'ignore' or 'skip'"),
    ],
)
def test_an_unknown_option_is_an_error_when_the_update_is_made(options, message):
    with pytest.raises(ft.UpdateError, match=re.escape(message)):
        ft.make_update(loss_fn, optimizer_of(linear_params()), **options)


def test_an_unknown_required_argument_is_an_error_when_the_update_is_made():
    with pytest.raises(ft.LossError, match="requires 'temperature', which functrain does not give"):
        ft.make_update(lambda params, batch, temperature: 0.0, optimizer_of(linear_params()))


def test_a_compute_dtype_of_an_unknown_part_is_an_error_when_the_update_is_made():
    with pytest.raises(ft.PartitionError, match="compute_dtype: unknown part 'haed'"):
        ft.make_update(loss_fn, optimizer_of(linear_params()), compute_dtype={"haed": jnp.bfloat16})


@pytest.mark.parametrize("name", ["key", "model_state"])
def test_init_asks_for_what_the_loss_function_declares(name):
    scope = {}
    exec(f"def loss(params, batch, {name}): return 0.0", scope)
    update = ft.make_update(scope["loss"], optimizer_of(linear_params()))
    with pytest.raises(ft.UpdateError, match=re.escape(f"declares '{name}': update.init(params, {name}=...)")):
        update.init(linear_params())


def test_a_leaf_that_is_no_array_in_a_part_that_is_trained_is_an_error_that_says_how_to_freeze_it():
    params = linear_params() | {"activation": jnp.tanh}
    parts = ft.partition(params, {"body": "body", "head": ...})
    optim = ft.Optimizer(parts, {"body": optax.sgd(0.1), "head": optax.sgd(0.1)})
    with pytest.raises(ft.UpdateError, match=r"'activation' is no array, in a part that is trained: .*ft.non_float"):
        ft.make_update(loss_fn, optim)


def test_update_under_a_trace_is_an_error_that_names_pure():
    update = ft.make_update(loss_fn, optimizer_of(linear_params()))
    for call in (update, update.measured):
        with pytest.raises(ft.UpdateError, match=re.escape("use update.pure in a jit, scan or vmap of your own")):
            jax.jit(call)(update.init(linear_params()), batches_of(1)[0])


@pytest.mark.parametrize("count", [3, 5])
def test_scan_takes_whole_windows(count):
    update = ft.make_update(loss_fn, optimizer_of(linear_params()), accumulate=2)
    with pytest.raises(ft.UpdateError, match=r"a multiple of 2 of them \(accumulate=2\), not \{'': \(\d,\)\}"):
        update.scan(update.init(linear_params()), batches_of(count))


@pytest.mark.parametrize("method", ["scan", "pure"])
def test_scan_and_pure_start_where_no_window_is_pending(method):
    update = ft.make_update(loss_fn, optimizer_of(linear_params()), accumulate=2)
    state, _ = update(update.init(linear_params()), batches_of(1)[0])
    with pytest.raises(ft.UpdateError, match=re.escape(f"{method} takes in whole windows, but one is pending: end it")):
        getattr(update, method)(state, batches_of(2))


def test_a_batch_that_cannot_be_sliced_is_an_error_that_names_the_leaf():
    update = ft.make_update(loss_fn, optimizer_of(linear_params()), microbatches=4)
    with pytest.raises(ft.UpdateError, match=r"microbatches=4: the leading axis of '', shaped \(6, 4\)"):
        update(update.init(linear_params()), batches_of(1)[0])


def test_a_model_state_of_another_form_is_an_error_that_says_what_differs():
    def grows(params, batch, model_state):
        return ft.Loss(loss_fn(params, batch), model_state={**model_state, "new": jnp.zeros(())})

    def widens(params, batch, model_state):
        return ft.Loss(loss_fn(params, batch), model_state={"a": model_state["a"].astype(jnp.float32)})

    stats = {"a": jnp.zeros((), jnp.bfloat16)}
    for function, message in ((grows, "has 'new'"), (widens, r"'a' is float32\(\), and was bfloat16\(\)")):
        update = ft.make_update(function, optimizer_of(linear_params()))
        with pytest.raises(ft.LossError, match=f"the model_state that the loss function returned .*{message}"):
            update(update.init(linear_params(), model_state=stats), batches_of(1)[0])


def test_after_must_keep_the_form_of_the_params():
    update = ft.make_update(
        loss_fn, optimizer_of(linear_params()), after=lambda params, state, step: (params["body"], state)
    )
    with pytest.raises(
        ft.UpdateError, match=r"the params that after= returned must be of the structure .* lacks 'body/w'"
    ):
        update(update.init(linear_params()), batches_of(1)[0])


@pytest.mark.parametrize("name", ["loss", "skipped", "a"])
def test_two_metrics_of_one_name_are_an_error(name):
    def loss(params, batch):
        return ft.Loss({"a": loss_fn(params, batch)}, metrics={name: 1.0})

    update = ft.make_update(loss, optimizer_of(linear_params()))
    with pytest.raises(ft.LossError, match=f"'{name}' names a loss or a metric, and something else"):
        update(update.init(linear_params()), batches_of(1)[0])


def test_an_error_while_a_program_runs_is_not_taken_for_a_consumed_state():
    def checked(value):
        if value > 2:
            raise KeyError("the caller's own")
        return np.float32(value)

    def loss(params, batch):
        return jnp.sum(params["w"]) * jax.pure_callback(checked, jax.ShapeDtypeStruct((), jnp.float32), batch)

    params = {"w": jnp.ones(2)}
    update = ft.make_update(loss, ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)}))
    state, _ = update(update.init(params), jnp.float32(1))
    with pytest.raises(Exception, match="the caller's own") as raised:
        jax.block_until_ready(update(state, jnp.float32(3)))
    assert not isinstance(raised.value, ft.UpdateError)


def test_a_state_that_was_consumed_is_an_error_that_says_what_to_go_on_from():
    update = ft.make_update(loss_fn, optimizer_of(linear_params()))
    state = update.init(linear_params())
    shallow, deep = dataclasses.replace(state), copy.deepcopy(state)
    update(state, batches_of(1)[0])
    for used in (state, shallow):
        for call in (update, update.measured, lambda s, b: update.scan(s, b[None])):
            with pytest.raises(ft.UpdateError, match=r"consumed by an earlier call.* state, metrics = up"):
                call(used, batches_of(1)[0])
    update(deep, batches_of(1)[0])


def test_a_pending_state_that_was_consumed_is_the_same_error():
    update = ft.make_update(loss_fn, optimizer_of(linear_params()), accumulate=3)
    first, _ = update(update.init(linear_params()), batches_of(1)[0])
    second, _ = update(first, batches_of(1)[0])
    for used in (first, second):  # Of the first, only the window is gone.
        if used is second:
            update(second, batches_of(1)[0])
        with pytest.raises(ft.UpdateError, match=r"consumed by an earlier call"):
            update(used, batches_of(1)[0])


@pytest.mark.parametrize("length", [1, 2])
def test_a_pending_window_that_is_longer_than_the_updates_is_never_lost_in_silence(length):
    params = linear_params()
    long, short = (ft.make_update(loss_fn, optimizer_of(params), accumulate=k) for k in (4, length))
    state, _ = run(long, long.init(params), batches_of(2))
    with pytest.raises(ft.UpdateError, match=f"2 batches are pending .* than accumulate={length}: end it"):
        short(state, batches_of(1)[0])
    state, _ = short.flush(state)
    assert int(state.step) == 1
    short(state, batches_of(1)[0])


@pytest.mark.parametrize("count", [1, 3, 4])
def test_pure_takes_exactly_one_window(count):
    update = ft.make_update(loss_fn, optimizer_of(linear_params()), accumulate=2)
    with pytest.raises(ft.UpdateError, match=r"pure takes in 2 batches .* \(accumulate=2\), not \{'': \(\d,\)\}"):
        update.pure(update.init(linear_params()), batches_of(count))


def test_microbatches_of_leaves_of_several_lengths_are_an_error():
    update = ft.make_update(lambda p, b: loss_fn(p, b["x"] * b["y"]), optimizer_of(linear_params()), microbatches=2)
    with pytest.raises(ft.UpdateError, match=r"must have one leading axis, of examples: .*'x'.*'y'"):
        update(update.init(linear_params()), {"x": jnp.ones((4, 4)), "y": jnp.ones((2, 1))})


@pytest.mark.parametrize("lr", [0.1, {"haed": 0.1}])
def test_rates_are_checked_at_every_call_of_a_window(lr):
    update = ft.make_update(loss_fn, optimizer_of(linear_params()), accumulate=2)
    with pytest.raises(ft.UpdateError, match="give a rate by part, of the parts 'body', 'head'"):
        update(update.init(linear_params()), batches_of(1)[0], lr=lr)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"after": 3}, ft.UpdateError, "after=3: give a function"),
        ({"loss_scale": 1024.0}, ft.UpdateError, "loss_scale=1024.0: write ft.DynamicScale"),
        ({"compute_dtype": jnp.int32}, ft.UpdateError, "compute_dtype of part 'body' is .*int32.*: give a floating"),
    ],
)
def test_an_option_of_another_type_is_an_error_when_the_update_is_made(options, error, message):
    with pytest.raises(error, match=message):
        ft.make_update(loss_fn, optimizer_of(linear_params()), **options)


def test_objects_in_each_others_place_are_named():
    params = linear_params()
    optim = optimizer_of(params)
    update = ft.make_update(loss_fn, optim)
    with pytest.raises(ft.UpdateError, match=r"takes a TrainState, not dict: state = update.init"):
        update(params, batches_of(1)[0])
    with pytest.raises(ft.UpdateError, match=r"takes a TrainState, not tuple"):
        update(update(update.init(params), batches_of(1)[0]), batches_of(1)[0])
    with pytest.raises(ft.UpdateError, match=r"takes an ft.Optimizer, not Partition"):
        ft.make_update(loss_fn, optim.parts)
    with pytest.raises(ft.LossError, match=r"takes an ft.partition\(...\), not Optimizer"):
        ft.make_train_step(loss_fn, optim)
    with pytest.raises(ft.OptimizerError, match=r"takes an ft.partition\(...\) and a dict .* not dict and dict"):
        ft.Optimizer(params, {})
    with pytest.raises(ft.OptimizerError, match=r"not TrainState: give what optim.init.* or the opt_state of"):
        optim.learning_rates(update.init(params))
    with pytest.raises(ft.OptimizerError, match=r"optax.adam and 1e-3, not optax.adam\(1e-3\)"):
        ft.with_lr(optax.adam(1e-3), 1e-3)
    with pytest.raises(ft.PartitionError, match="rules are a dict of selectors by part"):
        ft.partition(params, ["body", "head"])
    grads = optim.parts.split(params)
    with pytest.raises(ft.OptimizerError, match=r"learning_rate= would set the rate of every part: write lr="):
        optim.step(params, grads, optim.init(params), learning_rate=0.5)
    with pytest.raises(ft.OptimizerError, match=r"lr=0.1: give a rate by part, e.g. lr=\{'body': 1e-4\}"):
        optim.step(params, grads, optim.init(params), lr=0.1)


def test_after_must_return_both():
    update = ft.make_update(loss_fn, optimizer_of(linear_params()), after=lambda params, state, step: params)
    with pytest.raises(ft.UpdateError, match=r"after= must return \(params, model_state\), not dict"):
        update(update.init(linear_params()), batches_of(1)[0])


def test_a_set_of_losses_that_changes_between_calls_is_an_error():
    def changing(params, batch):
        return ft.Loss({"main": jnp.sum(params["a"])} | ({"aux": params["b"]} if batch.shape[0] > 2 else {}))

    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(changing, optim, audit=False)
    state, _ = update(update.init(params), jnp.ones(4))
    with pytest.raises(ft.LossError, match="returned the losses 'main', and before 'aux', 'main': return"):
        update(state, jnp.ones(2))


def metrics_loss(**metrics):
    return lambda params, batch: ft.Loss(loss_fn(params, batch), metrics=metrics)


@pytest.mark.parametrize(
    ("now", "differs"),
    [
        ({"accuracy": 1.0}, "lacks 'acc' and has 'accuracy', which is not expected"),
        ({}, "lacks 'acc'"),
        ({"acc": jnp.ones(2)}, "has 'acc' of shape (2,), not ()"),
    ],
)
@pytest.mark.parametrize("batches", [1, 2])
def test_a_window_goes_on_with_the_metrics_with_which_it_was_begun(now, differs, batches):
    """Which was saved, say, before the loss function was changed."""
    params = linear_params()
    begun, changed = (
        ft.make_update(metrics_loss(**metrics), optimizer_of(params), accumulate=3) for metrics in ({"acc": 1.0}, now)
    )
    state, _ = run(begun, begun.init(params), batches_of(batches))
    problem = (
        "the metrics of this batch do not fit those of the batches before it, in the window that is pending: the tree"
        f" {differs}; return the same until the window is ended, or go on without it, in fit in run_started of a"
        " hook: run.state = dataclasses.replace(run.state, window=None, pending=np.array(0))"
    )
    with pytest.raises(ft.UpdateError, match=f"^{re.escape(problem)}"):
        changed(state, batches_of(1)[0])
    state = dataclasses.replace(state, window=None, pending=np.array(0))
    state, _ = changed(state, batches_of(1)[0])
    assert (int(state.step), int(state.pending)) == (0, 1)
