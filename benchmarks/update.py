"""The compiled update against steps written by hand and against other libraries, as ratios.

python benchmarks/update.py [name ...]      # all tables, or those named
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from harness import machine, measure, print_table
from models import MODELS, Model, mlp
from steps import (
    accumulated_by_hand,
    averaging_by_hand,
    clipped,
    eqx_jit,
    hand_written,
    multi_transform,
    nnx_jit,
    nnx_updated,
    noisy,
    optimizer,
    private_by_hand,
    repeated,
    torch_adam,
    updated,
    window_by_hand,
)

import functrain as ft
from functrain.update.compiling import calls_of
from functrain.update.programs import Call

TINY, LARGE = "transformer, 126 tiny leaves", "transformer, 12M"


def main() -> None:
    tables = {
        "update": one_update,
        "many": many,
        "averages": averages,
        "gradients": gradients,
        "others": others,
        "seeds": seeds,
        "program": programs,
        "compile": compile_times,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*tables, []], help="which tables to make")
    print(machine())
    for name in parser.parse_args().tables or tables:
        tables[name]()


def one_update() -> None:
    rows = [("model", "by hand", "update", "multi_transform", "(by hand)")]
    for name, make in MODELS.items():
        model = make()
        times = 2 if name == LARGE else 16
        ratios = measure(
            {
                "by hand": repeated(*hand_written(model), model.batch, times),
                "update": updated(model, times),
                "multi_transform": repeated(*multi_transform(model), model.batch, times),
            },
            calls=2,
        )
        figures = (f"{ratios[key]:.3f}" for key in ("by hand", "update", "multi_transform"))
        rows.append((name, *figures, f"{ratios['seconds'] / times * 1e3:.2f} ms"))
    print_table("One update: time as a ratio to the step written by hand", rows)


def many() -> None:
    columns = ("scan of 16", "accumulate=8", "in a scan", "by hand, three programs", "MultiSteps(8)")
    rows = [("model", *columns)]
    for name in (TINY, LARGE):
        model = MODELS[name]()
        candidates = {
            "by hand": repeated(*hand_written(model), model.batch, 16),
            "scan of 16": updated(model, 16, "scan"),
            "accumulate=8": updated(model, 16, accumulate=8),
            "in a scan": updated(model, 16, "scan", accumulate=8),
            "by hand, three programs": accumulated_by_hand(model, 16, 8),
            "MultiSteps(8)": repeated(*multi_transform(model, 8), model.batch, 16),
        }
        ratios = measure(candidates, **({"rounds": 9, "calls": 1} if name == LARGE else {"calls": 8}))
        rows.append((name, *(f"{ratios[key]:.2f}" for key in columns)))
    print_table("Many batches: time of one as a ratio to one step written by hand", rows)

    rows = [("model", "measured at 1 step in 50")]
    for name in (TINY, "transformer, 64 wide"):
        model = MODELS[name]()
        candidates = {"plain": updated(model, 50), "measured": updated(model, 50, measured_every=50)}
        rows.append((name, f"{measure(candidates, calls=2, rounds=15)['measured']:.3f}"))
    print_table("Telemetry: time as a ratio to the update without it", rows)


def averages() -> None:
    rows = [("model", "update", "(by hand)")]
    for name, make in MODELS.items():
        model = make()
        times = 2 if name == LARGE else 16
        by_hand = repeated(*averaging_by_hand(model, 0.999), model.batch, times)
        ratios = measure({"by hand": by_hand, "update": updated(model, times, ema=0.999)}, calls=2)
        rows.append((name, f"{ratios['update']:.3f}", f"{ratios['seconds'] / times * 1e3:.2f} ms"))
    print_table("Averages of all parameters: one update, time as a ratio to the same written by hand", rows)


def gradients() -> None:
    rows = [("model", "gradients=", "DP-SGD")]
    for name in ("MLP", TINY, "transformer, 64 wide"):
        model = MODELS[name]()
        times = 16 if name == "MLP" else 4
        identity = {"plain": updated(model, times), "given": updated(model, times, gradients=lambda grads: grads)}
        private = {
            "by hand": repeated(*private_by_hand(model), model.batch, times),
            "update": updated(model, times, per_example=clipped, gradients=noisy, key=jax.random.key(0)),
        }
        figures = measure(identity, calls=2)["given"], measure(private, calls=2, rounds=15)["update"]
        rows.append((name, *(f"{figure:.3f}" for figure in figures)))
    print_table("A place for gradients: time as a ratio to the update without it, and to DP-SGD by hand", rows)


def others() -> None:
    model = mlp()
    candidates = {
        "by hand": repeated(*hand_written(model), model.batch, 16),
        "update": updated(model, 16),
        "eqx.filter_jit": eqx_jit(model, 16),
        "nnx.jit + nnx.Optimizer": nnx_jit(model, 16),
        "update of the same NNX model": nnx_updated(model, 16),
        "PyTorch, two fused Adams": torch_adam(model, 16),
    }
    ratios = measure({name: run for name, run in candidates.items() if run is not None}, calls=2)
    rows = [("how", "ratio"), *((name, f"{ratios[name]:.2f}") for name in ratios if name != "seconds")]
    print_table("An MLP of 92,000 parameters, one update", rows)


def seeds() -> None:
    """Eight seeds at once, with `update.pure` under `vmap`, against eight runs of one after the other."""
    model, count, times = mlp(64), 8, 16
    update = ft.make_update(model.loss, optimizer(model))
    states = jax.vmap(lambda scale: update.init(jax.tree.map(lambda leaf: leaf * scale, model.params)))(jnp.ones(count))
    step = jax.jit(jax.vmap(update.pure, in_axes=(0, None)), donate_argnums=0)

    def at_once() -> Any:
        nonlocal states
        for _ in range(times):
            states, metrics = step(states, model.batch)
        return states, metrics

    ratios = measure({"one run": updated(model, times), "eight at once": at_once}, calls=2)
    rows = [("how", "ratio to eight runs"), ("eight seeds under vmap", f"{ratios['eight at once'] / count:.2f}")]
    print_table("Eight seeds of a small MLP", rows)


def compiled_programs(model: Model, **options: Any) -> tuple[Any, Any]:
    """The program written by hand, and the update's, compiled but not run."""
    step, state = hand_written(model, **{key: value for key, value in options.items() if key == "frozen"})
    by_hand = jax.jit(step, donate_argnums=(0, 1)).lower(*state, model.batch).compile()
    update, state = make(model, **options)
    return by_hand, update.lower(state, model.batch).compile()


def make(model: Model, **options: Any) -> tuple[ft.Update, ft.TrainState]:
    update = ft.make_update(model.loss, optimizer(model, frozen=options.pop("frozen", ())), **options)
    return update, update.init(model.params)


def programs() -> None:
    rows = [("model", "FLOPs", "bytes accessed", "peak memory")]
    cases = {name: {} for name in MODELS} | {f"{TINY}, matrices frozen": {"frozen": ("matrices",)}}
    for name, options in cases.items():
        model = MODELS[name.removesuffix(", matrices frozen")]()
        by_hand, ours = compiled_programs(model, **options)
        costs = [program.cost_analysis() for program in (ours, by_hand)]
        peaks = [peak(program) for program in (ours, by_hand)]
        figures = [costs[0][key] / costs[1][key] for key in ("flops", "bytes accessed")]
        rows.append((name, *(f"{figure:.3f}" for figure in (*figures, peaks[0] / peaks[1]))))
    print_table("The compiled program, as a ratio to that of the step written by hand", rows)


def peak(program: Any) -> float:
    """Bytes in use at the worst moment: arguments, outputs that take no argument's place, and temporaries."""
    memory = program.memory_analysis()
    inputs_outputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(inputs_outputs + memory.temp_size_in_bytes)


def compile_times() -> None:
    rows = [("program", "trace + compile")]
    for name, make_model in MODELS.items():
        model = make_model()
        step, state = hand_written(model)
        by_hand = jax.jit(step, donate_argnums=(0, 1)).lower
        rows.append(
            (name, compile_ratio(make(model), model, by_hand, state, rounds={LARGE: 3, "MLP": 21}.get(name, 7)))
        )

    model = MODELS[TINY]()
    update, state = make(model, accumulate=3)
    programs, given = window_by_hand(model, 3)
    for position, program in programs.items():
        compiled = compile_ratio((update, state), model, program.lower, given[position])
        rows.append((f"{TINY}, {position} of a window", compiled))
        state, _ = update(state, model.batch)
    print_table("Trace and compile, as a ratio to the same written by hand", rows)
    side_by_side()


def side_by_side(rounds: int = 3) -> None:
    """All programs of a run, compiled before it begins, against those of one kind alone."""
    rows = [("programs", "side by side", "one after the other")]
    for length in (1, 4):
        model = MODELS[TINY]()
        update, state = make(model, accumulate=length)
        programs = [arguments[0] for arguments in calls_of(update._programs, (0,), state, model.batch, (True, False))]
        ratios = []
        for _ in range(rounds):
            arguments = (update, state, model.batch)
            alone = [timed(functools.partial(compiled, *arguments, [call])) for call in programs]
            together = timed(functools.partial(compiled, *arguments, programs))
            ratios.append((together / max(alone), sum(alone) / max(alone)))
        medians = (f"{statistics.median(ratio):.2f}" for ratio in zip(*ratios, strict=True))
        rows.append((", ".join(f"{call.kind}{' measured' * call.measured}" for call in programs), *medians))
    print_table("Until all programs are there, as a ratio to the slowest of them alone", rows)


def compiled(update: ft.Update, state: ft.TrainState, batch: Any, programs: Sequence[Call]) -> None:
    found = calls_of(update._programs, (0,), state, batch, (True, False))
    update._programs.compile([arguments for arguments in found if arguments[0] in programs])


def compile_ratio(ours: Any, model: Model, by_hand: Any, arguments: Any, *, rounds: int = 7) -> str:
    update, state = ours
    ratios = [
        timed(lambda: update.lower(state, model.batch).compile())
        / timed(lambda: by_hand(*arguments, model.batch).compile())
        for _ in range(rounds)
    ]
    return f"{statistics.median(ratios):.2f}"


def timed(function: Callable[[], Any]) -> float:
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
