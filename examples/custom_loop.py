"""A training loop of one's own: a network whose four parts have four optimizers, on handwritten digits.

What functrain does here: name the parts, split the gradients, sum them over microbatches, step each part with
its own optimizer. Everything else, the loops included, is this file's.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets
from tqdm import tqdm

import functrain as ft

MICROBATCH, ACCUMULATE = 32, 2


class Model(nnx.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, image_shape: tuple[int, int, int], rngs: nnx.Rngs):
        height, width, channels = image_shape
        self.conv1 = nnx.Conv(channels, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(height // 2 * (width // 2) * 64, 128, rngs=rngs)
        self.linear2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(images.astype(jnp.float32) / 255))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = nnx.relu(self.linear1(x.reshape(len(x), -1)))
        return self.linear2(x)


def load(dataset, data_dir, seed):
    """Batches to train with, to validate and to test: uint8 images and their labels."""
    if dataset == "mnist":  # tensorflow-datasets downloads it, and writes it with TensorFlow, once.
        batches, splits = partial(ft.from_tfds, "mnist", data_dir=data_dir), ("train[:90%]", "train[90%:]", "test")
    else:
        digits, batches = datasets.load_digits(), ft.from_arrays
        images, rows = np.uint8(digits.images * 15.9375)[..., None], np.random.default_rng(0).permutation(1797)
        splits = ({"image": images[some], "label": digits.target[some]} for some in np.split(rows, [1293, 1437]))
    train, *others = splits
    return batches(train, MICROBATCH, seed=seed, last="drop"), *(batches(each, 72, shuffle=False) for each in others)


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Images, each moved by up to a pixel."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jnp.pad(jax.random.randint(key, (len(images), 2), 0, 3), ((0, 0), (0, 1)))
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, images.shape[1:]))(padded, corners)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its files")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train, validation, test = load(args.dataset, args.data_dir, args.seed)
    graphdef, params = nnx.split(Model(next(iter(train))["image"].shape[1:], nnx.Rngs(args.seed)))  # Pure from here on.
    updates = args.epochs * -(-len(train) // ACCUMULATE)

    parts = ft.partition(params, {"conv1": "conv1", "conv2": "conv2", "bias": "linear1/bias", "rest": ...})
    transforms = {
        "conv1": ft.with_lr(optax.adam, 2e-3),
        "conv2": ft.with_lr(optax.adamw, optax.cosine_decay_schedule(3e-3, updates), weight_decay=0.01),
        "bias": ft.with_lr(optax.sgd, 1e-2, momentum=0.9),
        "rest": ft.with_lr(optax.adamw, optax.cosine_decay_schedule(2e-3, updates), weight_decay=0.01),
    }
    optim = ft.Optimizer(parts, transforms)
    opt_state = optim.init(params)
    print(f"{optim}\n")

    def loss_fn(params, batch, key):
        logits = nnx.merge(graphdef, params)(shifted(batch["image"], key))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return ft.Loss(losses.mean(), weight=len(losses))

    train_step = ft.make_train_step(loss_fn, parts, wrt=optim.trained)

    @jax.jit
    def accumulate(params, acc, batch, key):
        grads, loss = train_step(params, batch, key=key)
        return ft.accumulate(acc, grads, weight=loss.weight), loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, acc):
        return optim.step(params, acc.mean(), opt_state)

    @jax.jit
    def correct(params, batch):
        return jnp.sum(nnx.merge(graphdef, params)(batch["image"]).argmax(-1) == batch["label"])

    def accuracy(data):
        return sum(int(correct(params, batch)) for batch in data) / data.examples

    for epoch in range(args.epochs):
        key, acc = jax.random.fold_in(jax.random.key(args.seed), epoch), None
        progress = tqdm(train.epoch(epoch), f"epoch {epoch + 1:2}/{args.epochs}", len(train), leave=False, disable=None)
        for i, batch in enumerate(progress, start=1):
            acc, loss = accumulate(params, acc, batch, jax.random.fold_in(key, i))
            if i % ACCUMULATE == 0 or i == len(train):  # What is left at the end counts by its weight.
                (params, opt_state), acc = update(params, opt_state, acc), None
        rates = " ".join(f"{float(rate):.1e}" for rate in optim.learning_rates(opt_state).values())
        seen = f"loss {float(loss.value):.4f}  validation accuracy {accuracy(validation):.3f}"
        print(f"epoch {epoch + 1:2}  {seen}  rates {rates}")
    print(f"\ntest accuracy {accuracy(test):.3f}")


if __name__ == "__main__":
    main()
