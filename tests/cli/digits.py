"""A run of a small model, as `fit` leaves it, and harm to it."""

import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

PARAMS = {"body": {"w": jnp.full((3, 4), 0.5)}, "head": {"w": jnp.full(4, 0.1, jnp.bfloat16), "b": jnp.zeros(())}}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"]["w"])
    return jnp.mean((hidden @ params["head"]["w"] + params["head"]["b"] - batch["y"]) ** 2)


def trained(directory, *, seed, epochs=4, record=None):
    """Trains, and returns the last parameters."""
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    data = ft.from_arrays({"x": x, "y": x @ np.float32([1, -2, 3])}, batch_size=4, seed=seed)
    parts = ft.partition(PARAMS, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": ft.with_lr(optax.adamw, 0.01), "head": ft.with_lr(optax.sgd, 0.01)})
    update = ft.make_update(loss_fn, optim)
    evaluation = ft.Evaluation(lambda params, batch: {"loss": loss_fn(params, batch)}, data)
    checkpoints = ft.Checkpoints(directory, keep_last=2, keep_best="valid/loss")
    return ft.fit(
        update, update.init(PARAMS), data, epochs=epochs, evaluation=evaluation, checkpoints=checkpoints, record=record,
        progress=False,
    ).state.params  # fmt: skip


def flip(path):
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
