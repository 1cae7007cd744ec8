"""A training loop of one's own: a network whose four parts have four optimizers, on handwritten digits.

What functrain does here: name the parts, split the gradients, sum them over microbatches, step each part with
its own optimizer. Everything else, the loops included, is this file's.
"""

import argparse
from functools import partial

import digits
import jax
import jax.numpy as jnp
import optax
from flax import nnx
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
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = nnx.relu(self.linear1(x.reshape(len(x), -1)))
        return self.linear2(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its files")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = digits.load(args.dataset, args.data_dir)
    graphdef, params = nnx.split(Model(data["train"][0]["image"].shape, nnx.Rngs(args.seed)))  # Pure from here on.
    updates = args.epochs * -(-len(data["train"]) // (MICROBATCH * ACCUMULATE))

    parts = ft.partition(params, {"conv1": "conv1", "conv2": "conv2", "bias": "linear1/bias", "rest": ...})
    optim = ft.Optimizer(
        parts,
        {
            "conv1": ft.with_lr(optax.adam, 2e-3),
            "conv2": ft.with_lr(optax.adamw, optax.cosine_decay_schedule(3e-3, updates), weight_decay=0.01),
            "bias": ft.with_lr(optax.sgd, 1e-2, momentum=0.9),
            "rest": ft.with_lr(optax.adamw, optax.cosine_decay_schedule(2e-3, updates), weight_decay=0.01),
        },
    )
    opt_state = optim.init(params)
    print(f"{optim}\n")

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params)(batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = jnp.sum(logits.argmax(-1) == batch["label"])
        return ft.Loss(losses.mean(), weight=len(losses), metrics={"correct": correct})

    train_step = ft.make_train_step(loss_fn, parts, wrt=optim.trained)

    @jax.jit
    def accumulate(params, acc, batch):
        grads, loss = train_step(params, batch)
        return ft.accumulate(acc, grads, weight=loss.weight), loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, acc):
        return optim.step(params, acc.mean(), opt_state)

    @jax.jit
    def evaluate(params, batch):
        return loss_fn(params, batch).metrics["correct"]

    def accuracy(split):
        return sum(int(evaluate(params, batch)) for batch in digits.batches(data[split], 200)) / len(data[split])

    for epoch in range(args.epochs):
        microbatches = digits.batches(data["train"], MICROBATCH, shuffle_seed=args.seed + epoch)
        progress = tqdm(microbatches, desc=f"epoch {epoch + 1:2}/{args.epochs}", leave=False, disable=None)
        acc = None  # What is left of an epoch is a window of its own: the short ones count by their weight.
        for i, batch in enumerate(progress, start=1):
            acc, loss = accumulate(params, acc, batch)
            if i % ACCUMULATE == 0 or i == len(microbatches):
                params, opt_state = update(params, opt_state, acc)
                acc = None
        rates = {part: f"{float(rate):.1e}" for part, rate in optim.learning_rates(opt_state).items()}
        print(
            f"epoch {epoch + 1:2}  loss {float(loss.value):.4f}  validation accuracy {accuracy('validation'):.3f}"
            f"  rates {' '.join(rates.values())}"
        )

    print(f"\ntest accuracy {accuracy('test'):.3f}")


if __name__ == "__main__":
    main()
