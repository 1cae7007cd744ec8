"""Eight seeds of one model trained at once: `update.pure` under a `vmap` and a `scan` of one's own.

Each seed has its own parameters, moments and random key; the batches are the same for all.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import functrain as ft

SEEDS = 8


def init(key):
    encoder, head = jax.random.split(key)
    return {
        "encoder": {"kernel": jax.random.normal(encoder, (64, 128)) / 8, "bias": jnp.zeros(128)},
        "head": {"kernel": jax.random.normal(head, (128, 10)) * 128**-0.5, "bias": jnp.zeros(10)},
    }


def apply(params, images):
    encoder, head = params["encoder"], params["head"]
    return jax.nn.relu(images @ encoder["kernel"] + encoder["bias"]) @ head["kernel"] + head["bias"]


def loss_fn(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["image"].shape)  # Differs from seed to seed.
    logits = apply(params, batch["image"] + noise)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    digits = datasets.load_digits()
    images, rows = np.float32(digits.data / 16), np.random.default_rng(0).permutation(1797)
    train, test = ({"image": images[some], "label": digits.target[some]} for some in (rows[:1437], rows[1437:]))
    batches = ft.from_arrays(train, batch_size=32, seed=0, last="drop")

    parts = ft.partition(jax.eval_shape(init, jax.random.key(0)), {"encoder": "encoder", "head": "head"})
    optim = ft.Optimizer(parts, {"encoder": ft.with_lr(optax.adam, 5e-3), "head": ft.with_lr(optax.adam, 1e-3)})
    update = ft.make_update(loss_fn, optim)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    states = jax.vmap(lambda key: update.init(init(key), key=key))(keys)

    @jax.jit
    def epoch(states, batches):
        return jax.lax.scan(jax.vmap(update.pure, in_axes=(0, None)), states, batches)

    for i in range(args.epochs):
        states, metrics = epoch(states, jax.tree.map(lambda *leaves: np.stack(leaves), *batches.epoch(i)))
        losses = " ".join(f"{loss:.3f}" for loss in metrics["loss"].mean(0))
        print(f"epoch {i + 1:2}  loss of each seed {losses}")

    logits = jax.vmap(apply, in_axes=(0, None))(states.params, test["image"])
    accuracy = jnp.mean(logits.argmax(-1) == test["label"], axis=1)
    print(f"\ntest accuracy {accuracy.mean():.3f}, of each seed {' '.join(f'{a:.3f}' for a in accuracy)}")


if __name__ == "__main__":
    main()
