"""The data of the examples: handwritten digits from tensorflow-datasets, read through Grain, without TensorFlow."""

from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from sklearn import datasets, model_selection


class FunctrainDigits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 digits of 8x8 pixels that come with scikit-learn, 1,437 to train with and 360 to test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
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

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        digits = datasets.load_digits()
        train, test = model_selection.train_test_split(
            np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
        )
        return {"train": self._generate_examples(digits, train), "test": self._generate_examples(digits, test)}

    def _generate_examples(self, digits: Any, rows: np.ndarray) -> Any:
        for row in rows:
            image = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)  # As it comes: 0 to 16.
            yield int(row), {"image": image[..., None], "label": int(digits.target[row])}


def load(dataset: str, data_dir: str | None = None) -> dict[str, Any]:
    """Writes a dataset, unless it has been written before, and opens its splits for random access.

    Args:
      dataset: "digits", or "mnist" (which tensorflow-datasets downloads, and writes with TensorFlow).
      data_dir: where datasets are kept; None for tensorflow-datasets' own folder.
    """
    options: dict[str, Any] = {"data_dir": data_dir, "file_format": "array_record"}
    builder = FunctrainDigits(**options) if dataset == "digits" else tfds.builder(dataset, **options)
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    splits = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}
    return {name: builder.as_data_source(split=split) for name, split in splits.items()}


def batches(source: Any, batch_size: int, *, shuffle_seed: int | None = None) -> Any:
    """One epoch of batches; with a seed shuffled, each image moved by up to a pixel.

    Returns:
      `{"image": float32 (batch, height, width, 1) in [0, 1], "label": int32 (batch,)}`; the last one may be short.
    """
    records = grain.MapDataset.source(source).map(_as_float)
    if shuffle_seed is not None:
        records = records.seed(shuffle_seed).shuffle().random_map(_shift)
    return records.batch(batch_size)


def _as_float(record: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"image": record["image"].astype(np.float32) / 255, "label": np.int32(record["label"])}


def _shift(record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    height, width, _ = record["image"].shape
    down, right = rng.integers(0, 3, size=2)
    padded = np.pad(record["image"], ((1, 1), (1, 1), (0, 0)))
    return record | {"image": padded[down : down + height, right : right + width]}
