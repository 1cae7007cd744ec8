"""Eight seeds of one model trained at once: `update.pure` under a `vmap` and a `scan` of one's own.

Each seed has its own parameters, moments and random key; the batches are the same for all.
"""

import argparse

import digits
import jax
import jax.numpy as jnp
import multiple_optimizers as model
import numpy as np
import optax

import functrain as ft

SEEDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its files")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    data = digits.load("digits", args.data_dir)
    pixels = data["train"][0]["image"].size

    shapes = jax.eval_shape(lambda key: model.init(key, pixels), jax.random.key(0))
    parts = ft.partition(shapes, {"encoder": "encoder", "head": "head"})
    optim = ft.Optimizer(parts, {"encoder": ft.with_lr(optax.adam, 5e-3), "head": ft.with_lr(optax.adam, 1e-3)})

    def loss_fn(params, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["image"].shape)  # Differs from seed to seed.
        return model.loss_fn(params, batch | {"image": batch["image"] + noise})

    update = ft.make_update(loss_fn, optim)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    states = jax.vmap(lambda key: update.init(model.init(key, pixels), key=key))(keys)

    @jax.jit
    def epoch(states, batches):
        return jax.lax.scan(jax.vmap(update.pure, in_axes=(0, None)), states, batches)

    for i in range(args.epochs):
        full = [batch for batch in digits.batches(data["train"], 32, shuffle_seed=i) if len(batch["label"]) == 32]
        states, metrics = epoch(states, jax.tree.map(lambda *leaves: np.stack(leaves), *full))
        losses = " ".join(f"{loss:.3f}" for loss in metrics["loss"].mean(0))
        print(f"epoch {i + 1:2}  loss of each seed {losses}")

    (test,) = digits.batches(data["test"], len(data["test"]))
    logits = jax.vmap(model.apply, in_axes=(0, None))(states.params, test["image"])
    accuracy = jnp.mean(logits.argmax(-1) == test["label"], axis=1)
    print(f"\ntest accuracy {accuracy.mean():.3f}, of each seed {' '.join(f'{a:.3f}' for a in accuracy)}")


if __name__ == "__main__":
    main()
