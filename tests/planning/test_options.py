"""Whatever an update is made with can be planned."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from shapes import LAYERS, ROWS, WIDTH, mesh_of, mlp_loss, mlp_params, optimizer, sent, shape

import functrain as ft

BODY, HEAD = 4 * LAYERS * WIDTH * WIDTH, 4 * WIDTH


def with_key(params, batch, key):
    return mlp_loss(params, batch * jax.random.bernoulli(key, 0.5, batch.shape))


def two_losses(params, batch):
    return ft.Loss({"one": mlp_loss(params, batch), "other": jnp.mean(params["head"] ** 2)})


def surgery(grads, *, per_loss):
    return jax.tree.map(lambda one, other: one + other, per_loss["one"], per_loss["other"])


CASES = {
    "key": (with_key, {}),
    "losses": (two_losses, {"loss_weights": {"other": 0.1}}),
    "route": (two_losses, {"route": {"body": "one", "head": "other"}}),
    "surgery": (two_losses, {"gradients": surgery, "accumulate": 2}),
    "skip": (mlp_loss, {"nonfinite": "skip"}),
    "scale": (mlp_loss, {"loss_scale": ft.DynamicScale(initial=8.0), "compute_dtype": jnp.float16}),
    "narrow": (mlp_loss, {"compute_dtype": jnp.bfloat16}),
    "target": (mlp_loss, {"ema": {"body": 0.9, "head": 0.99}, "accumulate": 3}),
    "example": (mlp_loss, {"per_example": lambda grads: grads}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_option_can_be_planned_and_gradients_are_reduced_once(name):
    loss_fn, options = CASES[name]
    params = mlp_params()
    layout = ft.layout(params, mesh_of(8), {...: P()}, batch=P("data"))
    update = ft.make_update(loss_fn, optimizer(params, layout=layout), **options)
    plan = ft.plan(update, layout, params, shape(ROWS, WIDTH), key=jax.eval_shape(lambda: jax.random.key(0)))
    reduced = sent(plan, "all-reduce", "body")[1]
    assert reduced == BODY * plan.batches // (2 if "compute_dtype" in options else 1)
    assert {part: 8 * count for part, count in plan.flops_here.items()} == plan.flops
    of_head = 2 if name == "route" else 3  # The loss that it learns from has no product.
    assert sum(plan.flops.values()) == plan.batches * (2 * ROWS * WIDTH) * ((3 * LAYERS - 1) * WIDTH + of_head)


def test_a_part_that_joins_later_is_planned_as_when_it_has():
    params = mlp_params()
    parts = ft.partition(params, {"body": "body", "head": ...})
    transforms = {"body": optax.adam(1e-3), "head": optax.sgd(0.1)}
    later, now = (
        ft.plan(
            ft.make_update(mlp_loss, ft.Optimizer(parts, transforms, frozen_until=frozen)),
            None,
            params,
            shape(ROWS, WIDTH),
        )
        for frozen in ({"body": 100}, {})
    )
    assert (later.flops, later.held, later.activations) == (now.flops, now.held, now.activations)
