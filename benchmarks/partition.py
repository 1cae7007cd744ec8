"""What a partition costs: resolving it, splitting under jit, and a call of a step with flat parts.

python benchmarks/partition.py
"""

import os
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from harness import machine, measure, print_table

import functrain as ft


def main() -> None:
    print(machine())
    importing()
    resolving()
    splitting()
    stepping()


def importing() -> None:
    program = "import jax, optax, time; t = time.perf_counter(); import functrain; print(time.perf_counter() - t)"
    as_installed = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=as_installed)
        for _ in range(8)
    ]
    times = sorted(float(run.stdout) for run in runs[1:])  # The first one compiles to bytecode.
    print_table("import functrain, after jax and optax", [("median of 7",), (f"{times[3] * 1e3:.1f} ms",)])


def resolving() -> None:
    params = {
        f"stack_{stack}": {
            f"layer_{i}": {name: jnp.zeros(()) for name in ("kernel", "bias", "scale")} for i in range(50)
        }
        for stack in range(20)
    }
    rules = {f"part_{stack}": [f"stack_{stack}/**/kernel", f"stack_{stack}/layer_[0-9]"] for stack in range(19)} | {
        "rest": ...
    }
    times = []
    for _ in range(5):
        start = time.perf_counter()
        parts = ft.partition(params, rules)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(20):
        parts.merge(parts.split(params))
    each = (time.perf_counter() - start) / 20
    rows = [
        ("what", "once"),
        (f"partition: {len(parts.leaves):,} leaves, {len(rules)} rules", f"{sorted(times)[2] * 1e3:.0f} ms"),
        ("split + merge outside of jit", f"{each * 1e3:.1f} ms"),
    ]
    print_table("Resolving (of this machine in this minute; it happens once a run)", rows)


def splitting() -> None:
    params = {"a": jnp.ones((64, 64)), "b": {"c": jnp.ones(64), "d": jnp.ones((64, 8))}}
    parts = ft.partition(params, {"matrices": lambda path, leaf: leaf.ndim == 2, "rest": ...})
    compiled = jax.jit(lambda tree: parts.merge(parts.split(tree))).lower(params).compile()
    nothing = jax.jit(lambda tree: tree).lower(params).compile()
    same = [program.as_text().count(" = ") for program in (compiled, nothing)]
    rows = [
        ("program", "operations", "FLOPs"),
        ("merge(split(tree))", str(same[0]), f"{compiled.cost_analysis().get('flops', 0.0):.0f}"),
        ("the tree as it is", str(same[1]), f"{nothing.cost_analysis().get('flops', 0.0):.0f}"),
    ]
    print_table("Splitting and merging under jit", rows)


def stepping() -> None:
    rows = [("model", "by hand", "flat parts", "multi_transform", "(by hand)")]
    for name, make in {"300 leaves, 5 parts, trivial": trivial, "126-leaf transformer-like, 5 parts": layers}.items():
        ratios = measure(steps(*make()))
        rows.append(
            (
                name,
                *(f"{ratios[k]:.2f}" for k in ("by hand", "flat parts", "multi_transform")),
                f"{ratios['seconds'] * 1e3:.2f} ms",
            )
        )
    print_table("A call of a jitted step: time as a ratio to the step written by hand", rows)


def trivial() -> tuple[Any, Any, Any]:
    params = {f"stack_{i}": {f"w{j}": jnp.ones(4) for j in range(60)} for i in range(5)}
    return (
        params,
        {f"part_{i}": f"stack_{i}" for i in range(5)},
        lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)),
    )


def layers() -> tuple[Any, Any, Any]:
    params = {f"layer_{i:02}": {f"w{j}": jnp.full((16, 16), 0.01) for j in range(7)} for i in range(18)}

    def loss(params: Any) -> jax.Array:
        x = jnp.ones((8, 16))
        for layer in params.values():
            for kernel in layer.values():
                x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    return params, {f"part_{i}": [f"layer_{j:02}" for j in range(i, 18, 5)] for i in range(5)}, loss


def steps(params: Any, rules: Any, loss: Any) -> dict[str, Any]:
    """The same update written three ways; each call goes on from the state that the last one left."""
    parts = ft.partition(params, rules)
    rates = {part: 1e-3 * (i + 1) for i, part in enumerate(parts.names)}
    optim = ft.Optimizer(parts, {part: optax.adam(rate) for part, rate in rates.items()})
    train_step = ft.make_train_step(lambda p, batch: loss(p), parts)

    def flat(params: Any, opt_state: Any) -> Any:
        grads, _ = train_step(params, None)
        return optim.step(params, grads, opt_state)

    multi = optax.multi_transform({part: optax.adam(rate) for part, rate in rates.items()}, parts.labels())

    def with_multi_transform(params: Any, opt_state: Any) -> Any:
        updates, opt_state = multi.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # What an expert writes who knows his model: a dict of subtrees a part, and an optimizer for each.
    owner = {
        key: part for part, selector in rules.items() for key in ([selector] if isinstance(selector, str) else selector)
    }
    transforms = {part: optax.adam(rate) for part, rate in rates.items()}

    def group(params: Any, part: str) -> Any:
        return {key: params[key] for key in params if owner[key] == part}

    def by_hand(params: Any, opt_state: Any) -> Any:
        grads = jax.grad(loss)(params)
        new, states = {}, {}
        for part, tx in transforms.items():
            mine = group(params, part)
            updates, states[part] = tx.update(group(grads, part), opt_state[part], mine)
            new |= optax.apply_updates(mine, updates)
        return new, states

    return {
        "by hand": repeated(by_hand, params, {part: tx.init(group(params, part)) for part, tx in transforms.items()}),
        "flat parts": repeated(flat, params, optim.init(params)),
        "multi_transform": repeated(with_multi_transform, params, multi.init(params)),
    }


def repeated(step: Any, params: Any, opt_state: Any) -> Any:
    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = jax.tree.map(jnp.array, (params, opt_state))

    def run() -> Any:
        nonlocal state
        state = compiled(*state)
        return state

    return run


if __name__ == "__main__":
    main()
