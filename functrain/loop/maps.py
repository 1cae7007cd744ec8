"""Functions of examples and of batches, and the random numbers that each example has."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from functrain.errors import DataError
from functrain.loop.tensors import arrays_of
from functrain.tree.paths import flatten

Batch: TypeAlias = dict[str, Any]

_NOT_NUMERIC = "OSUmM"  # Objects, text and times, by `dtype.kind`; V are the dtypes of JAX's own, such as bfloat16.


@dataclasses.dataclass(frozen=True)
class ExampleMap:
    """A function of one example, for all of a batch.

    Attributes:
      function: `function(example)`, or one that declares `rng` too.
      number: how many maps are before it; two draw other numbers.
    """

    function: Callable[..., Any]
    number: int

    def __post_init__(self) -> None:
        if "key" in _declared(self.function):
            raise DataError(
                f"{self}: the function declares 'key', which would be JAX's, and runs on the host: declare rng, a NumPy"
                " generator; or augment on the device, in the loss function, which may declare key"
            )

    def __str__(self) -> str:
        return f"map_examples({_name(self.function)})"

    def __call__(self, batch: Any, rows: np.ndarray, seed: int, epoch: int) -> Any:
        """The batch of what the function makes of each example, whose numbers in the data are the rows."""
        leaves, treedef = jax.tree.flatten(batch)
        examples = (jax.tree.unflatten(treedef, [leaf[i] for leaf in leaves]) for i in range(len(rows)))
        if "rng" not in _declared(self.function):
            return batch_of([self.function(example) for example in examples], self)
        rngs = _generators(seed, epoch, self.number, rows)
        drawn = zip(examples, rngs, strict=True)
        return batch_of([self.function(example, rng=rng) for example, rng in drawn], self)


@dataclasses.dataclass(frozen=True)
class BatchMap:
    """A function of a whole batch.

    Attributes:
      function: `function(batch)`.
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if random := {"key", "rng"} & _declared(self.function):
            raise DataError(
                f"{self}: the function declares {random.pop()!r}, but what is random of a whole batch would depend on"
                " its size and on the number of processes: write data.map_examples(function) with rng, or draw in the"
                " loss function, which may declare key"
            )

    def __str__(self) -> str:
        return f"map_batches({_name(self.function)})"

    def __call__(self, batch: Any, rows: np.ndarray, seed: int, epoch: int) -> Any:
        """What the function makes of the batch."""
        made = arrays_of(self.function(batch))
        if not isinstance(made, Mapping):
            raise DataError(f"{self}: it returned {made!r:.80}: return a batch, a dict of arrays by name")
        for path, leaf in flatten(made).items():
            if np.shape(leaf)[:1] != rows.shape:
                raise DataError(
                    f"{self}: it returned {path!r} of shape {np.shape(leaf)} for a batch of {len(rows)}; return one row"
                    " for each example"
                )
        return made


def batch_of(examples: list[Any], who: Any) -> Batch:
    """Examples as one batch.

    Args:
      examples: dicts of arrays or numbers, one or more.
      who: returned them, for messages.

    Raises:
      DataError: one is no such dict, or they differ in names, shapes or dtypes.
    """
    examples = [arrays_of(example) for example in examples]
    for example in examples:
        if not isinstance(example, Mapping):
            raise DataError(f"{who}: it returned {example!r:.80}: return an example, a dict of arrays by name")
    flat, treedefs = zip(*map(jax.tree.flatten, examples), strict=True)
    for example, treedef in zip(examples, treedefs, strict=True):
        if treedef != treedefs[0]:
            one, other = [*flatten(examples[0])], [*flatten(example)]
            raise DataError(f"{who}: it returned {one} of one example, {other} of another; return the same names")
    columns = map(functools.partial(_column, who), flatten(examples[0]), zip(*flat, strict=True))
    batch: Batch = jax.tree.unflatten(treedefs[0], columns)
    return batch


def _column(who: Any, path: str, values: tuple[Any, ...]) -> np.ndarray:
    arrays = [*map(np.asarray, values)]
    kinds = dict.fromkeys((array.dtype, array.shape) for array in arrays)
    if len(kinds) > 1:
        one, other = (f"{dtype} {shape}" for dtype, shape in [*kinds][:2])
        raise DataError(
            f"{who}: {path!r} is {one} of one example and {other} of another, which make no batch; return"
            " arrays of one shape and dtype, cropped, padded or cast"
        )
    if arrays[0].dtype.kind in _NOT_NUMERIC:
        raise DataError(f"{who}: {path!r} is of dtype {arrays[0].dtype}; return numbers, or leave it out")
    return np.stack(arrays)


def _generators(seed: int, epoch: int, number: int, rows: np.ndarray) -> Any:
    """A generator for each example, which follows from these numbers and its own alone."""
    # Spawned, as a sequence of [seed, epoch] alone is that of the order.
    key = np.random.SeedSequence([seed, epoch], spawn_key=(number,)).generate_state(2, np.uint64)
    for row in rows.tolist():
        # Of one key, each example has 2**192 numbers of its own, which is three times as fast as a seed for each.
        yield np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, row], np.uint64)))


def _declared(function: Callable[..., Any]) -> set[str]:
    try:
        return {*inspect.signature(function).parameters}
    except ValueError:  # Some that are written in C do not say.
        return set()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or repr(function)
