"""Batches of sources that give examples by number."""

import re

import grain
import numpy as np
import pytest

import functrain as ft
from functrain.errors import DataError

X = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)


def examples(count=30):
    return [{"x": X[number], "of": {"row": np.int16(number)}} for number in range(count)]


def bits(batches):
    return [{path: (leaf.dtype, leaf.tobytes()) for path, leaf in ft.flatten(batch).items()} for batch in batches]


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
def test_a_source_and_a_dataset_of_grain_give_the_batches_of_arrays(last):
    options = {"batch_size": 8, "seed": 5, "last": last}
    arrays = ft.from_arrays({"x": X, "row": np.arange(30, dtype=np.int16)}, **options)
    dataset = grain.MapDataset.source(examples()).map(lambda example: {"x": example["x"], "row": example["of"]["row"]})
    for epoch in (0, 3):
        assert bits(ft.from_source(dataset, **options).epoch(epoch)) == bits(arrays.epoch(epoch))
    nested = next(ft.from_source(examples(), **options).epoch(0))
    np.testing.assert_array_equal(nested["of"]["row"], next(arrays.epoch(0))["row"])


def test_a_process_reads_the_examples_of_its_slices_and_no_others():
    read = []
    source = grain.MapDataset.source(examples(16)).map(lambda example: read.append(example["of"]["row"]) or example)
    whole = next(ft.from_source(source, 16, seed=1).epoch(0))["of"]["row"]
    mine = ft.from_source(source, 16, seed=1).over((0, 3), 4)
    read.clear()
    assert [*next(mine.epoch(0))["of"]["row"]] == [*whole[:4], *whole[12:]]
    assert sorted(read) == sorted([*whole[:4], *whole[12:]])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            lambda: iter(examples()),
            "from_source(list_iterator) has no examples by number: give one with len(source) and",
        ),
        (list, "from_source(list) has no examples by number"),
        (
            lambda: grain.MapDataset.source(examples()).to_iter_dataset(),
            "has no examples by number: give one with len(source) and source[0], such as grain.MapDataset.source(files)"
            ".map(function), before it is batched or made an iterator",
        ),
        (
            lambda: grain.MapDataset.source(examples()).repeat(),
            "from_source(RepeatMapDataset) repeats without end: leave repeat() out, and say how often in fit(...,",
        ),
        (
            lambda: grain.MapDataset.source(examples()).filter(lambda example: False),
            "from_source(FilterMapDataset): it returned None: return an example, a dict of arrays by name",
        ),
        (lambda: [(1, 2)], "from_source(list): it returned (1, 2): return an example, a dict of arrays by name"),
        (
            lambda: [{"x": np.ones(2)}, {"x": np.ones(3)}],
            "from_source(list): 'x' is float64 (2,) of one example and float64 (3,) of another, which make no batch",
        ),
    ],
)
def test_a_source_without_examples_by_number_says_what_to_give(source, said):
    with pytest.raises(DataError, match=re.escape(said)):
        ft.from_source(source(), 2)
