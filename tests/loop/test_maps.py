"""Functions of examples and batches: what is drawn for an example is its own, wherever and whenever it is read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft


def rows(n, batch_size, **options):
    return ft.from_arrays({"row": np.arange(n)}, batch_size, **options)


def drawing(example, rng):
    return {**example, "drawn": rng.random(2)}


def drawn(data, epoch=0):
    """What each example drew in an epoch, by its row."""
    batches = list(data.epoch(epoch))
    pairs = [zip(batch["row"].tolist(), batch["drawn"].tolist(), strict=True) for batch in batches]
    return {row: tuple(draw) for each in pairs for row, draw in each}


def test_a_function_of_an_example_is_called_with_each_without_its_leading_axis():
    def brighter(example):
        return {"image": example["image"] * np.float32(2), "label": example["label"], "size": example["image"].size}

    arrays = {"image": np.arange(24, dtype=np.float32).reshape(6, 2, 2), "label": np.arange(6, dtype=np.int16)}
    first, second = ft.from_arrays(arrays, 4, shuffle=False).map_examples(brighter)
    assert first["image"].tolist() == (2 * arrays["image"][:4]).tolist()
    assert {name: (array.shape, array.dtype.name) for name, array in second.items()} == {
        "image": ((2, 2, 2), "float32"),
        "label": ((2,), "int16"),
        "size": ((2,), "int64"),
    }


@given(
    n=st.integers(1, 30),
    share=st.integers(1, 9),
    processes=st.integers(1, 3),
    epoch=st.integers(0, 9),
    shuffle=st.booleans(),
    last=st.sampled_from(["drop", "pad"]),
)
def test_what_an_example_draws_is_the_same_for_any_batch_size_order_and_number_of_processes(
    n, share, processes, epoch, shuffle, last
):
    alone = drawn(rows(30, 1, seed=4, shuffle=False).map_examples(drawing), epoch)
    batch_size = share * processes
    if last == "drop" and n < batch_size:
        return
    data = rows(30, batch_size, seed=4, shuffle=shuffle, last="pad").map_examples(drawing).take(n)
    data = dataclasses.replace(data, last=last, processes=processes)
    parts = [drawn(dataclasses.replace(data, process=process), epoch) for process in range(processes)]
    assert all(alone[row] == draw for part in parts for row, draw in part.items())
    assert len({row for part in parts for row in part}) == (n if last == "pad" else n - n % batch_size)


def test_examples_epochs_seeds_and_maps_draw_each_their_own():
    def again(example, rng):
        return {**example, "again": rng.random(2)}

    data = [rows(8, 3, seed=seed).map_examples(drawing).map_examples(again) for seed in (0, 1)]
    batches = [batch for each in data for epoch in (0, 1) for batch in each.epoch(epoch)]
    numbers = np.concatenate([batch[name].ravel() for batch in batches for name in ("drawn", "again")])
    assert len({*numbers.tolist()}) == 2 * 2 * 2 * 8 * 2


def test_the_numbers_are_those_of_every_version():
    """A change of these breaks the runs that are to be resumed."""
    data = rows(3, 3, seed=42, shuffle=False)
    raw = data.map_examples(lambda example, rng: {"raw": np.uint64(rng.bit_generator.random_raw())})
    assert next(raw.epoch(5))["raw"].tolist() == [18012009986097695113, 17671885159251345424, 4552525301625929410]


def test_a_new_iterator_goes_on_with_the_numbers_that_another_would_have_drawn():
    data = rows(20, 3, seed=1).map_examples(drawing)
    interrupted = data.epoch(2)
    for _ in range(4):
        next(interrupted)
    assert interrupted.get_state() == {"next_index": 4}
    resumed = data.epoch(2)
    resumed.set_state({"next_index": 4})
    assert runs.bits(list(resumed)) == runs.bits(list(interrupted)) == runs.bits(list(data.epoch(2))[4:])


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_a_run_that_is_resumed_in_an_epoch_ends_with_the_same_bits(tmp_path, read_ahead):
    def noisy(example, rng):
        return {**example, "x": example["x"] + rng.normal(size=3).astype(np.float32)}

    def run(directory, steps):
        data = dataclasses.replace(runs.data_of(seed=3), read_ahead=read_ahead).map_examples(noisy)
        checkpoints = ft.Checkpoints(directory, every=ft.Every(updates=100))
        update = runs.update_of()
        return ft.fit(update, update.init(runs.start()), data, steps=steps, checkpoints=checkpoints).state

    whole = run(tmp_path / "whole", 13)
    run(tmp_path / "in two", 7)
    assert runs.bits_of(run(tmp_path / "in two", 13)) == runs.bits_of(whole)


def test_datasets_are_mapped_too_where_they_are_read_on_several_threads():
    def noisy(example, rng):
        return {"image": example["image"] / np.float32(255) + np.float32(rng.random()), "label": example["label"]}

    with tfds.testing.mock_data(num_examples=50):
        data = ft.from_tfds("mnist", "train", 8, seed=2).map_examples(noisy)
        assert data.read_ahead > 1
        ahead = [batch["image"] for batch in data.epoch(1)]
        alone = [batch["image"] for batch in dataclasses.replace(data, read_ahead=0).epoch(1)]
    assert [image.shape for image in ahead] == [(8, 28, 28, 1)] * 6 + [(2, 28, 28, 1)]
    assert runs.bits(ahead) == runs.bits(alone)


def test_a_function_of_a_batch_is_given_all_of_it_without_the_weight_of_padding():
    def normalized(batch):
        assert set(batch) == {"row"}
        return {"row": batch["row"] / 2, "twice": np.stack([batch["row"]] * 2, axis=1)}

    batches = list(rows(3, 2, shuffle=False, last="pad").map_batches(normalized))
    assert [batch["row"].tolist() for batch in batches] == [[0.0, 0.5], [1.0, 1.0]]
    assert [batch["weight"].tolist() for batch in batches] == [[1.0, 1.0], [1.0, 0.0]]
    assert batches[0]["twice"].tolist() == [[0, 0], [1, 1]]


def test_maps_follow_one_another_and_take_keeps_the_first_examples():
    data = rows(100, 2, seed=7).map_examples(lambda example: {"x": int(example["row"]) + 1})
    data = data.take(5).map_batches(lambda batch: {"x": batch["x"] * 10}).take(4)
    assert (len(data), data.examples) == (2, 4)
    assert sorted(x for batch in data.epoch(1) for x in batch["x"].tolist()) == [10, 20, 30, 40]
    assert [batch["x"].tolist() for batch in data.epoch(1)] != [batch["x"].tolist() for batch in data.epoch(0)]


def test_a_function_that_writes_to_its_example_does_not_write_to_the_data():
    def zeroed(example):
        example["x"][:] = 0
        return example

    array = np.ones((4, 2))
    batches = list(ft.from_arrays({"x": array}, 2).map_examples(zeroed))
    assert not any(batch["x"].any() for batch in batches)
    assert array.all()


def test_arrays_of_jax_make_a_batch_too():
    data = rows(4, 2, shuffle=False).map_examples(lambda example: {"x": jnp.bfloat16(example["row"])})
    assert [batch["x"].dtype for batch in data] == [jnp.bfloat16, jnp.bfloat16]


def test_a_run_learns_from_mapped_data():
    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.5)})
    update = ft.make_update(lambda params, batch: jnp.mean((params["w"] - batch["x"]) ** 2), optim)
    data = rows(8, 2).take(4).map_examples(lambda example: {"x": np.float32(3)})
    assert math.isclose(ft.fit(update, update.init(params), data, epochs=9).state.params["w"], 3, rel_tol=1e-5)


def augment(example, key):
    return {"row": example["row"] + jax.random.bernoulli(key)}


def nothing(given):
    given["row"] = 0


def ragged(example):
    return {"x": np.zeros(int(example["row"]) + 1, np.float32)}


def by_turns(example):
    return {"x": 1} if example["row"] else {"x": 1, "y": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda data: data.map_examples(augment),
            "map_examples(augment): the function declares 'key', which would be JAX's, and runs on the host: declare"
            " rng, a NumPy generator; or augment on the device, in the loss function, which may declare key",
        ),
        (
            lambda data: data.map_examples(nothing),
            "map_examples(nothing): it returned None: return an example, a dict of arrays by name",
        ),
        (
            lambda data: data.map_examples(ragged),
            "map_examples(ragged): 'x' is float32 (1,) of one example and float32 (2,) of another, which make no batch;"
            " return arrays of one shape and dtype, cropped, padded or cast",
        ),
        (
            lambda data: data.map_examples(lambda example: {"x": 1 if example["row"] else 1.0}),
            "map_examples(<lambda>): 'x' is float64 () of one example and int64 () of another",
        ),
        (
            lambda data: data.map_examples(by_turns),
            "map_examples(by_turns): it returned ['x', 'y'] of one example, ['x'] of another; return the same names",
        ),
        (
            lambda data: data.map_examples(lambda example: {"title": "a"}),
            "map_examples(<lambda>): 'title' is of dtype <U1; return numbers, or leave it out",
        ),
        (
            lambda data: data.map_batches(drawing),
            "map_batches(drawing): the function declares 'rng', but what is random of a whole batch would depend on its"
            " size and on the number of processes: write data.map_examples(function) with rng, or draw in the loss"
            " function, which may declare key",
        ),
        (
            lambda data: data.map_batches(nothing),
            "map_batches(nothing): it returned None: return a batch, a dict of arrays by name",
        ),
        (
            lambda data: data.map_batches(lambda batch: {"x": np.zeros((3, 2))}),
            "map_batches(<lambda>): it returned 'x' of shape (3, 2) for a batch of 2; return one row for each example",
        ),
        (lambda data: data.take(9), "take(9) of 8 examples: write a number from 1 to 8"),
        (lambda data: data.take(0), "take(0) of 8 examples: write a number from 1 to 8"),
        (
            lambda data: dataclasses.replace(data, last="pad").map_examples(lambda example: {"weight": 1.0}),
            "last='pad' adds the key 'weight', which the data has already",
        ),
    ],
)
def test_mistakes_are_found_at_once_and_say_what_to_write(make, message):
    with pytest.raises(ft.DataError) as raised:
        make(rows(8, 4))
    assert message in str(raised.value)


def test_a_state_of_other_batches_is_refused():
    with pytest.raises(ft.DataError) as raised:
        rows(8, 4).epoch(0).set_state({"next_index": 3})
    assert str(raised.value) == (
        "set_state({'next_index': 3}): the epoch has 2 batches; give the state of an epoch of the same data, in batches"
        " of the same size"
    )
