"""Batches for a training loop: a function of seed and epoch, one slice for each process, resumable anywhere."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import jax
import numpy as np

if TYPE_CHECKING:
    import grain

from functrain.errors import DataError
from functrain.loop.datasets import builder_of, source_of, stacked
from functrain.loop.maps import Batch, BatchMap, ExampleMap
from functrain.loop.tensors import arrays_of
from functrain.tree.warn import warn

Last: TypeAlias = Literal["keep", "drop", "pad"]


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of a dataset, epoch by epoch; made by `from_arrays`, `from_tfds`, `from_source`.

    >>> data = from_arrays({"x": np.arange(5)}, batch_size=2, seed=7)
    >>> [batch["x"].tolist() for batch in data.epoch(0)]
    [[3, 4], [0, 2], [1]]
    >>> [batch["x"].tolist() for batch in data.epoch(1)]
    [[1, 3], [2, 4], [0]]

    Iterating over it is iterating over its epoch 0; its length is that of an epoch, in batches.

    Attributes:
      fetch: the examples of these numbers, int64 (n,), as one batch of n.
      examples: how many there are.
      batch_size, seed, shuffle, last: as given to `from_arrays`.
      process: this process's number, or the numbers of its slices.
      processes: into how many equal slices each batch is cut: process p gets the p-th.
      read_ahead: the batches that are read in advance, each on a thread of its own.
      maps: what `map_examples` and `map_batches` added, in their order.
    """

    fetch: Callable[[np.ndarray], Batch] = dataclasses.field(repr=False)
    examples: int
    batch_size: int
    seed: int
    shuffle: bool
    last: Last
    process: int | tuple[int, ...]
    processes: int
    read_ahead: int
    maps: tuple[ExampleMap | BatchMap, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.last not in get_args(Last):
            raise DataError(f"last={self.last!r}: write 'keep', 'drop' or 'pad'")
        for name in ("batch_size", "seed"):
            if not hasattr(value := getattr(self, name), "__index__"):
                raise DataError(
                    f"{name}={value!r} ({type(value).__name__}): write a whole number, batch_size=32, seed=0"
                )
        if self.seed < 0:
            raise DataError(f"seed={self.seed}: write an integer that is not negative")
        if self.batch_size < 1 or self.batch_size % self.processes:
            raise DataError(
                f"batch_size={self.batch_size} over {self.processes} process(es): it counts the examples of all"
                f" processes; write a positive multiple of {self.processes}"
            )
        short = self.examples % self.batch_size
        if self.last == "keep" and short % self.processes:
            raise DataError(
                f"{self.examples} examples in batches of {self.batch_size} leave a last one of {short}, which"
                f" {self.processes} processes cannot share equally; write last='pad' or last='drop'"
            )
        if not len(self):
            raise DataError(
                f"{self.examples} example(s) make no batch of {self.batch_size} with last='drop';"
                " write last='keep' or last='pad', or a smaller batch_size"
            )
        # Two examples, as one has no shape to differ from.
        if "weight" in self._fetched(np.arange(min(self.examples, 2)), 0) and self.last == "pad":
            raise DataError(
                "last='pad' adds the key 'weight', which the data has already; rename it, or write last='keep'"
                " or last='drop'"
            )

    def __len__(self) -> int:
        """The batches of an epoch, the same number in every process."""
        return self.examples // self.batch_size if self.last == "drop" else -(-self.examples // self.batch_size)

    def __iter__(self) -> "grain.DatasetIterator[Batch]":
        return self.epoch(0)

    def epoch(self, epoch: int) -> "grain.DatasetIterator[Batch]":
        """The batches of one epoch, in the order that the seed and the epoch's number say.

        >>> data = from_arrays({"x": np.arange(6)}, batch_size=2, shuffle=False)
        >>> batches = data.epoch(3)
        >>> next(batches)["x"].tolist(), batches.get_state()
        ([0, 1], {'next_index': 1})
        >>> resumed = data.epoch(3)
        >>> resumed.set_state({"next_index": 1})
        >>> next(resumed)["x"].tolist()
        [2, 3]

        Args:
          epoch: its number, from 0.

        Raises:
          DataError: the number is negative.

        Returns:
          A Grain iterator. Its state is the number of batches that it gave; the epoch's number is not in it.
        """
        from functrain.loop.epoch import Epoch

        if epoch < 0:
            raise DataError(f"epoch({epoch}): epochs are counted from 0; write epoch(0) for the first")
        return Epoch(functools.partial(self._batch, self._order(epoch), epoch), len(self), self.read_ahead)

    def take(self, count: int) -> "Data":
        """The first examples alone, in batches as before.

        >>> data = from_arrays({"x": np.arange(100)}, batch_size=2, seed=7).take(4)
        >>> [batch["x"].tolist() for batch in data]
        [[3, 0], [2, 1]]

        Args:
          count: how many; they are shuffled among themselves.

        Raises:
          DataError: there are fewer, or they cannot be batched as before.
        """
        if not 1 <= count <= self.examples:
            raise DataError(f"take({count}) of {self.examples} examples: write a number from 1 to {self.examples}")
        return dataclasses.replace(self, examples=count)

    def over(self, slices: tuple[int, ...], of: int) -> "Data":
        """The same batches, of which this process reads some of so many equal slices: `fit(..., sharding=)` calls it.

        >>> data = from_arrays({"x": np.arange(8)}, batch_size=8, shuffle=False)
        >>> next(data.over((0, 3), 4).epoch(0))["x"].tolist()
        [0, 1, 6, 7]
        """
        return dataclasses.replace(self, process=slices, processes=of)

    def map_examples(self, function: Callable[..., Mapping[str, Any]]) -> "Data":
        """What a function makes of each example, one at a time.

        >>> def flip(example, rng):
        ...     return {"x": example["x"][::-1] if rng.random() < 0.5 else example["x"]}
        >>> data = from_arrays({"x": np.arange(8).reshape(4, 2)}, batch_size=2, seed=7).map_examples(flip)
        >>> [batch["x"].tolist() for batch in data]
        [[[7, 6], [1, 0]], [[5, 4], [3, 2]]]

        The numbers that an example's `rng` draws follow from the seed, the epoch and the example's place in the data
        alone: they are the same after a resume, for any batch size and any number of processes, in the order of any
        epoch. NumPy may draw others from one release to the next.

        Args:
          function: `function(example)` or `function(example, rng)`, of a dict of arrays, those of a batch without their
            leading axis, and a `numpy.random.Generator`; it returns such a dict, of one shape for all. It is called on
            the host, with two examples at once, and where a dataset is read on several threads, on each of these.

        Raises:
          DataError: the function declares `key`, or what it returns cannot be stacked to a batch, which may show only
            at a later one.
        """
        return dataclasses.replace(self, maps=(*self.maps, ExampleMap(function, len(self.maps))))

    def map_batches(self, function: Callable[[Batch], Mapping[str, Any]]) -> "Data":
        """What a function makes of each batch, which is faster than of each example.

        >>> data = from_arrays({"x": np.arange(4)}, batch_size=2, shuffle=False)
        >>> [batch["x"].tolist() for batch in data.map_batches(lambda batch: {"x": batch["x"] / 2})]
        [[0.0, 0.5], [1.0, 1.5]]

        Args:
          function: `function(batch)`, of the batch of this process, before `last="pad"` adds the weight; it returns a
            dict of arrays, with one row for each example.

        Raises:
          DataError: the function declares `rng` or `key`, or returns something else.
        """
        return dataclasses.replace(self, maps=(*self.maps, BatchMap(function)))

    def _fetched(self, rows: np.ndarray, epoch: int) -> Batch:
        batch = self.fetch(rows)
        for each in self.maps:
            batch = each(batch, rows, self.seed, epoch)
        return batch

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.examples)
        # NumPy promises PCG64's bits for all versions to come, `Generator.permutation` it may change: a run that
        # resumes on another NumPy would see some examples twice.
        return np.random.PCG64([self.seed, epoch]).random_raw(self.examples).argsort(kind="stable")

    def _batch(self, order: np.ndarray, epoch: int, number: int) -> Batch:
        start = number * self.batch_size
        size = self.batch_size if self.last == "pad" else min(self.batch_size, self.examples - start)
        share = size // self.processes
        slices = np.atleast_1d(self.process)[:, None]
        places = start + (slices * share + np.arange(share)).ravel()
        rows = order[np.minimum(places, self.examples - 1)]  # Of what is padded, the last one.
        if self.last != "pad":
            return self._fetched(rows, epoch)
        return {**self._fetched(rows, epoch), "weight": (places < self.examples).astype(np.float32)}


def from_arrays(
    arrays: Mapping[str, Any], batch_size: int, *, seed: int = 0, shuffle: bool = True, last: Last = "keep"
) -> Data:
    """Batches of arrays in memory.

    >>> data = from_arrays({"image": np.zeros((5, 8, 8)), "label": np.arange(5)}, batch_size=4, last="pad")
    >>> len(data)
    2
    >>> [batch["weight"].tolist() for batch in data]
    [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]

    With several processes each builds the same data, after `jax.distributed.initialize`, and gets its own slice of each
    batch. A batch is cut into equal slices, so that all processes see the same number of batches of the same shape: a
    last batch that cannot be cut so must be padded or dropped.

    Args:
      arrays: `{name: (examples, ...)}`, what `np.asarray` takes, and PyTorch tensors on the CPU; arrays, memory maps
        and tensors are not copied.
      batch_size: examples in a batch, over all processes; a multiple of their number.
      seed: the order of an epoch follows from it and the epoch's number alone, in every process and every run.
      shuffle: False keeps the order of the arrays.
      last: what becomes of a last batch that is short: "keep" it, "drop" it, or "pad" it with the last example and add
        to every batch "weight", float32 (batch,), 1 for an example and 0 for padding, so that all have one shape.

    Raises:
      DataError: the arrays have no common number of examples, or cannot be batched as asked.

    Returns:
      Data whose batches are `{name: (batch, ...)}`, new NumPy arrays of the dtypes given.
    """
    if not isinstance(arrays, Mapping):
        raise DataError(
            f'from_arrays takes arrays by name, from_arrays({{"image": images, "label": labels}}, batch_size=32), not'
            f" {type(arrays).__name__}; a batch is then {{name: rows}}"
        )
    columns = {name: np.asarray(array) for name, array in arrays_of(dict(arrays)).items()}
    lengths = {name: len(column) if column.ndim else None for name, column in columns.items()}
    examples = next(iter(lengths.values()), None)
    if not examples or len(set(lengths.values())) > 1:
        raise DataError(
            f"the arrays have the lengths {lengths}; give at least one, and to each the same leading axis,"
            " one row an example, not empty"
        )

    def fetch(rows: np.ndarray) -> Batch:
        return {name: _gathered(column, rows) for name, column in columns.items()}

    return data_of(fetch, examples, batch_size, seed=seed, shuffle=shuffle, last=last, read_ahead=0)


def from_tfds(
    builder: Any,
    split: str,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    last: Last = "keep",
    data_dir: str | os.PathLike[str] | None = None,
    builder_kwargs: Mapping[str, Any] | None = None,
) -> Data:
    """Batches of a dataset of tensorflow-datasets, read from array_record files without TensorFlow.

    >>> import tensorflow_datasets as tfds
    >>> with tfds.testing.mock_data(num_examples=100):
    ...     batch = next(from_tfds("mnist", "train", batch_size=32).epoch(0))
    >>> {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    {'image': ((32, 28, 28, 1), 'uint8'), 'label': ((32,), 'int64')}

    A dataset that has not been prepared is downloaded and written first. tensorflow-datasets needs TensorFlow to write
    some features, such as images, and none to read them. Of several processes that share a folder, let one prepare it.

    Args:
      builder: a dataset's name, or a builder made with `file_format="array_record"`.
      split: "train", "train[:90%]" and the like.
      batch_size, seed, shuffle, last: as for `from_arrays`.
      data_dir: where datasets are kept; None for tensorflow-datasets' own folder. Only with a name.
      builder_kwargs: other arguments of the builder. Only with a name.

    Raises:
      DataError: the dataset is in another file format, cannot be written here, has a feature that is text or of
        several shapes (which may show only at a later batch), or cannot be batched as asked.

    Returns:
      Data whose batches are NumPy arrays of the dtypes that the features declare, nested as they are.
    """
    builder = builder_of(builder, data_dir, builder_kwargs or {})
    source = source_of(builder, split)
    dtypes = builder.info.features.np_dtype

    def fetch(rows: np.ndarray) -> Batch:
        # `source.__getitems__` is no faster on local files, where decoding is the work; elsewhere, reading ahead is.
        records = [source[row] for row in rows.tolist()]
        return {name: stacked(name, [record[name] for record in records], dtypes[name]) for name in dtypes}

    return data_of(fetch, len(source), batch_size, seed=seed, shuffle=shuffle, last=last, read_ahead=4)


def data_of(fetch: Callable[[np.ndarray], Batch], examples: int, batch_size: int, **options: Any) -> Data:
    """Data that all processes read together; warns of a batch size of more than all examples.

    Args:
      fetch: from the numbers of examples to these.
      examples: how many there are.
      batch_size: over all processes.
      **options: the other fields.
    """
    everyone = {"process": jax.process_index(), "processes": jax.process_count()}
    data = Data(fetch=fetch, examples=examples, batch_size=batch_size, **everyone, **options)
    if data.last == "keep" and batch_size > examples:
        warn(
            f"batch_size={batch_size} of {examples} examples: an epoch is one batch of {examples}; write"
            f" batch_size={examples}, or less for more updates in an epoch"
        )
    return data


def _gathered(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # `take` is the faster for small rows, but copies all of an array first that does not lie in its order.
    if not (column.flags.c_contiguous and column.flags.aligned):
        return np.asarray(column[rows])
    return np.asarray(column.take(rows, axis=0, mode="clip"))  # All are there, and are not looked for.
