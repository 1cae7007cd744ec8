"""What an update does with its state: donation, layout, compilation, copies."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import batches_of, leaves_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")

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
    consumed = consumed_leaves(state)
    new, _ = update(state, batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in consumed)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, stats)))
    run(update, new, batches_of(2))


def test_the_middle_of_a_window_consumes_the_window_and_leaves_the_params():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=3)
    first, _ = update(update.init(params), batches_of(1)[0])
    second, _ = update(first, batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.window))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((first.params, first.opt_state)))
    consumed = consumed_leaves(second)
    last, _ = update(second, batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in consumed)
    assert last.window is None


def test_what_is_frozen_stays_where_it_is():
    params = linear_params()
    name, *others = params
    parts = ft.partition(params, {"frozen": name, "rest": ...})
    update = ft.make_update(loss_fn, ft.Optimizer(parts, {"frozen": ft.FROZEN, "rest": optax.adam(0.1)}))
    state = update.init(params)
    before = state.params
    new, _ = update(state, batches_of(1)[0])
    assert others
    assert all(a is b for a, b in zip(*(jax.tree.leaves(p[name]) for p in (before, new.params)), strict=True))
    assert all(leaf.is_deleted() for other in others for leaf in jax.tree.leaves(before[other]))


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_deep_copy_of_a_state_has_the_types_of_its_fields_and_buffers_of_its_own():
    from flax import nnx

    graphdef, params = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    update = ft.make_update(lambda params, x: jnp.mean(nnx.merge(graphdef, params)(x) ** 2), optim)
    state = update.init(params)
    kept, structure = copy.deepcopy(state), jax.tree.structure(state)
    update(state, jnp.ones((3, 2)))
    assert jax.tree.structure(kept) == structure
    update(kept, jnp.ones((3, 2)))
