"""What is beyond a step by hand, over eight simulated devices, as ratios to the same by hand.

python benchmarks/scale.py [name ...]      # all tables, or those named
"""

import argparse
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib
from harness import machine, measure, print_table
from models import Model, transformer
from steps import copied, optimizer, window_by_hand

import functrain as ft

DEVICES = 8
_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def main() -> None:
    tables: dict[str, Callable[[], None]] = {"muon": muon, "window": window, "microbatches": microbatches}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*tables, []], help="which tables to make")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(machine())
    for name in parser.parse_args().tables or tables:
        tables[name]()


class Candidate(NamedTuple):
    """A compiled step that goes on from where it is, and what is known of it."""

    run: Callable[[], Any]
    compiled: Any
    seconds: float
    state_bytes: int


def data_mesh() -> Any:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def stepping(step: Any, state: Any, batch: Any, state_bytes: int) -> Candidate:
    """A candidate of `step(state, batch) -> (state, loss)`, jitted and donating."""
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    here = state

    def run() -> Any:
        nonlocal here
        here, loss = compiled(here, batch)
        return loss

    return Candidate(run, compiled, seconds, state_bytes)


def bytes_on_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def collectives(compiled: Any) -> tuple[int, float]:
    """How many collectives a program has, and the bytes that they give each device."""
    count, total = 0, 0.0
    for shapes in re.findall(r"= (.*?) (?:all-[a-z-]+|reduce-scatter|collective-[a-z-]+)\(", compiled.as_text()):
        count += 1
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = _WIDTHS.get(dtype, 4)
            for each in filter(None, dims.split(",")):
                size *= int(each)
            total += size
    return count, total


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
    update = ft.make_update(model.loss, optim)
    batch = layout.batch(model.batch)
    start = time.perf_counter()
    compiled = update.lower(update.abstract(model.params), batch).compile()
    seconds = time.perf_counter() - start
    here = update.init(model.params)

    def run() -> Any:
        nonlocal here
        here, metrics = update(here, batch)
        return metrics["loss"]

    return Candidate(run, compiled, seconds, bytes_on_a_device(here.opt_state))


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

    def by_hand(state: Any, batch: Any) -> Any:
        def add(total: Any, rows: Any) -> Any:
            loss, grads = jax.value_and_grad(model.loss)(state[0], rows)
            return jax.tree.map(jax.numpy.add, total, grads), loss

        zeros = jax.tree.map(jax.numpy.zeros_like, state[0])
        total, losses = jax.lax.scan(add, zeros, batch.reshape(count, -1, *batch.shape[1:]))
        grads = plain.parts.split(jax.tree.map(lambda leaf: leaf / count, total))
        return plain.step(state[0], grads, state[1]), losses.mean()

    params = layout.put(copied(model.params))
    jitted = jax.jit(by_hand, donate_argnums=0, out_shardings=jax.NamedSharding(mesh, jax.P()))
    hand = stepping(jitted, (params, plain.init(params)), batch, 0)
    update = ft.make_update(model.loss, ft.Optimizer(plain.parts, plain.transforms, layout=layout), microbatches=count)
    compiled = update.lower(update.abstract(model.params), batch).compile()
    here = update.init(model.params)

    def run() -> Any:
        nonlocal here
        here, metrics = update(here, batch)
        return metrics["loss"]

    ratios = measure({"by hand": hand.run, "microbatches=8": run}, rounds=9, calls=1)
    rows = [("64 rows in 8 slices", "time", "FLOPs", "collectives in the program")]
    for name, program in (("by hand", hand.compiled), ("microbatches=8", compiled)):
        flops = program.cost_analysis()["flops"] / hand.compiled.cost_analysis()["flops"]
        rows.append((name, f"{ratios[name]:.2f}", f"{flops:.2f}", f"{collectives(program)[0]}"))
    print_table(f"A transformer of 4 layers, data parallel; by hand {ratios['seconds'] * 1e3:.0f} ms", rows)


if __name__ == "__main__":
    main()
