"""What an update does over eight devices that no step for one device does: slices that stay, sums by shard."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import functrain as ft

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
    optim = ft.Optimizer(ft.partition(params(), {"all": ...}), {"all": optax.sgd(0.1, 0.9)}, layout=layout)
    return ft.make_update(loss, optim, **options), layout


def by_one(batches, **options):
    """The params and metrics that one device comes to."""
    optim = ft.Optimizer(ft.partition(params(), {"all": ...}), {"all": optax.sgd(0.1, 0.9)})
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
