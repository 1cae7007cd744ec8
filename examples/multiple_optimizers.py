"""An encoder and a head, each with an optimizer of its own, in plain JAX.

One loss, one backward pass; both optimizers step from gradients at the same parameters.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import functrain as ft


def init(key: jax.Array) -> dict:
    def linear(key: jax.Array, inputs: int, outputs: int) -> dict:
        return {"kernel": jax.random.normal(key, (inputs, outputs)) * inputs**-0.5, "bias": jnp.zeros(outputs)}

    encoder, head = jax.random.split(key)
    return {"encoder": linear(encoder, 64, 128), "head": linear(head, 128, 10)}


def apply(params: dict, images: jax.Array) -> jax.Array:
    encoder, head = params["encoder"], params["head"]
    features = jax.nn.relu(images @ encoder["kernel"] + encoder["bias"])
    return features @ head["kernel"] + head["bias"]


def loss_fn(params: dict, batch: dict) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch["image"]), batch["label"]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    digits = datasets.load_digits()
    images, rows = np.float32(digits.data / 16), np.random.default_rng(0).permutation(1797)
    train, test = ({"image": images[some], "label": digits.target[some]} for some in (rows[:1437], rows[1437:]))
    batches = ft.from_arrays(train, batch_size=32, seed=0)

    params = init(jax.random.key(0))
    parts = ft.partition(params, {"encoder": "encoder", "head": "head"})
    optim = ft.Optimizer(parts, {"encoder": ft.with_lr(optax.adam, 0.02), "head": ft.with_lr(optax.adam, 0.001)})
    opt_state = optim.init(params)
    print(f"{optim}\n")

    train_step = ft.make_train_step(loss_fn, parts)

    @jax.jit
    def update(params, opt_state, batch):
        grads, loss = train_step(params, batch)
        params, opt_state = optim.step(params, grads, opt_state)
        return params, opt_state, loss.value

    for epoch in range(args.epochs):
        for batch in batches.epoch(epoch):
            params, opt_state, loss = update(params, opt_state, batch)
        print(f"epoch {epoch + 1:2}  loss {float(loss):.4f}")

    accuracy = jnp.mean(apply(params, test["image"]).argmax(-1) == test["label"])
    print(f"\ntest accuracy {float(accuracy):.3f}")


if __name__ == "__main__":
    main()
