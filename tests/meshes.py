"""Layouts over eight devices, and a small model that all of them train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import functrain as ft

RULES = {
    "data": ({...: P()}, {}),
    "fsdp": ({...: ft.largest("data")}, {}),
    "zero": ({...: P()}, {"zero": "data"}),
    "tensor": ({"body/kernel": P(None, "model"), "body/bias": P("model"), "head/kernel": P("model"), ...: P()}, {}),
    "both": ({"**/kernel": P("data", "model"), ...: ft.largest("model")}, {}),
    "both, zero": ({"**/kernel": P(None, "model"), ...: P()}, {"zero": "data"}),
    "host": ({...: P()}, {"zero": "data", "memory": {"body": "pinned_host", "head/kernel": "pinned_host"}}),
}
RNG = np.random.default_rng(0)
BATCHES = [
    {"x": RNG.normal(size=(32, 16)).astype(np.float32), "y": RNG.normal(size=(32, 8)).astype(np.float32)}
    for _ in range(6)
]


def start():
    keys = jax.random.split(jax.random.key(0))
    return {
        "body": {"kernel": jax.random.normal(keys[0], (16, 32)) / 4, "bias": jnp.zeros(32)},
        "head": {"kernel": jax.random.normal(keys[1], (32, 8)) / 6, "bias": jnp.zeros(8)},
    }


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"]["kernel"] + params["body"]["bias"])
    out = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    return jnp.mean((out - batch["y"]) ** 2)


def mesh(kind=AxisType.Auto, shape=(4, 2)):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def layout_of(name, over=None, **options):
    rules, more = RULES[name]
    return ft.layout(start(), over or mesh(), rules, batch=P("data"), **more | options)


def optimizer_of(layout, body=None, **options):
    parts = ft.partition(start(), {"head": "head", "body": ...})
    transforms = {"body": body or optax.adam(1e-2), "head": optax.sgd(0.1, momentum=0.9)}
    return ft.Optimizer(parts, transforms, layout=layout, **options)


def stacked(batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def shardings(state):
    return jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state, state.ema))
