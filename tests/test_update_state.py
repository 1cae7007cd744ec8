"""What an update does with its state: donation, layout, compilation, skipped updates, precision, errors."""

import copy
import dataclasses
import pickle
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_update import batches_of, leaves_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft


@pytest.fixture(autouse=True)
def no_donation_is_lost():
    """JAX warns where a donated buffer can't be used: then a copy is made that nobody asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        yield


# Donation


def consumed_leaves(state):
    """What a step replaces, but for the rate last used, which is written and never read: no program is given it."""
    flat = ft.flatten((state.params, state.opt_state, state.model_state))
    return [leaf for path, leaf in flat.items() if not path.endswith("learning_rate")]


def test_what_a_call_consumes_is_deleted_and_the_users_arrays_never():
    params, stats = linear_params(), {"seen": jnp.zeros(())}

    def counting(params, batch, model_state):
        return ft.Loss(loss_fn(params, batch), model_state={"seen": model_state["seen"] + 1})

    update = ft.make_update(counting, optimizer_of(params))
    state = update.init(params, model_state=stats)
    new, _ = update(state, batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in consumed_leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, stats)))
    run(update, new, batches_of(2))


def test_the_middle_of_a_window_consumes_the_window_and_leaves_the_params():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=3)
    first, _ = update(update.init(params), batches_of(1)[0])
    second, _ = update(first, batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.window))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((first.params, first.opt_state)))
    last, _ = update(second, batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in consumed_leaves(second))
    assert last.window is None


def test_what_is_frozen_stays_where_it_is():
    params = linear_params()
    name, *others = params
    parts = ft.partition(params, {"frozen": name, "rest": ...})
    update = ft.make_update(loss_fn, ft.Optimizer(parts, {"frozen": ft.FROZEN, "rest": optax.adam(0.1)}))
    state = update.init(params)
    new, _ = update(state, batches_of(1)[0])
    assert others
    assert all(a is b for a, b in zip(*(jax.tree.leaves(s.params[name]) for s in (state, new)), strict=True))
    assert all(leaf.is_deleted() for other in others for leaf in jax.tree.leaves(state.params[other]))


def test_params_that_are_handed_over_are_consumed():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params))
    update(update.init(params, copy=False), batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("copy", [True, False])
def test_optimizer_states_that_hold_the_params_themselves_are_separated(copy):
    params = linear_params()
    averaging = optax.contrib.schedule_free_sgd(0.1)  # Its state starts as the very arrays of the params.
    update = ft.make_update(loss_fn, optimizer_of(params, body=averaging))
    state, _ = run(update, update.init(params, copy=copy), batches_of(3))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_numpy_params_become_arrays_and_are_not_written_to():
    params = jax.tree.map(np.array, linear_params())
    before = jax.tree.map(np.copy, params)
    update = ft.make_update(loss_fn, optimizer_of(params))
    state, _ = run(update, update.init(params, copy=False), batches_of(2))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, before))


# Compilation and layout


def sharded_params(mesh):
    shardings = {"body": {"w": jax.NamedSharding(mesh, jax.P("data"))}, "head": {"w": jax.NamedSharding(mesh, jax.P())}}
    keys = jax.random.split(jax.random.key(0))
    params = {"body": {"w": jax.random.normal(keys[0], (8, 4))}, "head": {"w": jax.random.normal(keys[1], (4, 1))}}
    return jax.tree.map(jax.device_put, params, shardings)


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def wide_batches(count):
    return jax.random.normal(jax.random.key(1), (count, 16, 8))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("accumulate", "programs"), [(1, 1), (2, 2), (4, 3)])
def test_nothing_recompiles_after_the_first_window(mesh, sharded, accumulate, programs):
    traces = []

    def counted(params, batch, key, step, model_state):
        traces.append(1)
        return ft.Loss(loss_fn(params, batch), model_state={"seen": model_state["seen"] + 1.0})

    params = sharded_params(mesh)
    if not sharded:
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    update = ft.make_update(counted, optimizer_of(params), accumulate=accumulate)
    state = update.init(params, key=jax.random.key(0), model_state={"seen": jnp.zeros(())})
    with jax.log_compiles(False):
        for i, batch in enumerate(wide_batches(4 * accumulate)):
            state, _ = update(state, batch)
            if i == accumulate - 1:
                after_first = len(traces)
                sizes = [program.jitted._cache_size() for program in update._programs.kept.values()]
    assert after_first == programs == len(update._programs.kept)
    assert len(traces) == after_first
    assert [program.jitted._cache_size() for program in update._programs.kept.values()] == sizes == [1] * programs


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_leaf_keeps_its_sharding_through_first_middle_last_and_scan(mesh, accumulate):
    params = sharded_params(mesh)
    update = ft.make_update(
        loss_fn, optimizer_of(params, body=optax.adafactor(1e-2, min_dim_size_to_factor=2)), accumulate=accumulate
    )
    state = update.init(params, key=jax.random.key(0))
    layout = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state, state.key))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves((state.params, state.opt_state, state.key)))

    def kept(state):
        now = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state, state.key))
        return jax.tree.leaves(now) == jax.tree.leaves(layout)

    for batch in wide_batches(2 * accumulate - 1):
        state, _ = update(state, batch)
        assert kept(state)
        if state.window is not None:
            sums = state.window.grads
            assert sums["body"]["body/w"].sharding == params["body"]["w"].sharding
            assert sums["head"]["head/w"].sharding == params["head"]["w"].sharding
    if state.window is not None:
        state, _ = update.flush(state)
        assert kept(state)
    state, _ = update.scan(state, wide_batches(2 * accumulate))
    assert kept(state)


def test_one_update_serves_states_of_several_layouts(mesh):
    params = sharded_params(mesh)
    local = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    update = ft.make_update(loss_fn, optimizer_of(params))
    a, b = update.init(params), update.init(local)
    for batch in wide_batches(2):
        (a, _), (b, _) = update(a, batch), update(b, batch)
    assert a.params["body"]["w"].sharding == params["body"]["w"].sharding
    assert len(b.params["body"]["w"].sharding.device_set) == 1
    moved = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P())), b)
    moved, _ = update(moved, wide_batches(1)[0])
    assert moved.params["body"]["w"].sharding.is_fully_replicated
    assert len(moved.params["body"]["w"].sharding.device_set) == 8


@pytest.mark.parametrize("sharded", [False, True])
def test_abstract_is_what_init_returns(mesh, sharded):
    params = sharded_params(mesh) if sharded else linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params), loss_scale=ft.DynamicScale())
    key, stats = jax.random.key(0), {"seen": jnp.zeros(3)}
    state = update.init(params, key=key, model_state=stats)
    abstract = update.abstract(params, key=key, model_state=stats)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        if sharded and isinstance(leaf, jax.Array):
            assert shape.sharding == leaf.sharding
    from_shapes = update.abstract(
        jax.eval_shape(lambda: linear_params()) if not sharded else params, key=key, model_state=stats
    )
    assert jax.tree.leaves(from_shapes) == jax.tree.leaves(abstract)


def test_a_pending_window_survives_pickling():
    params, batches = linear_params(), batches_of(6)

    def noisy(params, batch, key):
        return loss_fn(params, batch + jax.random.normal(key, batch.shape))

    update = ft.make_update(noisy, optimizer_of(params), accumulate=3)
    state, _ = run(update, update.init(params, key=jax.random.key(5)), batches[:2])
    restored = pickle.loads(pickle.dumps(state))
    restored = jax.tree.map(lambda leaf: leaf if isinstance(leaf, np.generic) else jnp.asarray(leaf), restored)
    resumed, _ = run(ft.make_update(noisy, optimizer_of(params), accumulate=3), restored, batches[2:])
    assert leaves_of(resumed) == leaves_of(run(update, state, batches[2:])[0])


# Telemetry


@pytest.mark.parametrize("accumulate", [1, 2])
def test_measured_is_the_same_update_with_telemetry_by_part(accumulate):
    params, batches = linear_params(), batches_of(accumulate)
    optim = optimizer_of(params)
    update = ft.make_update(loss_fn, optim, accumulate=accumulate)
    state, metrics = update.init(params), {}
    for batch in batches:
        state, metrics = update.measured(state, batch)
    plain, _ = run(update, update.init(params), batches)
    # A program of its own may fuse otherwise: float32's last bit, which Adam's first step does not magnify.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, plain.params)
    grads = jax.tree.map(lambda *g: sum(g) / len(g), *[jax.grad(loss_fn)(params, batch) for batch in batches])
    for part in ("body", "head"):
        telemetry = metrics["parts"][part]
        change = float(jnp.linalg.norm(state.params[part]["w"] - params[part]["w"]))
        norm = float(jnp.linalg.norm(params[part]["w"]))
        assert float(telemetry["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(grads[part]["w"])), rel=1e-5)
        assert float(telemetry["param_norm"]) == pytest.approx(norm, rel=1e-6)
        assert float(telemetry["update_norm"]) == pytest.approx(change, rel=1e-4)
        assert float(telemetry["update_ratio"]) == pytest.approx(change / norm, rel=1e-4)
    assert float(metrics["parts"]["head"]["learning_rate"]) == np.float32(0.1)
    assert "learning_rate" not in metrics["parts"]["body"]


def test_a_part_that_is_all_zero_has_a_ratio_of_zero():
    params = jax.tree.map(jnp.zeros_like, linear_params())
    update = ft.make_update(lambda p, b: jnp.sum(p["body"]["w"] + p["head"]["w"][0]), optimizer_of(params))
    _, metrics = update.measured(update.init(params), None)
    assert float(metrics["parts"]["body"]["update_ratio"]) == 0.0


# Non-finite gradients


def poisoned(params, batch, model_state):
    x, poison = batch
    value = jnp.mean((x @ params["body"]["w"] @ params["head"]["w"]) ** 2) + 0 * jnp.sum(params["head"]["w"])
    value = value + jnp.sum(jnp.where(poison, jnp.nan, 0.0) * params["head"]["w"])
    return ft.Loss(value, model_state={"mean": 0.5 * model_state["mean"] + jnp.where(poison, jnp.nan, 1.0)})


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_skipped_update_leaves_every_other_bit_as_it_was_and_names_the_part(accumulate):
    params = linear_params()
    update = ft.make_update(
        poisoned, optimizer_of(params), accumulate=accumulate, nonfinite="skip",
        after=lambda params, model_state, step: (params, model_state | {"mean": model_state["mean"] + 100}),
    )  # fmt: skip
    state = update.init(params, model_state={"mean": jnp.zeros(())})
    good = [(x, False) for x in batches_of(accumulate)]
    state, metrics = run(update, state, good)
    assert int(metrics["skipped"]) == 0
    before = leaves_of(state)
    bad = [(x, i == len(good) - 1) for i, (x, _) in enumerate(good)]
    state, metrics = run(update, state, bad)
    assert int(metrics["skipped"]) == 1
    assert {part: bool(flag) for part, flag in metrics["nonfinite"].items()} == {"body": False, "head": True}
    changed = {path for path, leaf in leaves_of(state).items() if leaf != before[path]}
    # The good batches of the window count in the model state; the poisoned one does not.
    assert changed == {"step", "batches"} | ({"model/mean"} if accumulate > 1 else set())
    assert np.isfinite(float(state.model_state["mean"]))
    state, metrics = run(update, state, good)
    assert int(metrics["skipped"]) == 0
    assert int(state.step) == 3


def test_a_poisoned_batch_in_the_middle_spoils_its_window_alone():
    params = linear_params()
    update = ft.make_update(poisoned, optimizer_of(params), accumulate=3, nonfinite="skip")
    state = update.init(params, model_state={"mean": jnp.zeros(())})
    state, metrics = run(update, state, [(x, i == 0) for i, x in enumerate(batches_of(3))])
    assert int(metrics["skipped"]) == 1
    assert float(state.model_state["mean"]) == 1.5  # Of the second and third batch.
    state, metrics = run(update, state, [(x, False) for x in batches_of(3)])
    assert int(metrics["skipped"]) == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_scan_skips_alike():
    params = linear_params()
    update = ft.make_update(poisoned, optimizer_of(params), nonfinite="skip")
    stats = {"mean": jnp.zeros(())}
    batches = (batches_of(4), jnp.array([False, True, False, True]))
    state, metrics = update.scan(update.init(params, model_state=stats), batches)
    one_by_one, _ = run(
        update, update.init(params, model_state=stats), [(batches[0][i], batches[1][i]) for i in range(4)]
    )
    assert leaves_of(state) == leaves_of(one_by_one)
    assert metrics["skipped"].tolist() == [0, 1, 0, 1]


def test_raise_adds_nothing_to_the_program():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params))
    assert "is_finite" not in str(jax.make_jaxpr(update.pure)(update.init(params), batches_of(1)[0]))
    _, metrics = update(update.init(params), jnp.full((6, 4), jnp.nan))
    assert np.isnan(float(metrics["loss"]))


# Precision


@pytest.mark.parametrize("compute_dtype", [jnp.bfloat16, {"body": jnp.bfloat16}])
def test_parameters_are_cast_for_the_loss_alone(compute_dtype):
    params = linear_params()
    seen = {}

    def dtypes(params, batch):
        seen.update({path: leaf.dtype for path, leaf in ft.flatten(params).items()})
        return loss_fn(params, batch).astype(jnp.float32)

    update = ft.make_update(dtypes, optimizer_of(params), compute_dtype=compute_dtype, accumulate=2)
    state, _ = run(update, update.init(params), batches_of(3))
    head = jnp.float32 if isinstance(compute_dtype, dict) else jnp.bfloat16
    assert seen == {"body/w": jnp.bfloat16, "head/w": head}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.window))} == {jnp.dtype(jnp.float32)}
    exact = ft.make_update(loss_fn, optimizer_of(params), accumulate=2)
    expected, _ = run(exact, exact.init(params), batches_of(3))
    # bfloat16 has 8 bits: gradients of size 1 are off by some 2^-8, and the rate is 0.1.
    np.testing.assert_allclose(state.params["head"]["w"], expected.params["head"]["w"], atol=0.1 * 2**-6)
    assert not jnp.array_equal(state.params["head"]["w"], expected.params["head"]["w"])


def test_a_dynamic_scale_rescues_gradients_that_float16_would_lose():
    params = {"w": jnp.float32(1.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(1.0)})

    def tiny(params, batch):
        # The gradient of the float16 product is 2^-26, which float16 rounds to zero.
        return (params["w"] * batch[0] * batch[1]).astype(jnp.float32)

    for scale, expected in ((None, 0.0), (ft.DynamicScale(initial=2.0**12), 2.0**-26)):
        update = ft.make_update(tiny, optim, compute_dtype=jnp.float16, loss_scale=scale)
        _, metrics = update.measured(update.init(params), jnp.full(2, 2.0**-13, jnp.float16))
        assert float(metrics["parts"]["w"]["grad_norm"]) == expected


def test_a_dynamic_scale_halves_on_overflow_and_doubles_after_a_row_of_good_updates():
    params = {"w": jnp.float32(1.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.0)})
    update = ft.make_update(
        lambda params, batch: (params["w"] * batch).astype(jnp.float32), optim,
        compute_dtype=jnp.float16, loss_scale=ft.DynamicScale(initial=2.0**14, period=2),
    )  # fmt: skip
    state, seen = update.init(params), []
    for x in (1.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0):  # 2^15 * 4 and 2^14 * 4 are more than float16's 65504.
        state, metrics = update(state, jnp.float16(x))
        seen.append((int(np.log2(metrics["loss_scale"])), int(metrics["skipped"])))
        assert float(metrics["loss"]) == x
    assert seen == [(14, 0), (14, 0), (15, 0), (15, 1), (14, 1), (13, 0), (13, 0)]
    assert float(state.scale_state.scale) == 2.0**14


def test_a_scale_never_falls_below_its_minimum_nor_overflows_itself():
    scale = ft.DynamicScale(initial=2.0, period=1, minimum=1.0)
    state = scale.init()
    for expected in (1.0, 1.0):
        state = scale.adjusted(state, jnp.array(False))
        assert float(state.scale) == expected
    state = ft.DynamicScale(initial=2.0**127, period=1).init()
    assert float(scale.adjusted(state, jnp.array(True)).scale) == 2.0**127


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0: give a whole number of at least 1"),
        ({"microbatches": 1.5}, "microbatches=1.5: give a whole number"),
        ({"remainder": "keep"}, "remainder='keep': write 'flush', 'drop' or 'carry'"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore': write 'raise' or 'skip'"),
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


def test_a_leaf_that_is_no_array_is_an_error_that_says_how_to_split_it_off():
    params = linear_params() | {"activation": jnp.tanh}
    parts = ft.partition(params, {"body": "body", "head": "head", "static": ft.non_float})
    optim = ft.Optimizer(parts, {"body": optax.sgd(0.1), "head": optax.sgd(0.1), "static": ft.FROZEN})
    with pytest.raises(ft.UpdateError, match=r"params hold 'activation', which is no array: .* eqx.partition"):
        ft.make_update(loss_fn, optim).init(params)


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


def test_a_deep_copy_of_a_state_has_the_types_of_its_fields_and_buffers_of_its_own():
    from flax import nnx

    graphdef, params = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    update = ft.make_update(lambda params, x: jnp.mean(nnx.merge(graphdef, params)(x) ** 2), optim)
    state = update.init(params)
    kept = copy.deepcopy(state)
    update(state, jnp.ones((3, 2)))
    assert jax.tree.structure(kept) == jax.tree.structure(state)
    update(kept, jnp.ones((3, 2)))


def test_a_set_of_losses_that_changes_between_calls_is_an_error():
    def changing(params, batch):
        return ft.Loss({"main": jnp.sum(params["a"])} | ({"aux": params["b"]} if batch.shape[0] > 2 else {}))

    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    update = ft.make_update(changing, optimizer_of(params), audit=False)
    state, _ = update(update.init(params), jnp.ones(4))
    with pytest.raises(ft.LossError, match="returned the losses 'main', and before 'aux', 'main': return"):
        update(state, jnp.ones(2))
