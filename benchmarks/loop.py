"""What `fit` costs beside a bare `for` loop over the same update and the same batches, everything on."""

import argparse
import contextlib
import functools
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import machine, measure, print_table

import functrain as ft

STEPS = 10_000
BATCH = 64


def model(width: int) -> tuple:
    """A network whose update takes about a millisecond with the right width, its data and its evaluation."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"body": jax.random.normal(keys[0], (64, width)) / 8, "head": jax.random.normal(keys[1], (width, 10)) / 8}
    parts = ft.partition(params, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": ft.with_lr(optax.adamw, 1e-4), "head": ft.with_lr(optax.adamw, 1e-3)})

    def losses(params: dict, batch: dict) -> jax.Array:
        logits = jnp.tanh(batch["x"] @ params["body"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def loss_fn(params: dict, batch: dict) -> ft.Loss:
        return ft.Loss(losses(params, batch).mean(), weight=len(batch["y"]))

    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(BATCH * STEPS, 64)).astype(np.float32), "y": rng.integers(0, 10, BATCH * STEPS)}
    valid = {name: array[: 10 * BATCH] for name, array in arrays.items()}
    evaluation = ft.Evaluation(lambda p, b: {"loss": losses(p, b)}, ft.from_arrays(valid, batch_size=BATCH))
    return params, ft.make_update(loss_fn, optim), ft.from_arrays(arrays, batch_size=BATCH), evaluation


def bare(params: dict, update: ft.Update, data: object) -> object:
    state = update.init(params)
    for batch in data.epoch(0):
        state, _ = update(state, batch)
    return state.params


def fitted(params: dict, update: ft.Update, data: object, **options: object) -> object:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return ft.fit(update, update.init(params), data, epochs=1, **options).state.params


def everything(params: dict, update: ft.Update, data: object, evaluation: ft.Evaluation) -> object:
    with tempfile.TemporaryDirectory() as directory:
        return fitted(
            params, update, data, evaluation=evaluation, stop=ft.EarlyStopping("valid/loss", patience=3), progress=True,
            checkpoints=ft.Checkpoints(directory, keep_best="valid/loss"), loggers=[ft.TensorBoard(directory)],
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(machine())
    rows = [("an update takes", "for loop", "fit", "fit, everything on")]
    for width in (2048,):
        params, update, data, evaluation = model(width)
        cases = {
            "bare": functools.partial(bare, params, update, data),
            "fit": functools.partial(fitted, params, update, data, progress=False),
            "everything": functools.partial(everything, params, update, data, evaluation),
        }
        ratios = measure(cases, rounds=rounds, calls=1)
        scale = f"{1e3 * ratios['seconds'] / STEPS:.2f} ms"
        rows.append((scale, "1.000", f"{ratios['fit']:.3f}", f"{ratios['everything']:.3f}"))
    print_table(f"An epoch of {STEPS:,} updates, with evaluation, checkpoints, logs, bar and early stopping", rows)


if __name__ == "__main__":
    main()
