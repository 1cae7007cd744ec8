"""What an update does over eight devices that no step for one device does: slices that stay, sums by shard."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from soak import some

import functrain as ft
from functrain.update.placing import with_window_in_place

AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def params():
    return {"body": jax.random.normal(jax.random.key(0), (8, 16)) / 4, "head": jnp.ones((16, 8))}


def loss_fn(params, batch):
    made = jnp.tanh(batch["x"] @ params["body"]) @ params["head"]
    weight = batch["weight"]
    return ft.Loss(jnp.sum(weight[:, None] * (made - batch["y"]) ** 2) / weight.sum(), weight=weight.sum())


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, rows, 8)).astype(np.float32)
    return {"x": x, "y": y, "weight": rng.integers(1, 4, rows).astype(np.float32)}


RULES = {
    "data parallel": ({...: P()}, {}),
    "zero": ({...: P()}, {"zero": "data"}),
    "fsdp": ({...: ft.largest("data")}, {}),
    "tensor": ({"body": P(None, "model"), "head": P("model")}, {}),
}


def update_over(axis_type=AxisType.Auto, rules="data parallel", loss=loss_fn, data=4, model=2, **options):
    """An update over a mesh, and its layout."""
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(axis_type,) * 2)
    by_path, more = RULES[rules]
    layout = ft.layout(params(), mesh, by_path, batch=P("data"), **more)
    optim = ft.Optimizer(ft.partition(params(), {"all": ...}), {"all": optax.sgd(0.01, 0.9)}, layout=layout)
    return ft.make_update(loss, optim, **options), layout


def by_one(batches, **options):
    """The params and metrics that one device comes to."""
    optim = ft.Optimizer(ft.partition(params(), {"all": ...}), {"all": optax.sgd(0.01, 0.9)})
    update = ft.make_update(loss_fn, optim, **options)
    state = update.init(params())
    for batch in batches:
        state, metrics = update(state, batch)
    return state.params, metrics


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # Sums of float32 in another order.


def collectives(update, batch):
    text = update.lower(update.abstract(params()), batch).compile().as_text()
    return re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)\(", text)


# Slices of a batch.


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("count", [2, 4])
def test_no_row_of_a_microbatch_leaves_its_device(axis_type, count):
    update, layout = update_over(axis_type, microbatches=count)
    batch = layout.batch(batch_of(16))
    assert {*collectives(update, batch)} == {"all-reduce"}  # Of gradients, sums and weights alone.
    state, metrics = update(update.init(params()), batch)
    whole, found = by_one([batch_of(16)])
    assert_close((state.params, metrics), (whole, found))


@pytest.mark.parametrize("count", [8, 16])
def test_a_count_that_leaves_devices_idle_is_refused_with_those_that_would_do(count):
    update, layout = update_over(microbatches=count)
    message = (
        rf"microbatches={count}: the 16 rows of a batch are cut over 'data' of 4, and the 4 that each device holds are"
        rf" no multiple of {count}, .*: write one of 1, 2, 4, or give batches of a multiple of {4 * count} rows"
    )
    with pytest.raises(ft.UpdateError, match=message):
        update(update.init(params()), layout.batch(batch_of(16)))


# One reduction a window.

WINDOWS = [{"accumulate": 3}, {"microbatches": 2}, {"accumulate": 3, "microbatches": 2}]


# On explicit axes a loss says itself how products of cut dimensions lie.
REDUCED = [
    *itertools.product([AxisType.Auto], RULES, WINDOWS),
    *itertools.product([AxisType.Explicit], ["data parallel", "zero"], WINDOWS),
]


@pytest.mark.parametrize(("axis_type", "rules", "options"), some(REDUCED, 2))
def test_a_window_that_reduces_once_steps_as_one_device_does(axis_type, rules, options):
    update, layout = update_over(axis_type, rules, reduce="window", **options)
    batches = [batch_of(16, seed) for seed in range(6)]
    state = update.init(params())
    for batch in batches:
        state, metrics = update(state, layout.batch(batch))
    assert_close((state.params, metrics), by_one(batches, **options))
    places = jax.tree.map(lambda leaf: leaf.sharding, update.init(params()).params)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == places


def reduced(compiled):
    """The shapes that a program reduces over devices, a list for each collective."""
    found = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)\(", compiled.as_text())
    return [re.findall(r"\[([\d,]*)\]", shapes) for shapes in found]


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_a_weight_a_metric_and_a_gradient_that_are_constants_are_those_of_each_shard(axis_type):
    def of_body(params, batch):
        return ft.Loss(jnp.mean(batch["x"] @ params["body"]) + 0 * params["head"].sum(), metrics={"one": 1.0})

    update, layout = update_over(axis_type, loss=of_body, accumulate=2, reduce="window")
    state = update.init(params())
    for seed in range(2):
        state, metrics = update(state, layout.batch(batch_of(16, seed)))
    assert float(metrics["one"]) == 1
    np.testing.assert_array_equal(state.params["head"], params()["head"])


@pytest.mark.parametrize("reduce", ["batch", "window"])
def test_gradients_are_reduced_once_a_window(reduce):
    update, layout = update_over(accumulate=3, reduce=reduce)
    state, batch = update.init(params()), layout.batch(batch_of(16))
    matrices = []
    for _ in range(3):
        shapes = reduced(update.lower(state, batch).compile())
        matrices.append([shape for of_one in shapes for shape in of_one if "," in shape])
        state, _ = update(state, batch)
    each = ["16,8", "8,16"]
    assert [*map(sorted, matrices)] == ([each, each, each] if reduce == "batch" else [[], [], each])


def test_slices_of_a_batch_are_reduced_once_and_scans_once_a_window():
    update, layout = update_over(microbatches=4, reduce="window")
    shapes = reduced(update.lower(update.init(params()), layout.batch(batch_of(16))).compile())
    assert sorted(shape for of_one in shapes for shape in of_one if "," in shape) == ["16,8", "8,16"]
    update, layout = update_over(accumulate=3, reduce="window")
    batches = [batch_of(16, seed) for seed in range(6)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    state, _ = update.scan(update.init(params()), stacked)
    assert_close(state.params, by_one(batches, accumulate=3)[0])


def test_each_shard_has_a_key_of_its_own():
    def drawing(params, batch, key):
        drawn = jax.random.uniform(key)
        return ft.Loss(loss_fn(params, batch).value, weight=1, metrics={"first": drawn})

    key = jax.random.key(3)
    update, layout = update_over(loss=drawing, accumulate=2, reduce="window")
    _, metrics = update(update.init(params(), key=key), layout.batch(batch_of(16)))
    of_batch = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    expected = np.mean([jax.random.uniform(jax.random.fold_in(of_batch, shard)) for shard in range(4)])
    np.testing.assert_allclose(metrics["first"], expected, rtol=1e-6)


def test_a_step_is_skipped_where_one_shard_is_not_finite():
    update, layout = update_over(accumulate=2, reduce="window", nonfinite="skip")
    bad = batch_of(16)
    bad["x"][-1, 0] = np.nan
    state = update.init(params())
    for batch in (batch_of(16), bad):
        state, metrics = update(state, layout.batch(batch))
    assert int(metrics["skipped"]) == 1
    assert_close(state.params, params())


def test_a_loss_that_changes_the_model_state_is_refused():
    def counting(params, batch, model_state):
        return ft.Loss(loss_fn(params, batch).value, model_state={"seen": model_state["seen"] + 1})

    update, layout = update_over(loss=counting, accumulate=2, reduce="window")
    state = update.init(params(), model_state={"seen": jnp.zeros(())})
    with pytest.raises(ft.LossError, match=r"exclude each other, .* another one: write reduce='batch', or use layers"):
        update(state, layout.batch(batch_of(16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "step"}, "reduce='step': write 'batch' or 'window'"),
        ({"reduce": "window"}, "a window of one batch is reduced once anyway: give accumulate= or microbatches= more"),
    ],
    ids=["word", "one batch"],
)
def test_what_can_not_be_reduced_once_a_window_is_refused(options, message):
    with pytest.raises(ft.UpdateError, match=message):
        update_over(**options)


def test_without_a_layout_there_are_no_shards():
    optim = ft.Optimizer(ft.partition(params(), {"all": ...}), {"all": optax.sgd(0.1)})
    with pytest.raises(ft.UpdateError, match=r"no layout that cuts batches: ft.Optimizer\(..., layout=ft.layout\("):
        ft.make_update(loss_fn, optim, accumulate=2, reduce="window")


def test_rows_that_are_cut_in_two_ways_are_refused():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    batch = {"x": P("data"), "y": P("model"), "weight": P("data")}
    layout = ft.layout(params(), mesh, {...: P()}, batch=batch)
    optim = ft.Optimizer(ft.partition(params(), {"all": ...}), {"all": optax.sgd(0.1)}, layout=layout)
    update = ft.make_update(loss_fn, optim, accumulate=2, reduce="window")
    with pytest.raises(ft.UpdateError, match=r"cut over 'model', those of another over 'data': cut all alike"):
        update(update.init(params()), layout.batch(batch_of(16)))


def test_what_is_compiled_before_serves_the_calls():
    compiled = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration" and "functrain_" in details["fun_name"]:
            compiled.append(details["fun_name"])

    update, layout = update_over(accumulate=3, reduce="window")
    state, batch = update.init(params()), layout.batch(batch_of(16))
    update.compile(state, batch)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(6):
            state, _ = update(state, batch)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


# A pending window, in a checkpoint.


def restored(update, folder):
    checkpoints = ft.Checkpoints(folder)
    found = checkpoints.restore(like=update.abstract(params())).state
    checkpoints.close()
    return with_window_in_place(update.options, found)  # As `fit` does.


def test_a_pending_window_goes_on_from_a_checkpoint_with_the_same_bits_and_on_other_meshes(tmp_path):
    batches = [batch_of(16, seed) for seed in range(3)]
    options = {"accumulate": 3, "reduce": "window"}

    def after(update, layout, state, batches):
        for batch in batches:
            state, _ = update(state, layout.batch(batch))
        return state

    update, layout = update_over(**options)
    begun = after(update, layout, update.init(params()), batches[:2])
    checkpoints = ft.Checkpoints(tmp_path)
    checkpoints.save(begun)
    checkpoints.close()
    ended = after(update, layout, begun, batches[2:])
    again = after(update, layout, restored(update, tmp_path), batches[2:])
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(ended), strict=True):
        np.testing.assert_array_equal(one, other)
    others = [
        update_over(data=8, model=1, **options),
        update_over(data=2, model=1, **options),
        update_over(data=2, model=4, rules="tensor", **options),
        update_over(accumulate=3),
    ]
    for update, layout in others:
        state = after(update, layout, restored(update, tmp_path), batches[2:])
        assert_close(state.params, ended.params)
        flushed, _ = update.flush(restored(update, tmp_path))
        assert int(flushed.step) == 1


def test_a_window_that_was_begun_without_shards_goes_on_with_them():
    batches = [batch_of(16, seed) for seed in range(3)]
    update, layout = update_over(accumulate=3)
    state = update.init(params())
    for batch in batches[:2]:
        state, _ = update(state, layout.batch(batch))
    by_shard, layout = update_over(accumulate=3, reduce="window")
    state = dataclasses.replace(state, configuration=by_shard.init(params()).configuration)
    state, _ = by_shard(state, layout.batch(batches[2]))
    assert_close(state.params, by_one(batches, accumulate=3)[0])
