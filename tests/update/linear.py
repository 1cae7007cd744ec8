"""A small model of two parts, batches for it, and its update run over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

SIZES = {"body": (4, 3), "head": (3, 1)}


def linear_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    return {name: {"w": jax.random.normal(key, SIZES[name], dtype)} for name, key in zip(SIZES, keys, strict=True)}


def batches_of(count, size=6, seed=1):
    return jax.random.normal(jax.random.key(seed), (count, size, 4))


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["body"]["w"]) @ params["head"]["w"] - 1) ** 2)


def optimizer_of(params, **transforms):
    parts = ft.partition(params, {"body": "body", "head": "head"})
    return ft.Optimizer(
        parts, {"body": optax.adam(1e-2), "head": ft.with_lr(optax.sgd, 0.1, momentum=0.9)} | transforms
    )


def leaves_of(state):
    """Every leaf of a state as bytes, by path: two states with the same ones are equal to the bit."""
    fields = {"params": state.params, "opt": state.opt_state, "model": state.model_state, "window": state.window,
              "ema": state.ema}  # fmt: skip
    counters = {"step": int(state.step), "batches": int(state.batches), "pending": int(state.pending)}
    others = counters | {"scale": state.scale_state}
    return {path: np.asarray(leaf).tobytes() for path, leaf in ft.flatten(fields | others).items()}


def run(update, state, batches, **options):
    for batch in batches:
        state, metrics = update(state, batch, **options)
    return state, metrics


def run_with_rows(update, state, batches):
    """The last state, and the metrics of each call."""
    rows = []
    for batch in batches:
        state, metrics = update(state, batch)
        rows.append(metrics)
    return state, rows
