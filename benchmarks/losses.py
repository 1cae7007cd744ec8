"""Alternating and routed losses, and the audit, as ratios: python benchmarks/losses.py [cycles] [routes] [audits]."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import machine, measure, print_table
from models import MODELS
from steps import copied, optimizer
from update import TINY, timed

import functrain as ft

SIZES = {"16 wide, batch 16": (16, 16, {"calls": 8}), "512 wide, batch 256": (512, 256, {"calls": 1, "rounds": 7})}
LATENT, IMAGE, RATE = 32, 64, 1e-4
ADAM = optax.adam(RATE)
donated = functools.partial(jax.jit, donate_argnums=(0, 1))


def layers(seed: int, *sizes: int) -> list[Any]:
    shapes = zip(jax.random.split(jax.random.key(seed), len(sizes) - 1), sizes[:-1], sizes[1:], strict=True)
    return [{"kernel": jax.random.normal(key, (n, m)) * n**-0.5, "bias": jnp.zeros(m)} for key, n, m in shapes]


def apply(layers: list[Any], x: jax.Array) -> jax.Array:
    for i, layer in enumerate(layers):
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def adam_step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
    updates, opt_state = ADAM.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def looped(step: Any, state: tuple[Any, ...], batch: Any, times: int) -> Callable[[], Any]:
    def run() -> Any:
        nonlocal state
        for _ in range(times):
            *state, _ = step(*state, batch)
        return state[0]

    return run


def check_same(start: Any, *runs: Callable[[], Any]) -> None:
    """Raises unless all come to the same parameters, up to rounding, and to others than they began with."""
    ends = (getattr(end, "params", end) for end in (start, *(run() for run in runs)))
    begin, reference, *others = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(end)]) for end in ends)
    assert np.abs(reference - begin).max() > RATE
    np.testing.assert_allclose(others, [reference] * len(others), rtol=1e-5, atol=RATE / 20)


def d_loss(params: Any, batch: jax.Array, key: Any) -> jax.Array:
    fake = apply(params["g"], jax.random.normal(key, (len(batch), LATENT)))
    return apply(params["d"], fake).mean() - apply(params["d"], batch).mean()


def g_loss(params: Any, batch: jax.Array, key: Any) -> jax.Array:
    return -apply(params["d"], apply(params["g"], jax.random.normal(key, (len(batch), LATENT)))).mean()


def gan_by_hand(start: Any, batch: jax.Array) -> Callable[[], Any]:
    """A jitted step for each network, given no more than it needs; the count is folded into the key inside."""

    def step(own: str, loss_fn: Any, params: Any, opt: Any, fixed: Any, batch: Any, key: Any, n: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(key, n), "dg".index(own))
        loss, grads = jax.value_and_grad(lambda params: loss_fn({own: params, **fixed}, batch, key))(params)
        return *adam_step(params, opt, grads), loss

    d_step, g_step = (donated(functools.partial(step, *each)) for each in (("d", d_loss), ("g", g_loss)))
    d, g, key = copied(start["d"]), copied(start["g"]), jax.random.key(0)

    def cycle(params: Any, opts: Any, n: int, batch: Any) -> Any:
        (d, g), (d_opt, g_opt) = params, opts
        for i in range(3):
            d, d_opt, _ = d_step(d, d_opt, {"g": g}, batch, key, n + i)
        g, g_opt, loss = g_step(g, g_opt, {"d": d}, batch, key, n + 3)
        return (d, g), (d_opt, g_opt), n + 4, loss

    return looped(cycle, ((d, g), (ADAM.init(d), ADAM.init(g)), 0), batch, 4)


def gan_torch(params: Any, batch: jax.Array) -> dict[str, Callable[[], Any]]:
    """Two networks, eager, and two fused Adams; nothing where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    device, nets, adams = "cpu" if jax.default_backend() == "cpu" else "cuda", {}, {}
    for name, network in params.items():
        pairs = [(torch.nn.Linear(*layer["kernel"].shape), torch.nn.ReLU()) for layer in network]
        nets[name] = torch.nn.Sequential(*sum(pairs, ())[:-1]).to(device)
        adams[name] = torch.optim.Adam(nets[name].parameters(), lr=RATE, fused=True)
    real = torch.from_numpy(np.array(batch)).to(device)

    def run(threads: int) -> Any:
        torch.set_num_threads(threads)
        for own in "dddg" * 4:
            nets["d"].requires_grad_(own == "d")
            with torch.set_grad_enabled(own == "g"):
                fake = nets["g"](torch.randn(len(real), LATENT, device=device))
            score = nets["d"](fake).mean()
            adams[own].zero_grad(set_to_none=True)
            (score - nets["d"](real).mean() if own == "d" else -score).backward()
            adams[own].step()
        return torch.cuda.synchronize() if device == "cuda" else None

    # A second thread brings small networks nothing, and on a shared machine it waits for a free core.
    threads = {"PyTorch, 1 thread": 1} | ({"all threads": os.cpu_count()} if len(batch) > 16 else {})
    return {name: functools.partial(run, count) for name, count in threads.items()}


def cycles() -> None:
    columns = ("by hand", "update", "scan of 4 cycles", "PyTorch, 1 thread", "all threads")
    phases = ft.alternate(ft.Phase("d", d_loss, parts="d", repeat=3), ft.Phase("g", g_loss, parts="g"))
    rows = [("networks", *columns, "(a cycle by hand)")]
    for name, (width, batch_size, options) in SIZES.items():
        params = {"d": layers(0, IMAGE, *[width] * 4, 1), "g": layers(1, LATENT, *[width] * 4, IMAGE)}
        batch = jax.random.normal(jax.random.key(2), (batch_size, IMAGE))
        optim = ft.Optimizer(ft.partition(params, {net: net for net in params}), dict.fromkeys(params, ADAM))
        update = ft.make_update(phases, optim)
        states = [(update.init(params, key=jax.random.key(0)),) for _ in range(2)]
        scanned = looped(update.scan, states[1], jnp.stack([batch] * 16), 1)
        runs = (gan_by_hand(params, batch), looped(update, states[0], batch, 16), scanned)
        check_same(params, *runs)
        ratios = measure(dict(zip(columns, runs, strict=False)) | gan_torch(params, batch), **options)
        figures = (f"{ratios[key]:.3f}" if key in ratios else "-" for key in columns)
        rows.append((name, *figures, f"{ratios['seconds'] / 4 * 1e3:.2f} ms"))
    print_table("A cycle of D, D, D, G: time as a ratio to two steps written by hand", rows)


def head_losses(params: Any, batch: Any) -> dict[str, jax.Array]:  # Of the heads that params have.
    hidden = jax.nn.relu(apply(params["trunk"], batch["x"]))
    logits = {head: apply(params[head], hidden) for head in params if head != "trunk"}
    return {h: optax.softmax_cross_entropy_with_integer_labels(logits[h], batch[h]).mean() for h in logits}


def heads_by_hand() -> list[Any]:
    """Two gradients in one jitted function; in two, and a jitted update; the gradient of the weighted sum."""

    def grad(head: str, params: Any, batch: Any) -> Any:
        own = {"trunk": params["trunk"], head: params[head]}
        return jax.value_and_grad(lambda own: head_losses(own, batch)[head])(own)

    def combined(params: Any, opt: Any, main: Any, aux: Any) -> Any:
        trunk = jax.tree.map(lambda a, b: a + 0.3 * b, main[1]["trunk"], aux[1]["trunk"])
        grads = {"trunk": trunk, "main": main[1]["main"], "aux": aux[1]["aux"]}
        return *adam_step(params, opt, grads), (main[0], aux[0])

    def one(params: Any, opt_state: Any, batch: Any) -> Any:
        losses, pullback = jax.vjp(lambda params: head_losses(params, batch), params)
        return *adam_step(params, opt_state, *pullback({"main": jnp.float32(1), "aux": jnp.float32(0.3)})), losses

    main, aux = (functools.partial(grad, head) for head in ("main", "aux"))
    two = donated(lambda p, opt, batch: combined(p, opt, main(p, batch), aux(p, batch)))
    jitted = jax.jit(main), jax.jit(aux), donated(combined)
    return [two, lambda p, opt, batch: jitted[2](p, opt, jitted[0](p, batch), jitted[1](p, batch)), donated(one)]


def routes() -> None:
    one = "one gradient of main + 0.3 aux (not the same: the aux head gets 0.3 of its own)"
    names = ("two jax.grad in one jitted function", "two jitted jax.grad, one jitted update", one, "update, route=")
    route, columns = {"trunk": {"main": 1.0, "aux": 0.3}, "main": "main", "aux": "aux"}, []
    for width, batch_size, options in SIZES.values():
        params = {"trunk": layers(0, IMAGE, *[width] * 4), "main": layers(1, width, 10), "aux": layers(2, width, 10)}
        labels = jax.random.randint(jax.random.key(3), (2, batch_size), 0, 10)
        batch = {"x": jax.random.normal(jax.random.key(4), (batch_size, IMAGE)), "main": labels[0], "aux": labels[1]}
        optim = ft.Optimizer(ft.partition(params, {part: part for part in params}), dict.fromkeys(params, ADAM))
        update = ft.make_update(lambda params, batch: ft.Loss(head_losses(params, batch)), optim, route=route)
        runs = [looped(step, (copied(params), ADAM.init(params)), batch, 4) for step in heads_by_hand()]
        runs.append(looped(update, (update.init(params),), batch, 4))
        check_same(params, runs[0], runs[1], runs[3])
        columns.append(measure(dict(zip(names, runs, strict=True)), **options))
    rows = [("how", *SIZES), *((name, *(f"{ratios[name]:.3f}" for ratios in columns)) for name in names)]
    print_table("A trunk with two heads, each with its own loss: time of a step as a ratio to the first row", rows)


def audits() -> None:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for audit in (True, False, False, True) * 3:
        model = MODELS[TINY]()  # All is made anew, so that nothing that was traced before is found again.
        update = ft.make_update(model.loss, optimizer(model), audit=audit)
        lower = functools.partial(update.lower, update.init(model.params), model.batch)
        seconds[audit].append(timed(lambda lower=lower: lower().compile()))
    ratio = f"{np.median([on / off for on, off in zip(*seconds.values(), strict=True)]):.3f}"
    print_table("audit=True: trace and compile as a ratio to audit=False", [("program", "ratio"), (TINY, ratio)])


if __name__ == "__main__":
    print(machine())
    for name in sys.argv[1:] or ("cycles", "routes", "audits"):
        {"cycles": cycles, "routes": routes, "audits": audits}[name]()
