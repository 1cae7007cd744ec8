"""Two losses on one encoder, in four ways: summed, routed, alternating, and with PCGrad's gradients without conflict.

The encoder of a digit feeds a classifier (loss "main") and a decoder that draws the digit again (loss "aux"). All four
begin with the same parameters and see the same batches.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn import datasets

import functrain as ft

AUX_WEIGHT, LAYERS = 0.3, {"encoder": (64, 24), "head": (24, 10), "decoder": (24, 64)}


def load():
    """Batches to train with, and all of the test set: images (batch, 64) and labels."""
    digits, rows = datasets.load_digits(), np.random.default_rng(0).permutation(1797)
    arrays = {"image": np.float32(digits.data / 16), "label": digits.target}
    train, test = ({name: array[some] for name, array in arrays.items()} for some in (rows[:1437], rows[1437:]))
    return ft.from_arrays(train, batch_size=64, seed=0, last="drop"), test


def init(key):
    kernel, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(LAYERS))
    return {name: kernel(key, size) for key, (name, size) in zip(keys, LAYERS.items(), strict=True)}


def encode(params, batch):
    return jax.nn.relu(batch["image"] @ params["encoder"])


def main_loss(params, batch):
    logits = encode(params, batch) @ params["head"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return ft.Loss(loss, metrics={"accuracy": jnp.mean(logits.argmax(-1) == batch["label"])})


def aux_loss(params, batch):
    return jnp.mean((encode(params, batch) @ params["decoder"] - batch["image"]) ** 2)


def both_losses(params, batch):
    main = main_loss(params, batch)
    return ft.Loss({"main": main.value, "aux": aux_loss(params, batch)}, metrics=main.metrics)


def pcgrad(grads):
    """Takes from each loss's gradient what points against another's, `{loss: tree}` to `{loss: tree}`.

    Yu et al. 2020, "Gradient Surgery for Multi-Task Learning": where there are several others, in random order.
    """
    projected = {}
    for name, tree in grads.items():
        vector, unravel = ravel_pytree(tree)
        for other in (ravel_pytree(grads[other])[0] for other in grads if other != name):
            vector -= jnp.minimum(vector @ other, 0) / jnp.maximum(other @ other, 1e-30) * other
        projected[name] = unravel(vector)
    return projected


def norms(metrics):
    """The gradient norm of each part, `{"encoder": norm}`; with phases in each, `{"main/encoder": norm}`."""
    flat = {path.replace("parts/", ""): value for path, value in ft.flatten(metrics).items()}
    return {path.removesuffix("/grad_norm"): float(flat[path]) for path in flat if path.endswith("/grad_norm")}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args(argv)
    train, test = load()
    batches = [batch for epoch in range(args.epochs) for batch in train.epoch(epoch)]

    params = init(jax.random.key(0))
    parts = ft.partition(params, {layer: layer for layer in LAYERS})
    optim = ft.Optimizer(parts, {part: ft.with_lr(optax.adam, 5e-3) for part in parts.names})
    summed = ft.make_update(both_losses, optim, loss_weights={"aux": AUX_WEIGHT})
    # Routed, the encoder learns from "main" alone: the decoder reads its features and shapes none.
    routed = ft.make_update(both_losses, optim, route={"encoder": "main", "head": "main", "decoder": "aux"})
    # Alternating, the encoder makes two steps on each batch, one for each loss.
    main_phase = ft.Phase("main", main_loss, parts=["encoder", "head"])
    aux_phase = ft.Phase("aux", aux_loss, parts=["encoder", "decoder"], same_batch=True)
    alternating = ft.make_update(ft.alternate(main_phase, aux_phase), optim)
    train_step = ft.make_train_step(both_losses, parts, per_loss=True)

    @jax.jit
    def projected(state, batch):
        grads, _ = train_step(state.params, batch)  # {loss: {part: gradient}}
        shared = pcgrad({loss: grads[loss]["encoder"] for loss in grads})
        encoder = jax.tree.map(lambda main, aux: main + AUX_WEIGHT * aux, shared["main"], shared["aux"])
        split = {"encoder": encoder, "head": grads["main"]["head"], "decoder": grads["aux"]["decoder"]}
        params, opt_state = optim.step(state.params, split, state.opt_state)
        metrics = {"parts": {part: {"grad_norm": optax.tree.norm(split[part])} for part in split}}
        return dataclasses.replace(state, params=params, opt_state=opt_state), metrics

    results, steps = {}, {"summed": summed.measured, "routed": routed.measured, "alternating": alternating.measured}
    print("losses and accuracy of the test set; norms of the first batch's gradients, and of the last one's")
    for mode, step in (steps | {"PCGrad": projected}).items():
        state, seen = summed.init(params), []
        for batch in batches:
            state, metrics = step(state, batch)
            seen.append(norms(metrics))
        loss = both_losses(state.params, test)
        reached = {name: float(value) for name, value in (loss.values | loss.metrics).items()}
        print(f"{mode:12}", "  ".join(f"{name} {value:.3f}" for name, value in reached.items()), end="  |  ")
        print("  ".join(f"{part} {seen[0][part]:.3f} {seen[-1][part]:.3f}" for part in seen[0]))
        results[mode] = reached | {"norms": seen}
    return results


if __name__ == "__main__":
    main()
