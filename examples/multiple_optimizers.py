"""An encoder and a head, each with an optimizer of its own, in plain JAX: Catalyst's multi-optimizer example.

One loss, one backward pass; both optimizers step from gradients at the same parameters.
"""

import argparse

import digits
import jax
import jax.numpy as jnp
import optax

import functrain as ft


def init(key: jax.Array, pixels: int) -> dict:
    def linear(key: jax.Array, inputs: int, outputs: int) -> dict:
        return {"kernel": jax.random.normal(key, (inputs, outputs)) * inputs**-0.5, "bias": jnp.zeros(outputs)}

    encoder, head = jax.random.split(key)
    return {"encoder": linear(encoder, pixels, 128), "head": linear(head, 128, 10)}


def apply(params: dict, images: jax.Array) -> jax.Array:
    encoder, head = params["encoder"], params["head"]
    features = jax.nn.relu(images.reshape(len(images), -1) @ encoder["kernel"] + encoder["bias"])
    return features @ head["kernel"] + head["bias"]


def loss_fn(params: dict, batch: dict) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch["image"]), batch["label"]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its files")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    data = digits.load("digits", args.data_dir)
    params = init(jax.random.key(0), data["train"][0]["image"].size)
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
        for batch in digits.batches(data["train"], 32, shuffle_seed=epoch):
            params, opt_state, loss = update(params, opt_state, batch)
        print(f"epoch {epoch + 1:2}  loss {float(loss):.4f}")

    (test,) = digits.batches(data["test"], len(data["test"]))
    accuracy = jnp.mean(apply(params, test["image"]).argmax(-1) == test["label"])
    print(f"\ntest accuracy {float(accuracy):.3f}")


if __name__ == "__main__":
    main()
