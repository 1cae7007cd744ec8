"""Fine-tuning in three stages: pretrain, train a new head on the frozen backbone, unfreeze it with a rate of its own.

A network that has seen the digits 0 to 4 learns all ten from 200 examples. Each stage is an optimizer of its own; the
third goes on from the checkpoints of the second, and `regroup=True` takes over what that one knew about the head.
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import functrain as ft


class Backbone(nnx.Module):
    """From images to 64 features."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv2(nnx.relu(self.conv1(images)))), (2, 2), (2, 2))
        return nnx.relu(self.linear(x.reshape(len(x), -1)))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="of all ten digits, to fine-tune with")
    parser.add_argument("--epochs", type=int, default=20, help="of the second stage; the third has twice as many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    digits = datasets.load_digits()
    images, rows = np.float32(digits.images / 16)[..., None], np.random.default_rng(0).permutation(1797)
    train, test = ({"image": images[some], "label": digits.target[some]} for some in (rows[:1437], rows[1437:]))
    backbone, backbone_params = nnx.split(Backbone(nnx.Rngs(args.seed)))

    def new_head(classes, seed):
        return nnx.split(nnx.Linear(64, classes, rngs=nnx.Rngs(seed)))

    def loss_fn_of(head):
        def loss_fn(params, batch):
            logits = nnx.merge(head, params["head"])(nnx.merge(backbone, params["backbone"])(batch["image"]))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
            return ft.Loss(losses.mean(), weight=len(losses), metrics={"accuracy": accuracy})

        return loss_fn

    def update_of(loss_fn, params, backbone, head):
        parts = ft.partition(params, {"backbone": "backbone", "head": "head"})
        optim = ft.Optimizer(parts, {"backbone": backbone, "head": head})
        print(f"{optim}\n")
        return ft.make_update(loss_fn, optim)

    def accuracy(loss_fn, params, data):
        return ft.Evaluation(loss_fn, [data])(params)["accuracy"]

    def batches(data, seed):
        return ft.from_arrays(data, batch_size=32, seed=seed, last="drop")

    results = {}

    print("1. Pretrain on the digits 0 to 4\n")
    few, few_of_test = ({name: each[data["label"] < 5] for name, each in data.items()} for data in (train, test))
    head, head_params = new_head(classes=5, seed=args.seed)
    loss_fn, params = loss_fn_of(head), {"backbone": backbone_params, "head": head_params}
    update = update_of(loss_fn, params, backbone=ft.with_lr(optax.adam, 2e-3), head=ft.with_lr(optax.adam, 2e-3))
    pretrained = ft.fit(update, update.init(params), batches(few, seed=1), epochs=5).state
    results["pretrained"] = accuracy(loss_fn, pretrained.params, few_of_test)
    print(f"test accuracy of five digits {results['pretrained']:.3f}\n")

    print("2. Train a new head on the frozen backbone\n")
    some = {name: each[: args.examples] for name, each in train.items()}
    head, head_params = new_head(classes=10, seed=args.seed + 1)
    loss_fn, params = loss_fn_of(head), {"backbone": pretrained.params["backbone"], "head": head_params}
    of_head = ft.with_lr(optax.adam, 5e-3)
    probe = update_of(loss_fn, params, backbone=ft.FROZEN, head=of_head)
    folder = tempfile.TemporaryDirectory()
    checkpoints = ft.Checkpoints(folder.name)
    probed = ft.fit(probe, probe.init(params), batches(some, seed=2), epochs=args.epochs, checkpoints=checkpoints).state
    results["frozen"] = accuracy(loss_fn, probed.params, test)
    print(f"test accuracy, backbone frozen {results['frozen']:.3f}\n")

    print("3. Unfreeze it, with a lower rate than the head's\n")
    tune = update_of(loss_fn, params, backbone=ft.with_lr(optax.adam, 1e-3), head=of_head)
    tuned = ft.fit(
        tune, tune.init(params), batches(some, seed=2), epochs=2 * args.epochs, checkpoints=checkpoints, regroup=True
    ).state
    folder.cleanup()
    results["unfrozen"] = accuracy(loss_fn, tuned.params, test)
    print(f"\ntest accuracy, all trained {results['unfrozen']:.3f}")
    return results


if __name__ == "__main__":
    main()
