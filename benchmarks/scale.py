"""What is beyond a step by hand, over eight simulated devices, as ratios to the same by hand.

python benchmarks/scale.py [name ...]      # all tables, or those named
"""

import argparse
import concurrent.futures
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib
from harness import machine, measure, print_table
from laid_out import (
    Candidate,
    by_hand,
    bytes_on_a_device,
    collectives,
    data_mesh,
    stepping,
    update_over,
    updating,
)
from models import Model, transformer, vectors
from steps import copied, optimizer, window_by_hand

import functrain as ft

DEVICES = 8


def main() -> None:
    tables: dict[str, Callable[[], None]] = {
        "muon": muon,
        "window": window,
        "microbatches": microbatches,
        "norm": norm,
        "dispatch": dispatch,
        "compile": compile_times,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*tables, []], help="which tables to make")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(machine())
    for name in parser.parse_args().tables or tables:
        tables[name]()


# Muon.


def muon_by_hand(model: Model, mesh: Any) -> Candidate:
    tx, everywhere = optax.contrib.muon(0.02), jax.NamedSharding(mesh, jax.P())
    params = jax.device_put(copied(model.params), everywhere)
    state = (params, tx.init(params))

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(model.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    jitted = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    batch = jax.device_put(model.batch, jax.NamedSharding(mesh, jax.P("data")))
    return stepping(jitted, state, batch, bytes_on_a_device(state[1]))


def muon_updated(model: Model, mesh: Any, *, stacks: bool, zero: str | None) -> Candidate:
    layout = ft.layout(model.params, mesh, {...: jax.P()}, batch=jax.P("data"), zero=zero)
    tx = optax.contrib.muon(0.02)
    tx = ft.stacked(tx, layout) if stacks else tx
    optim = ft.Optimizer(ft.partition(model.params, {"all": ...}), {"all": tx}, layout=layout)
    return updating(ft.make_update(model.loss, optim), model.params, layout.batch(model.batch))


def muon() -> None:
    model, mesh = transformer(128, 12, tokens=16, batch_size=16, vocabulary=128), data_mesh()
    candidates = {
        "by hand": muon_by_hand(model, mesh),
        "with zero": muon_updated(model, mesh, stacks=False, zero="data"),
        "stacked": muon_updated(model, mesh, stacks=True, zero=None),
        "stacked, with zero": muon_updated(model, mesh, stacks=True, zero="data"),
    }
    ratios = measure({name: each.run for name, each in candidates.items()}, rounds=5, calls=1)
    first = candidates["by hand"]
    rows = [("Muon", "time", "FLOPs", "optimizer state", "collectives", "trace and compile")]
    for name, each in candidates.items():
        flops = each.compiled.cost_analysis()["flops"] / first.compiled.cost_analysis()["flops"]
        state = each.state_bytes / first.state_bytes
        seconds = each.seconds / first.seconds
        count, _ = collectives(each.compiled)
        rows.append((name, f"{ratios[name]:.2f}", f"{flops:.2f}", f"{state:.3f}", f"{count}", f"{seconds:.2f}"))
    print_table(f"A transformer of 12 layers, data parallel; by hand {ratios['seconds'] * 1e3:.0f} ms", rows)


# One reduction a window.


def window_of_programs(model: Model, mesh: Any, length: int) -> tuple[Callable[[], Any], float]:
    """A window by hand, a program for each position, and the bytes of its collectives."""
    programs, given = window_by_hand(model, length)
    everywhere = jax.NamedSharding(mesh, jax.P())
    params, opt_state, total = jax.device_put(given["last"], everywhere)
    batch = jax.device_put(model.batch, jax.NamedSharding(mesh, jax.P("data")))
    arguments = {"first": (params, batch), "middle": (total, params, batch), "last": (params, opt_state, total, batch)}
    sent = {name: collectives(programs[name].lower(*arguments[name]).compile())[1] for name in programs}

    def run() -> Any:
        nonlocal params, opt_state
        _, total = programs["first"](params, batch)
        for _ in range(length - 2):
            _, total = programs["middle"](total, params, batch)
        params, opt_state, loss = programs["last"](params, opt_state, total, batch)
        return loss

    return run, sent["first"] + (length - 2) * sent["middle"] + sent["last"]


def window_updated(model: Model, mesh: Any, length: int, reduce: Any) -> tuple[Callable[[], Any], float]:
    layout = ft.layout(model.params, mesh, {...: jax.P()}, batch=jax.P("data"))
    plain = optimizer(model)
    update = ft.make_update(
        model.loss, ft.Optimizer(plain.parts, plain.transforms, layout=layout), accumulate=length, reduce=reduce
    )
    here, batch, sent = update.init(model.params), layout.batch(model.batch), 0.0
    for _ in range(length):
        sent += collectives(update.lower(here, batch).compile())[1]
        here, _ = update(here, batch)

    def run() -> Any:
        nonlocal here
        for _ in range(length):
            here, metrics = update(here, batch)
        return metrics["loss"]

    return run, sent


def window() -> None:
    model, mesh, length = transformer(128, 4, tokens=16, batch_size=16, vocabulary=256), data_mesh(), 8
    candidates = {
        "by hand": window_of_programs(model, mesh, length),
        "accumulate=8": window_updated(model, mesh, length, "batch"),
        'accumulate=8, reduce="window"': window_updated(model, mesh, length, "window"),
    }
    ratios = measure({name: run for name, (run, _) in candidates.items()}, rounds=9, calls=1)
    rows = [("a window of 8 batches", "time", "bytes of collectives")]
    rows += [(name, f"{ratios[name]:.2f}", f"{sent / 1e6:.2f} MB") for name, (_, sent) in candidates.items()]
    print_table(f"A transformer of 4 layers, data parallel; by hand {ratios['seconds'] * 1e3:.0f} ms", rows)


# Microbatches.


def microbatches() -> None:
    """Slices as one takes them by hand, a reshape of the rows in their order, which moves them between devices."""
    model, mesh, count = transformer(64, 4, tokens=32, batch_size=64, vocabulary=128), data_mesh(), 8
    layout = ft.layout(model.params, mesh, {...: jax.P()}, batch=jax.P("data"))
    batch, plain = layout.batch(model.batch), optimizer(model)

    def in_slices(state: Any, batch: Any) -> Any:
        def add(total: Any, rows: Any) -> Any:
            loss, grads = jax.value_and_grad(model.loss)(state[0], rows)
            return jax.tree.map(jax.numpy.add, total, grads), loss

        zeros = jax.tree.map(jax.numpy.zeros_like, state[0])
        total, losses = jax.lax.scan(add, zeros, batch.reshape(count, -1, *batch.shape[1:]))
        grads = plain.parts.split(jax.tree.map(lambda leaf: leaf / count, total))
        return plain.step(state[0], grads, state[1]), losses.mean()

    params = layout.put(copied(model.params))
    jitted = jax.jit(in_slices, donate_argnums=0, out_shardings=jax.NamedSharding(mesh, jax.P()))
    hand = stepping(jitted, (params, plain.init(params)), batch, 0)
    update = ft.make_update(model.loss, ft.Optimizer(plain.parts, plain.transforms, layout=layout), microbatches=count)
    ours = updating(update, model.params, batch)
    ratios = measure({"by hand": hand.run, "microbatches=8": ours.run}, rounds=9, calls=1)
    rows = [("64 rows in 8 slices", "time", "FLOPs", "collectives in the program")]
    for name, program in (("by hand", hand.compiled), ("microbatches=8", ours.compiled)):
        flops = program.cost_analysis()["flops"] / hand.compiled.cost_analysis()["flops"]
        rows.append((name, f"{ratios[name]:.2f}", f"{flops:.2f}", f"{collectives(program)[0]}"))
    print_table(f"A transformer of 4 layers, data parallel; by hand {ratios['seconds'] * 1e3:.0f} ms", rows)


# One collective for a norm.

LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP": {"rules": {...: ft.largest("data")}},
    "ZeRO": {"rules": {...: jax.P()}, "zero": "data"},
    "data parallel": {"rules": {...: jax.P()}},
}


def laid_out(model: Model, name: str) -> ft.Layout:
    return ft.layout(model.params, data_mesh(), batch=jax.P("data"), **LAYOUTS[name])


def norm() -> None:
    model = transformer(64, 10, tokens=16, batch_size=16, vocabulary=64)
    rows = [("126 leaves, clipped", "time", "all-reduces", "of by hand", "(by hand)")]
    for name in ("FSDP", "ZeRO"):
        layout = laid_out(model, name)
        batch, hand = layout.batch(model.batch), by_hand(model, layout, clip_norm=1.0)
        first = stepping(hand.jitted, hand.state(model.params), batch, 0)
        ours = updating(update_over(model, layout, clip_norm=1.0), model.params, batch)
        ratios = measure({"by hand": first.run, "update": ours.run}, rounds=9, calls=1)
        counts = (f"{collectives(each.compiled, 'all-reduce')[0]}" for each in (ours, first))
        rows.append((name, f"{ratios['update']:.2f}", *counts, f"{ratios['seconds'] * 1e3:.0f} ms"))
    print_table("clip_norm over a layout, as a ratio to optax.global_norm in a step by hand", rows)


# What a call costs the host.


def dispatch() -> None:
    model = vectors(126, DEVICES)
    rows = [("126 leaves of 8 numbers", "update", "(by hand)")]
    for name in ("data parallel", "FSDP"):
        layout = laid_out(model, name)
        batch, hand, update = layout.batch(model.batch), by_hand(model, layout), update_over(model, layout)
        by_name = {"by hand": called(hand.jitted, hand.state(model.params), batch)}
        by_name["update"] = called(update, update.init(model.params), batch)
        ratios = measure(by_name, rounds=31, calls=10, host=True)
        rows.append((name, f"{ratios['update']:.2f}", f"{ratios['seconds'] * 1e3:.1f} ms"))
    print_table("The processor time of the thread that calls, as a ratio to that of the step by hand, jitted", rows)


def called(step: Any, state: Any, batch: Any) -> Callable[[], Any]:
    here = state

    def run() -> Any:
        nonlocal here
        here, found = step(here, batch)
        return found

    return run


# How long a program takes to be there.


def compile_times() -> None:
    rows = [("devices", "time", "processor time", "(by hand)")]
    for count in (1, DEVICES, 64, 256):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            wall, processor, seconds = process.submit(compile_ratios, count).result()
        rows.append((f"{count}", f"{wall:.2f}", f"{processor:.2f}", f"{seconds:.1f} s of the processor"))
    print_table("FSDP, one layer: trace and compile, as a ratio to the step by hand", rows)


def compile_ratios(devices: int, rounds: int = 3) -> tuple[float, float, float]:
    """In a process of its own: of time, of processor time, and the processor's seconds for the step by hand."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    model = transformer(256, 1, tokens=16, batch_size=256, vocabulary=256)
    layout = laid_out(model, "FSDP")
    batch, found = layout.batch(model.batch), []
    for number in range(rounds + 1):
        hand, update = by_hand(model, layout), update_over(model, layout)
        steps = [(hand.jitted, hand.abstract(model.params)), (update, update.abstract(model.params))]
        if number == 0:  # What Python and JAX do once for both.
            for step, state in steps:
                step.lower(state, batch)
            continue
        turned = slice(None, None, -1 if number % 2 else 1)
        found.append([seconds_to_compile(step, state, batch) for step, state in steps[turned]][turned])
    wall, processor = (statistics.median(ours[i] / first[i] for first, ours in found) for i in (0, 1))
    return wall, processor, statistics.median(first[1] for first, _ in found)


def seconds_to_compile(step: Any, state: Any, batch: Any) -> tuple[float, float]:
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter(), time.process_time()
    step.lower(state, batch).compile()
    return time.perf_counter() - start[0], time.process_time() - start[1]


if __name__ == "__main__":
    main()
