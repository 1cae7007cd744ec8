"""Plans a GPT of a billion parameters over 256 simulated devices, and prints it: run in a process of its own."""

import json
import os
import resource
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import functrain as ft

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, ROWS = 24, 1792, 16, 50304, 1024, 512
RULES = {
    "**/qkv": P(None, "fsdp", None, "tensor"),
    "**/out": P(None, "tensor", None, "fsdp"),
    "**/up": P(None, "fsdp", "tensor"),
    "**/down": P(None, "tensor", "fsdp"),
    "embed": P("tensor", "fsdp"),
    ...: P(),
}


def init():
    def zeros(*lengths):
        return jnp.zeros(lengths)

    body = {
        "norms": zeros(LAYERS, 2, WIDTH),
        "qkv": zeros(LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS),
        "out": zeros(LAYERS, HEADS, WIDTH // HEADS, WIDTH),
        "up": zeros(LAYERS, WIDTH, 4 * WIDTH),
        "down": zeros(LAYERS, 4 * WIDTH, WIDTH),
    }
    return {"embed": zeros(VOCABULARY, WIDTH), "positions": zeros(LENGTH, WIDTH), "body": body}


def normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale.astype(x.dtype)


def block(x, of):
    of = jax.tree.map(lambda leaf: leaf.astype(x.dtype), of)
    q, k, v = jnp.moveaxis(jnp.einsum("bsd,dthe->bsthe", normed(x, of["norms"][0]), of["qkv"]), 2, 0)
    scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), jnp.einsum("bshe,bthe->bhst", q, k), -1e9)
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
    x = x + jnp.einsum("bshe,hed->bsd", jnp.einsum("bhst,bthe->bshe", weights, v), of["out"])
    x = x + jax.nn.gelu(normed(x, of["norms"][1]) @ of["up"]) @ of["down"]
    return jax.lax.with_sharding_constraint(x, P("fsdp")), None


def loss_fn(params, batch):
    x = params["embed"][batch["tokens"]] + params["positions"]
    x = jax.lax.with_sharding_constraint(x.astype(jnp.bfloat16), P("fsdp"))
    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["body"])
    logits = (x @ params["embed"].astype(x.dtype).T).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]))


def planned():
    params, mesh = jax.eval_shape(init), jax.make_mesh((64, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    layout = ft.layout(params, mesh, RULES, batch=P("fsdp"))
    parts = ft.partition(params, {"body": "body", "embed": ...})
    optim = ft.Optimizer(parts, {"body": optax.adam(1e-3), "embed": optax.adam(1e-3)}, layout=layout)
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    with jax.set_mesh(mesh):
        return ft.plan(ft.make_update(loss_fn, optim), layout, params, {"tokens": tokens, "targets": tokens})


if __name__ == "__main__":
    plan = planned()
    print(plan, file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(plan.to_dict() | {"host": peak, "live": len(jax.live_arrays())}))
