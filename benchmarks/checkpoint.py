"""What a save costs, beside Orbax alone and `torch.save`: until it is on disk, and how long it holds training up."""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import machine, print_table

import functrain as ft

FSYNC = os.fsync


class Functrain:
    """`ft.Checkpoints`; without syncs, only TensorStore syncs what it writes itself."""

    def __init__(self, directory: Path, state: ft.TrainState, *, syncs: bool = True):
        self.checkpoints, self.like, self.syncs = ft.Checkpoints(directory), abstract(state), syncs

    def save(self, state: ft.TrainState) -> None:
        os.fsync = FSYNC if self.syncs else lambda _: None
        self.checkpoints.save(state)

    def wait(self) -> None:
        self.checkpoints.wait()
        os.fsync = FSYNC

    def restore(self) -> Any:
        return self.checkpoints.restore(self.like).state.params

    def close(self) -> None:
        self.checkpoints.close()


class Orbax:
    """`CheckpointManager` as it is made without options, but for how many it keeps."""

    def __init__(self, directory: Path, state: ft.TrainState):
        import orbax.checkpoint as ocp

        self.args, self.like, self.step = ocp.args, abstract(trees(state)), 0
        self.manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, state: ft.TrainState) -> None:
        self.step += 1
        self.manager.save(self.step, args=self.args.StandardSave(trees(state)))

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def restore(self) -> Any:
        return self.manager.restore(self.step, args=self.args.StandardRestore(self.like))

    def close(self) -> None:
        self.manager.close()


class Torch:
    """`torch.save` of tensors of the same shapes, to a file that gets its name when it is whole."""

    def __init__(self, directory: Path, state: ft.TrainState, *, syncs: bool):
        import torch

        directory.mkdir()
        self.tensors = {name: torch.rand(leaf.shape) for name, leaf in ft.flatten(trees(state)).items()}
        self.torch, self.path, self.syncs = torch, directory / "state.pt", syncs

    def save(self, state: ft.TrainState) -> None:
        with self.path.with_suffix(".tmp").open("wb") as file:
            self.torch.save(self.tensors, file)
            if self.syncs:
                file.flush()
                FSYNC(file.fileno())
        self.path.with_suffix(".tmp").replace(self.path)

    def wait(self) -> None:
        """All of it is done in `save`."""

    def close(self) -> None:
        """Nothing is open."""


def trees(state: ft.TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state}


def abstract(tree: Any) -> Any:
    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))

    return jax.tree.map(of, tree)


@contextlib.contextmanager
def opened(makers: dict[str, Any], state: ft.TrainState) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        candidates = {name: make(Path(directory, str(i)), state) for i, (name, make) in enumerate(makers.items())}
        try:
            yield candidates
        finally:
            for candidate in candidates.values():
                candidate.close()


def timed(work: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work(*arguments))
    return time.perf_counter() - start


# Beside training.

MAKERS = {
    "functrain": Functrain,
    "without syncs": lambda *given: Functrain(*given, syncs=False),
    "Orbax alone": Orbax,
    "torch.save": lambda *given: Torch(*given, syncs=False),
    "torch.save, fsync": lambda *given: Torch(*given, syncs=True),
}


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


def beside_training(megabytes: int, rounds: int) -> list[tuple[str, ...]]:
    """How long each takes until a save is done, and by how much updates beside it end later, as ratios to the first."""
    params, update, batch = model(megabytes)

    def trained(state: ft.TrainState, count: int) -> ft.TrainState:
        for _ in range(count):
            state, _ = update(state, batch)
        return jax.block_until_ready(state)

    state = trained(update.init(params), 3)
    start = time.perf_counter()
    state = trained(state, 5)
    a_step = (time.perf_counter() - start) / 5
    count = max(5, int((0.3 + megabytes / 150) / a_step))  # Updates enough for the file to be written meanwhile.
    took = {name: [] for name in MAKERS}
    held = {name: [] for name in MAKERS}
    with opened(MAKERS, state) as candidates:
        for round_ in range(rounds + 1):
            start = time.perf_counter()
            state = trained(state, count)
            alone = [time.perf_counter() - start]
            beside = {}
            for name, candidate in candidates.items():
                start = time.perf_counter()
                candidate.save(state)
                state = trained(state, count)
                beside[name] = time.perf_counter() - start
                candidate.wait()
            start = time.perf_counter()
            state = trained(state, count)
            alone.append(time.perf_counter() - start)
            for name, candidate in candidates.items():
                state = trained(state, 1)
                start = time.perf_counter()
                candidate.save(state)
                candidate.wait()
                if round_:  # The first one opens files and compiles.
                    took[name].append(time.perf_counter() - start)
                    held[name].append(beside[name] - statistics.mean(alone))
    first = took[next(iter(MAKERS))]

    def cells(times: dict[str, list[float]]) -> tuple[str, ...]:
        ours = statistics.median(next(iter(times.values())))
        ratios = [statistics.median(a / b for a, b in zip(each, first, strict=True)) for each in times.values()]
        return f"{1e3 * ours:.0f} ms", *(f"{ratio:.2f}" for ratio in ratios)

    return [
        (f"{megabytes} MB until it is on disk", *cells(took)),
        (f"  holding up updates of {1e3 * a_step:.0f} ms", *cells(held)),
    ]


def leave_a_core() -> None:
    """Has JAX make its threads for one core less, where training leaves the host some time, as beside a GPU."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {*sorted(cores)[1:]})
    jnp.zeros(()).block_until_ready()
    os.sched_setaffinity(0, cores)


# Many leaves.

FEW, MANY = 20, 2000
ALONE = {"functrain": Functrain, "Orbax alone": Orbax}


def state_of(leaves: int, megabytes: int) -> ft.TrainState:
    """A state with Adam of so many leaves that take so much together."""
    count = round(leaves / 3)
    size = round(megabytes * 1e6 / 4 / 3 / count)
    params = {f"w{i}": jax.random.normal(jax.random.key(i % 20), (size,)) for i in range(count)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(1e-5)})
    return ft.make_update(lambda params, batch: batch, optim, audit=False).init(params)


def many_leaves(megabytes: int, rounds: int) -> list[tuple[str, ...]]:
    """How long the same bytes take in many leaves, as ratios to a few: `save()` alone, until it is done, and back."""
    states = {count: state_of(count, megabytes) for count in (FEW, MANY)}
    times: dict[Any, list[float]] = {}
    with contextlib.ExitStack() as stack:
        candidates = {count: stack.enter_context(opened(ALONE, state)) for count, state in states.items()}
        for round_ in range(-2, rounds):  # The first two compile.
            step = {name: np.array(round_ + 2, np.int32) for name in ("step", "batches")}
            for name, (count, state) in itertools.product(ALONE, states.items()):
                candidate = candidates[count][name]
                if name == "functrain" or round_ in (0, 1):  # Orbax alone takes seconds.
                    found = {"save() returns": timed(candidate.save, dataclasses.replace(state, **step))}
                    found["it is on disk"] = found["save() returns"] + timed(candidate.wait)
                    found["it is restored"] = timed(candidate.restore)
                    for what, seconds in found.items():
                        times.setdefault((what, name, count), []).extend([seconds] if round_ >= 0 else [])

    def cells(what: str, name: str) -> tuple[str, str]:
        few, many = times[what, name, FEW], times[what, name, MANY]
        ratio = statistics.median(a / b for a, b in zip(many, few, strict=True))
        return f"{1e3 * statistics.median(few):.0f} ms", f"{ratio:.2f}"

    whats = dict.fromkeys(what for what, _, _ in times)
    return [
        (f"{megabytes} MB until {what}", *itertools.chain(*(cells(what, name) for name in ALONE))) for what in whats
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--leave-a-core", action="store_true", help="JAX computes on one core less than there are")
    arguments = parser.parse_args()
    if arguments.leave_a_core:
        leave_a_core()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells how long it waits.
    print(machine())
    rows = [("", "functrain", "=", *[*MAKERS][1:])]
    for megabytes in arguments.megabytes:
        rows += beside_training(megabytes, arguments.rounds)
    where = "beside updates that leave it a core" if arguments.leave_a_core else "beside updates on all cores"
    print_table(f"A save {where}, as a share of functrain's until it is on disk", rows)
    rows = [("", f"functrain, {FEW} leaves", f"{MANY:,}", f"Orbax alone, {FEW} leaves", f"{MANY:,}")]
    rows += many_leaves(max(arguments.megabytes), arguments.rounds)
    print_table("The same bytes in many leaves, as a ratio to a few", rows)


if __name__ == "__main__":
    main()
