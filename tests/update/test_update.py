"""What an update computes: steps, windows, scans, and what it gives a loss function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from linear import batches_of, leaves_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft


def test_an_update_is_a_train_step_and_an_optimizer_step():
    params, batches = linear_params(), batches_of(3)
    optim = optimizer_of(params)
    state, metrics = run(ft.make_update(loss_fn, optim), ft.make_update(loss_fn, optim).init(params), batches)
    train_step = ft.make_train_step(loss_fn, optim.parts, wrt=optim.trained)

    @jax.jit
    def step(params, opt_state, batch):
        grads, loss = train_step(params, batch)
        return *optim.step(params, grads, opt_state), loss.value

    opt_state = optim.init(params)
    for batch in batches:
        params, opt_state, loss = step(params, opt_state, batch)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, (state.params, state.opt_state), (params, opt_state)))
    assert float(metrics["loss"]) == float(loss)
    assert (int(state.step), int(state.batches), int(state.pending)) == (3, 3, 0)


def test_counters_are_integers_of_the_host():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=2)
    state, _ = run(update, update.init(params), batches_of(3))
    for counter, value in ((state.step, 1), (state.batches, 3), (state.pending, 1)):
        assert isinstance(counter, np.generic | np.ndarray)
        assert (counter.dtype, counter.shape, int(counter)) == (np.int64, (), value)


# Accumulation


def token_loss(params, batch):
    tokens, mask = batch
    losses = (jnp.tanh(tokens @ params["body"]["w"]) @ params["head"]["w"])[..., 0] ** 2
    return ft.Loss(
        jnp.sum(losses * mask) / jnp.maximum(mask.sum(), 1), weight=mask.sum(), metrics={"max": jnp.max(losses * mask)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [1, 5, 2, 4], [3, 0, 0, 1]])
def test_a_window_is_one_batch_of_the_union_also_with_unequal_token_counts(counts):
    with jax.enable_x64():
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), linear_params())
        tokens = batches_of(4, 5).astype(jnp.float64)
        mask = (jnp.arange(5) < jnp.array(counts)[:, None]).astype(jnp.float64)
        optim = optimizer_of(params)
        windowed, whole = ft.make_update(token_loss, optim, accumulate=4), ft.make_update(token_loss, optim)
        state, metrics = run(windowed, windowed.init(params), [(tokens[i], mask[i]) for i in range(4)])
        expected, loss = whole(whole.init(params), (tokens.reshape(20, 4), mask.reshape(20)))
        assert float(metrics["loss"]) == pytest.approx(float(loss["loss"]), rel=1e-14)
        for path, leaf in ft.flatten(state.params).items():
            # Sums of at most 20 terms in another order, which Adam's first step divides by themselves.
            np.testing.assert_allclose(leaf, ft.flatten(expected.params)[path], rtol=1e-12)


def test_metrics_are_the_batchs_and_at_the_end_the_windows_weighted_means():
    def loss_fn(params, batch):
        return ft.Loss(params["w"] * batch["x"], weight=batch["n"], metrics={"x": batch["x"], "n": batch["n"]})

    params = {"w": jnp.float32(2.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.0)})
    update = ft.make_update(loss_fn, optim, accumulate=2)
    state, first = update(update.init(params), {"x": jnp.float32(1.0), "n": 3})
    state, last = update(state, {"x": jnp.float32(5.0), "n": 1})
    assert {name: float(value) for name, value in first.items()} == {"loss": 2.0, "x": 1.0, "n": 3.0}
    assert {name: float(value) for name, value in last.items()} == {"loss": 4.0, "x": 2.0, "n": 2.5}


@pytest.mark.parametrize(("remainder", "weight"), [("flush", -6.0), ("drop", -4.0), ("carry", -5.0)])
def test_an_epochs_leftover_is_flushed_dropped_or_carried(remainder, weight):
    """AIToolbox 3: constant gradient 1, SGD 1.0, two in a window, five batches an epoch, two epochs."""
    params = {"w": jnp.float32(0.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(1.0)})
    update = ft.make_update(lambda params, batch: params["w"] * batch, optim, accumulate=2, remainder=remainder)
    state = update.init(params)
    for _ in range(2):
        state, _ = run(update, state, [jnp.float32(1.0)] * 5)
        state, metrics = update.flush(state)
        assert ("loss" in metrics) == (remainder == "flush")
    assert float(state.params["w"]) == weight
    assert int(state.step) == -weight
    assert int(state.batches) == 10
    assert state.window is None


def test_nothing_pending_is_nothing_to_flush():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=2)
    state = update.init(params)
    assert update.flush(state) == (state, {})


def test_a_schedule_advances_once_an_update_not_once_a_batch():
    """AIToolbox 4."""
    params = {"w": jnp.float32(0.0)}
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.5})
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": ft.with_lr(optax.sgd, schedule)})
    update = ft.make_update(lambda params, batch: params["w"] * batch, optim, accumulate=3)
    state, rates = update.init(params), []
    for _ in range(9):
        state, _ = update(state, jnp.float32(1.0))
        rates.append(float(optim.learning_rates(state.opt_state)["w"]))
    assert rates == [1.0] * 5 + [0.5] * 3 + [0.25]
    assert float(state.params["w"]) == -1.75


def test_losses_in_one_loss_are_summed():
    """NeMo 1: squared error + absolute error, SGD 0.01 with momentum 0.9."""

    def loss_fn(params, batch):
        error = params["w"] * batch[0] - batch[1]
        return ft.Loss({"mse": jnp.mean(error**2), "mae": jnp.mean(jnp.abs(error))})

    with jax.enable_x64():
        params = {"w": jnp.zeros((), jnp.float64)}
        optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.01, momentum=0.9)})
        update = ft.make_update(loss_fn, optim)
        state, seen = update.init(params), []
        even, odd = (jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0])), (jnp.array([3.0, 1.0]), jnp.array([6.0, 2.0]))
        for batch in (even, odd, even, odd):
            state, metrics = update(state, batch)
            seen.append(float(state.params["w"]))
            assert float(metrics["loss"]) == float(metrics["mse"] + metrics["mae"])
        # Digits of a few float64 operations on numbers of size 1.
        np.testing.assert_allclose(seen, [0.115, 0.427, 0.80145, 1.27831], rtol=1e-14)


def test_the_middle_of_a_window_runs_no_optimizer_and_holds_no_buffer_of_a_frozen_part():
    """optax 5: what `optax.MultiSteps` does."""
    params = linear_params()
    steps = []

    def counted(updates, state, params=None):
        steps.append(1)
        return jax.tree.map(lambda update: -0.1 * update, updates), state

    head = optax.GradientTransformation(lambda params: optax.EmptyState(), counted)
    update = ft.make_update(loss_fn, optimizer_of(params, body=ft.FROZEN, head=head), accumulate=3)
    state, _ = run(update, update.init(params), batches_of(2))
    assert not steps
    assert list(ft.flatten(state.window.grads)) == ["head/head/w"]
    run(update, state, batches_of(1))
    assert steps == [1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_parameters_keep_their_dtypes_and_sum_in_float32(dtype):
    params = linear_params(dtype)
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=2)
    state, _ = run(update, update.init(params), batches_of(3).astype(dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.window)} == {jnp.dtype(jnp.float32)}
    before, after = (jax.tree.map(jax.typeof, s) for s in (update.init(params), state))
    assert (before.params, before.opt_state) == (after.params, after.opt_state)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 3, 6])
def test_microbatches_in_one_call_give_the_result_of_the_whole_batch(microbatches):
    with jax.enable_x64():
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), linear_params())
        batch = (batches_of(1)[0].astype(jnp.float64), jnp.array([1.0, 0, 1, 1, 0, 1]))
        optim = optimizer_of(params)
        whole, sliced = (ft.make_update(token_loss, optim, microbatches=m) for m in (1, microbatches))
        (expected, loss), (state, metrics) = (u(u.init(params), batch) for u in (whole, sliced))
        assert float(metrics["loss"]) == pytest.approx(float(loss["loss"]), rel=1e-14)
        for path, leaf in ft.flatten(state.params).items():
            np.testing.assert_allclose(leaf, ft.flatten(expected.params)[path], rtol=1e-12)


# Scan and pure


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_scan_leaves_the_same_bits_as_one_by_one(accumulate):
    params, batches = linear_params(), batches_of(12)
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=accumulate)
    state, metrics = run(update, update.init(params), batches)
    scanned, stacked = update.scan(update.init(params), batches)
    assert leaves_of(scanned) == leaves_of(state)
    assert stacked["loss"].shape == (12 // accumulate,)
    assert float(stacked["loss"][-1]) == float(metrics["loss"])


def test_scan_goes_on_from_where_a_call_stopped_and_back():
    params, batches = linear_params(), batches_of(6)
    update = ft.make_update(loss_fn, optimizer_of(params))
    mixed, _ = update(update.init(params), batches[0])
    mixed, _ = update.scan(mixed, batches[1:5])
    mixed, _ = update(mixed, batches[5])
    assert leaves_of(mixed) == leaves_of(run(update, update.init(params), batches)[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pure_works_under_ones_own_jit_and_scan(accumulate):
    params, batches = linear_params(), batches_of(4)
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=accumulate)
    inputs = batches if accumulate == 1 else batches.reshape(2, 2, *batches.shape[1:])
    state, metrics = jax.jit(lambda state, xs: jax.lax.scan(update.pure, state, xs))(update.init(params), inputs)
    expected, _ = run(update, update.init(params), batches)
    assert leaves_of(state) == leaves_of(expected)
    assert metrics["loss"].shape == (4 // accumulate,)
    again, _ = run(update, state, batches)
    assert int(again.step) == 2 * int(expected.step)


@pytest.mark.slow
def test_pure_under_vmap_trains_several_seeds_at_once():
    def init(key):
        return jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape), linear_params())

    update = ft.make_update(loss_fn, optimizer_of(linear_params()))
    keys = jax.random.split(jax.random.key(3), 4)
    states = jax.vmap(lambda key: update.init(init(key), key=key))(keys)
    step = jax.jit(jax.vmap(update.pure, in_axes=(0, None)))
    batches = batches_of(3)
    for batch in batches:
        states, metrics = step(states, batch)
    assert metrics["loss"].shape == (4,)
    for i in range(4):
        alone, _ = run(update, update.init(init(keys[i])), batches)
        for path, leaf in ft.flatten(alone.params).items():
            # A batched matrix product may sum in another order: three steps of float32 values of size 1.
            np.testing.assert_allclose(ft.flatten(states.params)[path][i], leaf, atol=1e-5)


# Keys, model state, `after`


def test_the_key_of_a_batch_follows_from_the_runs_key_and_the_batchs_number():
    def loss_fn(params, batch, key):
        return ft.Loss(jnp.sum(params["w"]), metrics={"key": jax.random.key_data(key)})

    params = {"w": jnp.ones(2)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.1)})
    key = jax.random.key(7)
    expected = [jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, i), 0)) for i in range(4)]
    update = ft.make_update(loss_fn, optim)
    state = update.init(params, key=key)
    for i in range(4):
        state, metrics = update(state, None)
        np.testing.assert_array_equal(metrics["key"], expected[i])
    _, metrics = update.scan(update.init(params, key=key), jnp.zeros(4))
    np.testing.assert_array_equal(metrics["key"], expected)


def test_a_microbatch_folds_in_its_index():
    def loss_fn(params, batch, key):
        noise = jax.random.uniform(key)
        return ft.Loss(jnp.sum(params["w"]) * noise, metrics={"noise": noise})

    params = {"w": jnp.ones(2)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.1)})
    key = jax.random.key(7)
    update = ft.make_update(loss_fn, optim, microbatches=2)
    _, metrics = update(update.init(params, key=key), jnp.zeros(4))
    batch_key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    mean = np.mean([float(jax.random.uniform(jax.random.fold_in(batch_key, i))) for i in range(2)])
    assert float(metrics["noise"]) == pytest.approx(mean, rel=1e-6)


def test_the_step_that_a_loss_function_is_given_counts_windows():
    def loss_fn(params, batch, step):
        return ft.Loss(jnp.sum(params["w"]), metrics={"step": step})

    params = {"w": jnp.ones(2)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.1)})
    update = ft.make_update(loss_fn, optim, accumulate=2)
    state, seen = update.init(params), []
    for _ in range(5):
        state, metrics = update(state, None)
        seen.append(int(metrics["step"]))
    assert seen == [0, 0, 1, 1, 2]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.linear(x)))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_flax_nnx_with_batch_norm(accumulate, microbatches):
    graphdef, params, stats = nnx.split(Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def loss_fn(params, batch, model_state):
        model = nnx.merge(graphdef, params, model_state)
        return ft.Loss(jnp.mean((model(batch) - 1) ** 2), model_state=nnx.state(model, nnx.BatchStat))

    parts = ft.partition(params, {"head": "head", "rest": ...})
    optim = ft.Optimizer(parts, {"head": optax.adam(1e-2), "rest": optax.sgd(0.1)})
    update = ft.make_update(loss_fn, optim, accumulate=accumulate, microbatches=microbatches)
    state = update.init(params, model_state=stats)
    losses = []
    for batch in [batches_of(1)[0]] * 8:
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert type(state.params) is type(params)
    assert jax.tree.structure(state.model_state) == jax.tree.structure(stats)
    assert not jnp.array_equal(ft.flatten(state.model_state)["norm/mean"], ft.flatten(stats)["norm/mean"])


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"microbatches": 2}, {"nonfinite": "skip"}])
def test_flax_nnx_with_dropout_whose_random_keys_are_model_state(options):
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 1, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.linear(self.dropout(x))

    graphdef, params, streams = nnx.split(Dropping(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, batch, model_state):
        model = nnx.merge(graphdef, params, model_state)
        return ft.Loss(jnp.mean(model(batch) ** 2), model_state=nnx.state(model, nnx.Not(nnx.Param)))

    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.0)})
    update = ft.make_update(loss_fn, optim, **options)
    state, losses = update.init(params, model_state=streams), []
    for _ in range(3):
        state, metrics = update(state, jnp.ones((6, 4)))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    assert int(ft.flatten(state.model_state)["dropout/rngs/count"]) == 3 * options.get("microbatches", 1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_moving_average_by_after_is_exact(accumulate):
    def average(params, model_state, step):
        decay = jnp.minimum(0.9, step / (step + 9.0))
        return params, jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, model_state, params)

    params = linear_params()
    optim = optimizer_of(params)
    update = ft.make_update(loss_fn, optim, after=average, accumulate=accumulate)
    plain = ft.make_update(loss_fn, optim, accumulate=accumulate)
    state, by_hand = update.init(params, model_state=params), plain.init(params)
    expected = params
    for i, batch in enumerate(batches_of(6)):
        state, _ = update(state, batch)
        by_hand, _ = plain(by_hand, batch)
        if (i + 1) % accumulate == 0:
            _, expected = jax.jit(average)(by_hand.params, expected, by_hand.step)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, state.params, by_hand.params))
        # The average is fused with the update here and is not there: the last bit of float32.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7), state.model_state, expected)


def test_a_target_network_by_after_is_exact_and_may_start_as_its_source():
    critic = {"w": jnp.ones((4, 1))}
    params = {"critic": critic, "target": critic}

    def loss_fn(params, batch):
        target = batch[1:] @ params["target"]["w"] + 1.0
        return jnp.mean((batch[:-1] @ params["critic"]["w"] - target) ** 2)

    def copy_every_other(params, model_state, step):
        target = jax.tree.map(lambda t, c: jnp.where(step % 2 == 0, c, t), params["target"], params["critic"])
        return params | {"target": target}, model_state

    parts = ft.partition(params, {"critic": "critic", "target": "target"})
    optim = ft.Optimizer(parts, {"critic": optax.sgd(0.1), "target": ft.FROZEN})
    update = ft.make_update(loss_fn, optim, after=copy_every_other)
    for copy in (True, False):
        state = update.init(jax.tree.map(jnp.array, params) if copy else params, copy=copy)
        critics = []
        for batch in batches_of(5):
            state, _ = update(state, batch)
            critics.append(np.asarray(state.params["critic"]["w"]))
            expected = critics[len(critics) // 2 * 2 - 1] if len(critics) > 1 else np.ones((4, 1))
            np.testing.assert_array_equal(state.params["target"]["w"], expected)


def test_a_rate_given_at_a_call_is_for_that_step_alone_and_compiles_once():
    params = {"w": jnp.float32(0.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": ft.with_lr(optax.sgd, 1.0)})
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return params["w"] * batch

    update = ft.make_update(loss_fn, optim)
    state, seen = update.init(params), []
    for lr in (None, {"w": 0.5}, {"w": jnp.float32(0.25)}, None, {"w": np.float32(2)}, {"w": 4}):
        state, _ = update(state, jnp.float32(1.0), lr=lr)
        seen.append(float(state.params["w"]))
    assert seen == [-1.0, -1.5, -1.75, -2.75, -4.75, -8.75]
    assert len(traces) <= 4  # None; a float; a float32; an int. Never one for a value.
    count = len(traces)
    state, _ = update(state, jnp.float32(1.0), lr={"w": 0.125})
    assert len(traces) == count


def test_the_loss_reaches_transforms_that_take_a_value():
    params = {"w": jnp.float32(1.0)}
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1))
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": tx})
    update = ft.make_update(lambda params, batch: 0 * params["w"] + batch, optim)
    state, _ = run(update, update.init(params), [jnp.float32(1.0)] * 4)
    expected = tx.init(params)
    for _ in range(4):
        _, expected = tx.update({"w": jnp.float32(0.0)}, expected, params, value=1.0)
    assert float(state.opt_state["w"][-1].scale) == float(expected[-1].scale) < 1


# Counters past 32 bits


def from_step(state, number):
    """The same state, after so many steps and batches."""
    counters = {name: np.asarray(number, np.int64) for name in ("step", "batches")}
    return dataclasses.replace(state, **counters)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", ["call", "scan"])
def test_counters_go_on_past_32_bits(way, accumulate):
    """The loss function and `after` see the last step that 32 bits hold; a batch has a key of its own."""
    params, seen = linear_params(), []

    def noisy(params, batch, key, step):
        noise = jax.random.normal(key, ())
        return ft.Loss(loss_fn(params, batch) * (1 + 0 * noise), metrics={"noise": noise, "step": step})

    def after(params, model_state, step):
        jax.debug.callback(seen.append, step, ordered=True)
        return params, model_state

    update = ft.make_update(noisy, optimizer_of(params), accumulate=accumulate, after=after)
    first = 2**31 - 3
    state = from_step(update.init(params, key=jax.random.key(0)), first)
    batches, found = batches_of(6 * accumulate), []
    if way == "scan":
        state, found = update.scan(state, batches)
        noise, steps = found["noise"], found["step"]
    else:
        for batch in batches:
            state, metrics = update(state, batch)
            if not int(state.pending):
                found.append(metrics)
        noise, steps = ([float(each[name]) for each in found] for name in ("noise", "step"))
    jax.effects_barrier()
    assert (int(state.step), int(state.batches)) == (first + 6, first + 6 * accumulate)
    assert {counter.dtype for counter in (state.step, state.batches, state.pending)} == {np.dtype(np.int64)}
    assert len({float(each) for each in noise}) == 6
    last = 2**31 - 1
    assert [int(step) for step in seen] == [first + 1, *[last] * 5]
    if accumulate == 1:
        assert [int(np.float32(step)) for step in steps] == [
            int(np.float32(each)) for each in (first, first + 1, *[last] * 4)
        ]


def test_counters_of_another_size_compile_nothing_and_change_no_bit():
    """As of a state that a program of one's own gave back, or that was saved when counters had 32 bits."""
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params))
    states, sizes = [], []
    for dtype in (np.int64, np.int32, jnp.int32):
        counters = {name: dtype(0) for name in ("step", "batches", "pending")}
        state = dataclasses.replace(update.init(params), **counters)
        for batch in batches_of(3):
            state, _ = update(state, batch)
        states.append(leaves_of(state))
        (program,) = update._programs.kept.values()
        sizes.append(program.jitted._cache_size())
    assert states[0] == states[1] == states[2]
    assert sizes == [1, 1, 1]


def test_a_weight_that_is_known_when_traced_is_no_output_of_the_program():
    """An output costs at each call."""
    params, (batch,) = linear_params(), batches_of(1)

    def outputs(weight):
        def weighted(params, batch):
            return ft.Loss(loss_fn(params, batch), weight=weight(batch))

        update = ft.make_update(weighted, optimizer_of(params))
        return len(jax.tree.leaves(update.lower(update.init(params), batch).out_info))

    known, computed = outputs(len), outputs(lambda batch: jnp.sum(batch != 0))
    assert computed == known + 1
