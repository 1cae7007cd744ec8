"""One update, written in every way that a benchmark compares. Each starts from a copy of the parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import Model

import functrain as ft

RATES = (1e-3, 3e-4, 1e-4, 1e-3, 3e-4)


def transforms(model: Model) -> dict[str, Any]:
    return {part: optax.adamw(rate, weight_decay=0.01) for part, rate in zip(model.rules, RATES, strict=False)}


def optimizer(model: Model, frozen: Sequence[str] = ()) -> ft.Optimizer:
    txs = transforms(model) | dict.fromkeys(frozen, ft.FROZEN)
    return ft.Optimizer(ft.partition(model.params, model.rules), txs)


def copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def grouped_by_hand(model: Model) -> Any:
    """A function that groups a tree by part, as nested dicts: what one writes who knows the model, with no library."""
    labels = ft.partition(model.params, model.rules).labels()

    def pick(tree: Any, labels: Any, part: str) -> Any:
        if not isinstance(tree, dict):
            return tree if labels == part else None
        picked = {key: pick(tree[key], labels[key], part) for key in tree}
        return {key: value for key, value in picked.items() if value is not None} or None

    return lambda tree: {part: pick(tree, labels, part) for part in model.rules}


def merged_by_hand(trees: Any) -> Any:
    """One nested dict from several that share no leaf."""
    trees = list(trees)
    if len(trees) == 1:
        return trees[0]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return {key: merged_by_hand(tree[key] for tree in trees if key in tree) for key in keys}


def hand_written(model: Model, frozen: Sequence[str] = ()) -> tuple[Any, Any]:
    """The step that an expert writes, and its state: gradients, an optax transform a group, everything donated."""
    group, txs = grouped_by_hand(model), transforms(model)
    txs = {part: tx for part, tx in txs.items() if part not in frozen}

    def step(params: Any, opt_state: Any, batch: Any, grads: Any = None) -> Any:
        params = group(params)
        constant = [params[part] for part in frozen]

        def loss(trained: Any) -> jax.Array:
            return model.loss(merged_by_hand([*trained.values(), *constant]), batch)

        if grads is None:
            value, grads = jax.value_and_grad(loss)({part: params[part] for part in txs})
        else:
            value, grads = grads[0], group(grads[1])
        new, states = [], {}
        for part, tx in txs.items():
            updates, states[part] = tx.update(grads[part], opt_state[part], params[part])
            new.append(optax.apply_updates(params[part], updates))
        return merged_by_hand([*new, *constant]), states, value

    groups = group(copied(model.params))
    return step, (copied(model.params), {part: tx.init(groups[part]) for part, tx in txs.items()})


def window_by_hand(model: Model, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first, middle and last program of a window, as one writes them by hand, and what each is first given."""
    step, (params, opt_state) = hand_written(model)

    def grads(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(model.loss)(params, batch)

    def add(total: Any, params: Any, batch: Any) -> Any:
        loss, new = grads(params, batch)
        return loss, jax.tree.map(jnp.add, total, new)

    def last(params: Any, opt_state: Any, total: Any, batch: Any) -> Any:
        loss, summed = add(total, params, batch)
        return step(params, opt_state, batch, grads=(loss, jax.tree.map(lambda leaf: leaf / length, summed)))

    programs = {
        "first": jax.jit(grads),
        "middle": jax.jit(add, donate_argnums=0),
        "last": jax.jit(last, donate_argnums=(0, 1)),
    }
    total = jax.tree.map(jnp.zeros_like, params)
    return programs, {"first": (params,), "middle": (total, params), "last": (params, opt_state, total)}


def averaging_by_hand(model: Model, decay: float) -> tuple[Any, Any]:
    """The same with `optax.ema` of all parameters; who reads it debiases."""
    step, (params, opt_state) = hand_written(model)
    tx = optax.ema(decay, debias=False)

    def averaging(params: Any, state: Any, batch: Any) -> Any:
        params, opt_state, value = step(params, state[0], batch)
        return params, (opt_state, tx.update(params, state[1])[1]), value

    return averaging, (params, (opt_state, tx.init(params)))


def clipped(grads: Any) -> Any:
    return optax.tree.scale(1 / jnp.maximum(1.0, optax.tree.norm(grads)), grads)


def noisy(grads: Any, *, key: Any) -> Any:
    return optax.tree.add_scale(grads, 0.01, optax.tree.random_like(key, grads, jax.random.normal))


def private_by_hand(model: Model) -> tuple[Any, Any]:
    """The same with DP-SGD: the gradients of each example, clipped, their mean, and noise."""
    step, (params, opt_state) = hand_written(model)

    def private(params: Any, state: Any, batch: Any) -> Any:
        opt_state, key, count = state

        def of_one(example: Any) -> Any:
            loss, grads = jax.value_and_grad(model.loss)(params, jax.tree.map(lambda leaf: leaf[None], example))
            return loss, clipped(grads)

        loss, grads = jax.tree.map(lambda each: jnp.mean(each, axis=0), jax.vmap(of_one)(batch))
        grads = noisy(grads, key=jax.random.fold_in(key, count))
        params, opt_state, loss = step(params, opt_state, batch, grads=(loss, grads))
        return params, (opt_state, key, count + 1), loss

    return private, (params, (opt_state, jax.random.key(0), jnp.zeros((), jnp.int32)))


def accumulated_by_hand(model: Model, times: int, length: int) -> Any:
    """A function that takes in batches in windows of a length, with a program for each position."""
    programs, given = window_by_hand(model, length)
    params, opt_state, _ = given["last"]

    def run() -> Any:
        nonlocal params, opt_state
        for _ in range(times // length):
            _, total = programs["first"](params, model.batch)
            for _ in range(length - 2):
                _, total = programs["middle"](total, params, model.batch)
            params, opt_state, loss = programs["last"](params, opt_state, total, model.batch)
        return params, loss

    return run


def multi_transform(model: Model, every: int = 1) -> tuple[Any, Any]:
    """The same with `optax.multi_transform`, and with `optax.MultiSteps` around it where `every` is more than 1."""
    tx = optax.multi_transform(transforms(model), ft.partition(model.params, model.rules).labels())
    tx = tx if every == 1 else optax.MultiSteps(tx, every)

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(model.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = copied(model.params)
    return step, (params, tx.init(params))


def repeated(step: Any, state: Any, batch: Any, times: int) -> Any:
    """A function that makes `times` steps and goes on from there when it is called again."""
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run() -> Any:
        nonlocal state
        for _ in range(times):
            *state, loss = compiled(*state, batch)
        return state, loss

    return run


def updated(
    model: Model, times: int, method: str = "__call__", *, measured_every: int = 0, key: Any = None, **options: Any
) -> Any:
    """The same through `make_update`; for "scan", one call; every so many calls one that is measured."""
    update = ft.make_update(model.loss, optimizer(model), **options)
    state = update.init(model.params, key=key)
    call = getattr(update, method)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * times), model.batch)

    def run() -> Any:
        nonlocal state
        if method == "scan":
            state, metrics = call(state, batches)
        else:
            for i in range(times):
                with_telemetry = measured_every and i % measured_every == 0
                state, metrics = (update.measured if with_telemetry else call)(state, model.batch)
        return state, metrics

    return run


def nnx_network(model: Model) -> Any:
    """The MLP as a Flax NNX module."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, params: Any):
            for name, layer in params.items():
                module = nnx.Linear(*layer["kernel"].shape, rngs=nnx.Rngs(0))
                module.kernel[...], module.bias[...] = layer["kernel"], layer["bias"]
                setattr(self, name, module)

    return Network(model.params)


def nnx_loss(network: Any, batch: Any) -> jax.Array:
    x, labels = batch
    x = jax.nn.relu(network.linear1(jax.nn.relu(network.linear0(x))))
    return optax.softmax_cross_entropy_with_integer_labels(network.linear2(x), labels).mean()


def nnx_updated(model: Model, times: int) -> Any:
    """The NNX module through `make_update`: split once, merged inside the loss."""
    from flax import nnx

    graphdef, params = nnx.split(nnx_network(model))
    split = model._replace(params=params, loss=lambda params, batch: nnx_loss(nnx.merge(graphdef, params), batch))
    return updated(split, times)


def nnx_jit(model: Model, times: int) -> Any:
    """The MLP as a Flax NNX module under `nnx.jit`, with an `nnx.Optimizer` for each part."""
    from flax import nnx

    network = nnx_network(model)
    head = nnx.All(nnx.Param, nnx.PathContains("linear2"))
    body = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("linear2")))
    txs = transforms(model)
    optimizers = [nnx.Optimizer(network, txs[part], wrt=wrt) for part, wrt in (("head", head), ("body", body))]

    @nnx.jit(donate_argnums=(0, 1, 2))
    def step(network: Any, first: Any, second: Any, batch: Any) -> jax.Array:
        value, grads = nnx.value_and_grad(nnx_loss)(network, batch)
        first.update(network, nnx.filter_state(grads, head))
        second.update(network, nnx.filter_state(grads, body))
        return value

    def run() -> Any:
        for _ in range(times):
            value = step(network, *optimizers, model.batch)
        return value

    return run


def eqx_jit(model: Model, times: int) -> Any:
    """The MLP as an Equinox module under `eqx.filter_jit`, its optimizer an `optax.multi_transform`."""
    import equinox as eqx

    class Network(eqx.Module):
        linear0: dict[str, jax.Array]
        linear1: dict[str, jax.Array]
        linear2: dict[str, jax.Array]

    network = Network(**copied(model.params))
    labels = Network(*(jax.tree.map(lambda _, p=part: p, network.linear0) for part in ("body", "body", "head")))
    tx = optax.multi_transform(transforms(model), labels)
    opt_state = tx.init(network)

    def loss(network: Network, batch: Any) -> jax.Array:
        return model.loss({"linear0": network.linear0, "linear1": network.linear1, "linear2": network.linear2}, batch)

    @eqx.filter_jit(donate="all-except-first")
    def step(batch: Any, network: Network, opt_state: Any) -> Any:
        value, grads = eqx.filter_value_and_grad(loss)(network, batch)
        updates, opt_state = tx.update(grads, opt_state, network)
        return eqx.apply_updates(network, updates), opt_state, value

    def run() -> Any:
        nonlocal network, opt_state
        for _ in range(times):
            network, opt_state, value = step(model.batch, network, opt_state)
        return value

    return run


def torch_adam(model: Model, times: int) -> Any:
    """The MLP in PyTorch, with two fused AdamW; None where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return None
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    sizes = [layer["kernel"].shape for layer in model.params.values()]
    layers = [torch.nn.Linear(*size, device=device) for size in sizes]
    network = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    groups = (layers[2].parameters(), [*layers[0].parameters(), *layers[1].parameters()])
    optimizers = [
        torch.optim.AdamW(group, lr=lr, weight_decay=0.01, fused=True) for group, lr in zip(groups, RATES, strict=False)
    ]
    x, labels = (torch.from_numpy(np.array(leaf)).to(device) for leaf in model.batch)
    labels = labels.long()

    def run() -> Any:
        for _ in range(times):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(network(x), labels)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return None

    return run
