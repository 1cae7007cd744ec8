"""Datasets of tensorflow-datasets: how one is found, prepared, and read into batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from functrain.errors import DataError


def builder_of(builder: Any, data_dir: Any, builder_kwargs: Mapping[str, Any]) -> Any:
    """The builder of a dataset's name, or the one that is given."""
    import tensorflow_datasets as tfds

    if isinstance(builder, str):
        made = tfds.builder(builder, data_dir=data_dir, **builder_kwargs)
        if made.is_prepared():
            return made
        return tfds.builder(builder, data_dir=data_dir, **{"file_format": "array_record", **builder_kwargs})
    if not isinstance(builder, tfds.core.DatasetBuilder) or data_dir is not None or builder_kwargs:
        raise DataError(
            f"from_tfds({builder!r}, data_dir={data_dir!r}, builder_kwargs={dict(builder_kwargs)}): write a dataset's"
            ' name, or a builder made with all of these, Digits(data_dir=..., file_format="array_record")'
        )
    return builder


def source_of(builder: Any, split: str) -> Any:
    """The examples of a split, prepared if need be, in what can be read at random."""
    info = builder.info
    wrong_format = DataError(
        f"{info.full_name} has the file format {info.as_proto.file_format}, which cannot be read at random; write"
        f' file_format="array_record", and another data_dir if {builder.data_dir} holds the dataset already'
    )
    if not builder.is_prepared():
        if info.file_format not in type(info.file_format).with_random_access():
            raise wrong_format
        try:
            builder.download_and_prepare()
        except ImportError as error:
            reason = str(error).rpartition("\n")[2]
            raise DataError(
                f"{info.full_name} cannot be written here: {reason}. Writing some features needs"
                " TensorFlow, reading none: call download_and_prepare() of a builder with"
                ' file_format="array_record" where it is installed, or in a dataset of your own write'
                " tfds.features.Tensor for Image"
            ) from error
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise wrong_format from error


def stacked(name: str, values: list[Any], dtype: Any) -> Any:
    """One feature of several examples as one array of the declared dtype, nested as it is."""
    if isinstance(values[0], Mapping):
        return {key: stacked(f"{name}/{key}", [value[key] for value in values], dtype[key]) for key in dtype}
    try:
        # The declared dtype, as a record holds scalars as Python numbers.
        array = np.stack([np.asarray(value, dtype) for value in values])
    except (TypeError, ValueError):
        problem = "is not of one shape"
    else:
        if not array.dtype.hasobject:
            return array
        problem = "is text"
    raise DataError(
        f"the feature {name!r} {problem}, and cannot be stacked to a batch; make arrays of one shape of it, or leave it"
        " out: ft.from_source(grain.MapDataset.source(builder.as_data_source(split)).map(function), batch_size)"
    )
