"""The main job of custom_loop.py through `ft.fit`: four parts, four optimizers, accumulation and a clip.

Kill it at any moment and start it again: it ends as it would have ended. A run that has ended prints its results, and
leaves a record: open report.html in its folder, or compare two of them, `functrain report runs/fit_digits runs/slow`.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import functrain as ft

BATCH, ACCUMULATE = 32, 2


class Model(nnx.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(4 * 4 * 64, 128, rngs=rngs)
        self.linear2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = nnx.relu(self.linear1(x.reshape(len(x), -1)))
        return self.linear2(x)


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Images, each moved by up to a pixel."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jnp.pad(jax.random.randint(key, (len(images), 2), 0, 3), ((0, 0), (0, 1)))
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, images.shape[1:]))(padded, corners)


class Report(ft.Hook):
    """A line for each evaluation."""

    def evaluation_ended(self, run):
        names = ("valid/loss", "valid/accuracy", "valid/top2")
        print(f"epoch {run.epoch:2}  " + "  ".join(f"{name} {run.results[name]:.3f}" for name in names), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/fit_digits"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rate", type=float, default=2e-3, help="of the first convolution")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    digits = datasets.load_digits()
    images, rows = np.float32(digits.images / 16)[..., None], np.random.default_rng(0).permutation(1797)
    splits = np.split(rows, [1293, 1437])
    train, valid, test = ({"image": images[some], "label": digits.target[some]} for some in splits)
    train = ft.from_arrays(train, BATCH, seed=args.seed, last="drop")
    valid, test = (ft.from_arrays(each, 100, shuffle=False) for each in (valid, test))

    graphdef, params = nnx.split(Model(nnx.Rngs(args.seed)))
    parts = ft.partition(params, {"conv1": "conv1", "conv2": "conv2", "bias": "linear1/bias", "rest": ...})
    updates = args.epochs * -(-len(train) // ACCUMULATE)
    optim = ft.Optimizer(
        parts,
        {
            "conv1": ft.with_lr(optax.adam, args.rate),
            "conv2": ft.with_lr(optax.adamw, optax.cosine_decay_schedule(3e-3, updates), weight_decay=0.01),
            "bias": ft.with_lr(optax.sgd, 1e-2, momentum=0.9),
            "rest": ft.with_lr(optax.adamw, optax.cosine_decay_schedule(2e-3, updates), weight_decay=0.01),
        },
        clip_norm=1.0,
    )
    print(f"{optim}\n")

    def loss_fn(params, batch, key):
        logits = nnx.merge(graphdef, params)(shifted(batch["image"], key))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return ft.Loss(losses.mean(), weight=len(losses))

    def eval_step(params, batch):
        logits, label = nnx.merge(graphdef, params)(batch["image"]), batch["label"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        prediction = logits.argmax(-1)
        is_right = prediction == label
        return {"loss": losses, "accuracy": is_right, "logits": logits, "label": label, "prediction": prediction}

    update = ft.make_update(loss_fn, optim, accumulate=ACCUMULATE)
    metrics = {"top2": ft.TopK(2, scores="logits"), "confusion": ft.ConfusionMatrix(10)}
    of_test = ft.Evaluation(eval_step, test, name="test", metrics=metrics)
    config = {"epochs": args.epochs, "rate": args.rate, "seed": args.seed, "batch": BATCH, "accumulate": ACCUMULATE}
    result = ft.fit(
        update,
        update.init(params, key=jax.random.key(args.seed)),
        train,
        epochs=args.epochs,
        evaluation=ft.Evaluation(eval_step, valid, metrics=metrics),
        record=ft.Record(args.out, config=config, final=of_test),
        checkpoints=ft.Checkpoints(args.out / "checkpoints", every=ft.Every(updates=25), keep_best="valid/loss"),
        log=ft.Every(updates=5),
        stop=ft.EarlyStopping("valid/loss", patience=5),
        hooks=[Report()],
        load_best_on_end=True,
    )
    found = of_test(result.state.params)
    print(f"\nbest after step {int(result.state.step)} of {updates}, stopped: {result.stopped}")
    print(f"labels by predictions:\n{found['confusion']}")
    print(f"\ntest loss {found['loss']:.6f}\ntest accuracy {found['accuracy']:.3f}")


if __name__ == "__main__":
    main()
