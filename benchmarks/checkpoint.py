"""How long a save holds training up, the steps after it included, against a save that is waited for."""

import argparse
import functools
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
from harness import machine, print_table

import functrain as ft
from functrain.loop.checkpoint import manifest


def model(megabytes: int) -> tuple[dict, ft.Update]:
    """A network with Adam whose state takes so much, and an update that takes some 30 ms, however large it is."""
    width = int((megabytes * 1e6 / 4 / 3 / 4) ** 0.5)
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (width, width)) * width**-0.5 for i in range(4)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(1e-5)})

    def loss_fn(params: dict, batch: jax.Array) -> jax.Array:
        for w in params.values():
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch**2)

    return params, ft.make_update(loss_fn, optim), jnp.ones((64, width))


def steps(update: ft.Update, state: ft.TrainState, batch: jax.Array, count: int) -> ft.TrainState:
    for _ in range(count):
        state, _ = update(state, batch)
    jax.block_until_ready(state.params)
    return state


def measured(megabytes: int, rounds: int) -> tuple[str, ...]:
    params, update, batch = model(megabytes)
    state = steps(update, update.init(params), batch, 3)
    start = time.perf_counter()
    state = steps(update, state, batch, 5)
    a_step = (time.perf_counter() - start) / 5
    count = max(5, int((0.3 + megabytes / 150) / a_step))  # Steps enough for the file to be written meanwhile.
    held = {"nothing": [], "asynchronous": [], "synchronous": [], "checksums": [], "copy": []}
    with tempfile.TemporaryDirectory() as directory, ft.Checkpoints(directory) as checkpoints:
        for round_ in range(rounds + 1):
            times = {}
            for name in ("nothing", "asynchronous", "synchronous", "nothing again"):
                start = time.perf_counter()
                if not name.startswith("nothing"):
                    checkpoints.save(state)
                if name == "synchronous":
                    checkpoints.wait()
                state = steps(update, state, batch, count)
                times[name] = time.perf_counter() - start
                checkpoints.wait()
            # What the steps take without a save changes from second to second: the mean of before and after.
            times["nothing"] = (times["nothing"] + times.pop("nothing again")) / 2
            step = checkpoints.steps()[-1]
            times["checksums"] = timed(functools.partial(manifest.damage, step))
            times["copy"] = timed(functools.partial(copied, state))
            if round_:  # The first one opens files and compiles.
                for name, taken in times.items():
                    held[name].append(taken)
    save = [a - b for a, b in zip(held["synchronous"], held["nothing"], strict=True)]

    def share(times: list[float]) -> str:
        return f"{statistics.median(a / b for a, b in zip(times, save, strict=True)):.2f}"

    asynchronous = [a - b for a, b in zip(held["asynchronous"], held["nothing"], strict=True)]
    return (
        f"{megabytes} MB", f"{1e3 * a_step:.0f} ms", f"{1e3 * statistics.median(save):.0f} ms", "1.00",
        share(asynchronous), share(held["checksums"]), share(held["copy"]),
    )  # fmt: skip


def copied(state: ft.TrainState) -> None:
    jax.block_until_ready(jax.tree.map(jnp.copy, (state.params, state.opt_state)))


def timed(work: object) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def leave_a_core() -> None:
    """Has JAX make its threads for one core less, where training leaves the host some time, as beside a GPU."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {*sorted(cores)[1:]})
    jnp.zeros(()).block_until_ready()
    os.sched_setaffinity(0, cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[10, 100, 400])
    parser.add_argument("--leave-a-core", action="store_true", help="JAX computes on one core less than there are")
    arguments = parser.parse_args()
    if arguments.leave_a_core:
        leave_a_core()
    print(machine())
    rows = [("state", "an update", "a save, waited for", "=", "held up", "checksums", "a copy in memory")]
    rows += [measured(megabytes, arguments.rounds) for megabytes in arguments.megabytes]
    where = "beside updates that leave it a core" if arguments.leave_a_core else "beside updates on all cores"
    print_table(f"What a save costs training, {where}, as a share of a save that is waited for", rows)


if __name__ == "__main__":
    main()
