"""A dataset of one's own in tensorflow-datasets: written once, read at random through Grain, without TensorFlow.

The builder below is what tensorflow-datasets asks for; any of its own datasets is used by its name in the same place:
`ft.from_tfds("mnist", "train", 32)`.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from sklearn import datasets, model_selection

import functrain as ft


class FunctrainDigits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 digits of 8x8 pixels that come with scikit-learn, 1,437 to train with and 360 to test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            # `Tensor`, as `Image` needs TensorFlow to write.
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of the UCI machine learning repository, as scikit-learn ships them.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        digits = datasets.load_digits()
        train, test = model_selection.train_test_split(
            np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
        )
        return {"train": self._generate_examples(digits, train), "test": self._generate_examples(digits, test)}

    def _generate_examples(self, digits, rows):
        for row in rows:
            image = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)  # As it comes: 0 to 16.
            yield int(row), {"image": image[..., None], "label": int(digits.target[row])}


def load(data_dir: str | None = None, *, seed: int = 0):
    """Batches of each split; the dataset is written unless it has been before.

    Args:
      data_dir: where datasets are kept; None for tensorflow-datasets' own folder.
      seed: the order of the examples to train with, which is another one in each epoch.
    """
    builder = FunctrainDigits(data_dir=data_dir, file_format="array_record")  # The format that can be read at random.
    tfds.disable_progress_bar()
    return {
        "train": ft.from_tfds(builder, "train[:90%]", 32, seed=seed, last="drop"),
        "validation": ft.from_tfds(builder, "train[90%:]", 32, shuffle=False),
        "test": ft.from_tfds(builder, "test", 32, shuffle=False),
    }


def apply(params, images):
    x = images.reshape(len(images), -1).astype(jnp.float32) / 255
    return jax.nn.relu(x @ params["body"]["kernel"] + params["body"]["bias"]) @ params["head"]["kernel"]


def losses(params, batch):
    """Loss and accuracy of each example, for `ft.Evaluation` to average."""
    logits = apply(params, batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return {"loss": loss, "accuracy": logits.argmax(-1) == batch["label"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its files")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    data = load(args.data_dir)

    body, head = jax.random.split(jax.random.key(0))
    params = {
        "body": {"kernel": jax.random.normal(body, (64, 128)) / 8, "bias": jnp.zeros(128)},
        "head": {"kernel": jax.random.normal(head, (128, 10)) * 128**-0.5},
    }
    parts = ft.partition(params, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": ft.with_lr(optax.adam, 5e-3), "head": ft.with_lr(optax.adam, 1e-3)})
    print(f"{optim}\n")

    update = ft.make_update(lambda params, batch: losses(params, batch)["loss"].mean(), optim)
    state = update.init(params)
    validate = ft.Evaluation(losses, data["validation"])
    for epoch in range(args.epochs):
        for batch in data["train"].epoch(epoch):
            state, _ = update(state, batch)
        print(f"epoch {epoch + 1:2}  " + "  ".join(f"{name} {x:.3f}" for name, x in validate(state.params).items()))
    print(f"\ntest accuracy {ft.Evaluation(losses, data['test'])(state.params)['accuracy']:.3f}")


if __name__ == "__main__":
    main()
