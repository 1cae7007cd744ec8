"""What `fit` costs beside a bare `for` loop, everything on; the means that it logs; slow data; batches of arrays."""

import argparse
import contextlib
import functools
import os
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import machine, measure, print_table

import functrain as ft
from functrain.loop import means as of_rows

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


def without_means(*arguments: object, **options: object) -> object:
    """`fit` with the last update's metrics alone in its rows."""

    def add(phase: of_rows._OfPhase, metrics: dict, weight: object) -> None:
        phase._newest = metrics

    with mock.patch.object(of_rows._OfPhase, "add", add):
        return fitted(*arguments, **options)


def means(rounds: int) -> None:
    """Means since the last row, of every 100 updates, to rows of the last update alone."""
    params, update, data, _ = model(2048)
    data = data.take(BATCH * STEPS // 10)
    rows = [("an update takes", "unroll", "rows of the last update", "fit")]
    for unroll in (1, 16):
        given = (params, update, data)
        cases = {
            "without": functools.partial(without_means, *given, progress=False, unroll=unroll),
            "fit": functools.partial(fitted, *given, progress=False, unroll=unroll),
        }
        ratios = measure(cases, rounds=3 * rounds, calls=1)
        scale = f"{1e4 * ratios['seconds'] / STEPS:.2f} ms"
        rows.append((scale, str(unroll), "1.000", f"{ratios['fit']:.3f}"))
    print_table("Means since the last row", rows)


class Slow:
    """Batches in memory, each of which takes some time to read, in which the processor is free."""

    def __init__(self, batches: list, seconds: float) -> None:
        self.batches, self.seconds = batches, seconds

    def __iter__(self):
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


def slow_data(rounds: int) -> None:
    """Data that takes as long to read as an update takes: to what takes the updates alone, the longer of both."""
    params, update, data, _ = model(8192)
    batches = [data.fetch(np.arange(i * BATCH, (i + 1) * BATCH)) for i in range(100)]
    rows = [("something waits for", "data in memory", "slow data", "prefetch=2")]
    for name, log in (("each update, such as a log", ft.Every(updates=1)), ("none", None)):
        run = functools.partial(fitted, params, update, progress=False, log=log)
        run(batches)
        start = time.perf_counter()
        run(batches)
        slow = Slow(batches, (time.perf_counter() - start) / len(batches))
        cases = {"memory": [batches, 0], "slow": [slow, 0], "prefetched": [slow, 2]}
        runs = {case: functools.partial(run, data, prefetch=count) for case, (data, count) in cases.items()}
        ratios = measure(runs, rounds=rounds, calls=1)
        rows.append((name, *(f"{ratios[case]:.2f}" for case in cases)))
    print_table("Batches whose reading takes as long as an update", rows)


def gathering(rounds: int) -> None:
    """A shuffled batch of `from_arrays`, of an epoch that is under way, to `numpy.take` of the same rows."""
    rows = [("a batch", "numpy.take", "from_arrays")]
    shapes = {
        "128 images of 3 KB": ((60_000, 32, 32, 3), np.uint8, 128),
        "64 rows of 16 KB": ((10_000, 4096), np.float32, 64),
        "1,024 rows of 40 bytes": ((200_000, 10), np.float32, 1024),
        "8,192 numbers of 4 bytes": ((1_000_000,), np.int32, 8192),
    }
    for name, (shape, dtype, size) in shapes.items():
        array = np.ones(shape, dtype)
        ratios = measure(_gatherers(array, ft.from_arrays({"x": array}, size, seed=1)), rounds=5 * rounds, calls=100)
        rows.append((name, "1.00", f"{ratios['from_arrays']:.2f}"))
    print_table("Gathering a batch", rows)


def _gatherers(array: np.ndarray, data: ft.Data) -> dict:
    order = np.random.default_rng(0).permutation(len(array))  # Of other rows, which are in no cache for it.
    batches, start = data.epoch(0), 0

    def take() -> None:
        nonlocal start
        start = (start + data.batch_size) % len(array)
        np.take(array, order[start : start + data.batch_size], axis=0)

    def from_arrays() -> None:
        nonlocal batches
        try:
            next(batches)
        except StopIteration:
            batches.set_state({"next_index": 0})
            next(batches)

    return {"take": take, "from_arrays": from_arrays}


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
    means(rounds)
    slow_data(rounds)
    gathering(rounds)


if __name__ == "__main__":
    main()
