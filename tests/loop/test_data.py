"""Batches: every example once an epoch, in an order that seed and epoch alone say, for any number of processes."""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tracemalloc

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from sklearn import datasets

from functrain.errors import DataError
from functrain.loop.data import from_arrays, from_tfds
from functrain.loop.sources import from_source

ROOT = pathlib.Path(__file__).parents[2]


class Records(tfds.core.GeneratorBasedBuilder):
    """The records that it is given."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, features=None, records=(), **options):
        self.declared, self.records = features, records
        super().__init__(**options)

    def _info(self):
        features = tfds.features.FeaturesDict(self.declared or {})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.records)


class SmallDigits(Records):
    """The first hundred digits of scikit-learn."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **options):
        features = {
            "image": tfds.features.Tensor(shape=(8, 8), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
            "row": {"number": tfds.features.Scalar(np.int16)},
        }
        digits = datasets.load_digits()
        records = [
            {"image": digits.images[i].astype(np.uint8), "label": int(digits.target[i]), "row": {"number": i}}
            for i in range(100)
        ]
        super().__init__(features, records, **options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    builder = SmallDigits(data_dir=tmp_path_factory.mktemp("digits"), file_format="array_record")
    builder.download_and_prepare()
    return builder


def rows(n, batch_size, **options):
    return from_arrays({"row": np.arange(n)}, batch_size, **options)


def lists(batches):
    return [batch["row"].tolist() for batch in batches]


def equal(one, other):
    return set(one) == set(other) and all(
        np.array_equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@given(
    n=st.integers(1, 60),
    share=st.integers(1, 9),
    processes=st.integers(1, 5),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 99),
    shuffle=st.booleans(),
    last=st.sampled_from(["keep", "drop", "pad"]),
)
def test_all_processes_together_see_every_example_once_an_epoch(n, share, processes, seed, epoch, shuffle, last):
    batch_size = share * processes
    try:
        whole = rows(n, batch_size, seed=seed, shuffle=shuffle, last=last)
    except DataError:
        assert last == "drop"
        assert n < batch_size
        return
    batches = list(whole.epoch(epoch))
    assert len(batches) == len(whole)
    real = [row for batch in batches for row in batch["row"][batch.get("weight", np.ones(len(batch["row"]))) == 1]]
    assert len(real) == (n - n % batch_size if last == "drop" else n)
    assert sorted(set(real)) == sorted(real)
    assert {len(batch["row"]) for batch in batches[:-1]} <= {batch_size}

    if last == "keep" and n % batch_size % processes:
        with pytest.raises(DataError, match="cannot share equally"):
            dataclasses.replace(whole, processes=processes)
        return
    shares = [dataclasses.replace(whole, process=process, processes=processes) for process in range(processes)]
    slices = [list(data.epoch(epoch)) for data in shares]
    assert {len(data) for data in shares} == {len(process) for process in slices} == {len(whole)}
    for batch, *parts in zip(batches, *slices, strict=True):
        assert len({len(part["row"]) for part in parts}) == 1
        for name in batch:
            assert np.array_equal(np.concatenate([part[name] for part in parts]), batch[name])


@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), last=st.sampled_from(["keep", "pad"]), data=st.data())
def test_a_new_iterator_goes_on_where_another_stood(n, batch_size, last, data):
    source = rows(n, batch_size, seed=3, last=last)
    interrupted = source.epoch(5)
    done = data.draw(st.integers(0, len(source)))
    before = [next(interrupted) for _ in range(done)]
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = source.epoch(5)
    resumed.set_state(state)
    rest = list(resumed)
    assert lists(before) + lists(rest) == lists(source.epoch(5))
    assert lists(rest) == lists(interrupted)
    assert state == {"next_index": done}


def test_the_order_follows_from_seed_and_epoch_alone():
    data = rows(50, 50, seed=1)
    orders = {(seed, epoch): lists(rows(50, 50, seed=seed).epoch(epoch))[0] for seed in range(4) for epoch in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 16
    assert lists(data.epoch(2)) == lists(data.epoch(2)) == [orders[1, 2]]
    assert lists(data) == [orders[1, 0]]
    assert lists(rows(50, 10, seed=1).epoch(2)) == np.reshape(orders[1, 2], (5, 10)).tolist()


def test_the_order_is_the_one_of_every_version():
    """A change of these numbers breaks the runs that are to be resumed."""
    assert lists(rows(10, 10, seed=42).epoch(3)) == [[0, 8, 6, 5, 1, 3, 7, 4, 2, 9]]


def test_without_shuffling_every_epoch_has_the_order_of_the_data():
    data = rows(5, 2, shuffle=False)
    assert lists(data.epoch(0)) == lists(data.epoch(7)) == [[0, 1], [2, 3], [4]]


def test_a_short_last_batch_is_kept_dropped_or_padded():
    assert lists(rows(5, 3, shuffle=False, last="keep")) == [[0, 1, 2], [3, 4]]
    assert lists(rows(5, 3, shuffle=False, last="drop")) == [[0, 1, 2]]
    padded = list(rows(5, 3, shuffle=False, last="pad"))
    assert lists(padded) == [[0, 1, 2], [3, 4, 4]]
    assert [batch["weight"].tolist() for batch in padded] == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert {batch["weight"].dtype for batch in padded} == {np.dtype(np.float32)}


def test_padding_can_fill_a_whole_process():
    data = rows(5, 4, shuffle=False, last="pad")
    second = list(dataclasses.replace(data, process=1, processes=2))
    assert lists(second) == [[2, 3], [4, 4]]
    assert [batch["weight"].tolist() for batch in second] == [[1.0, 1.0], [0.0, 0.0]]


def test_without_padding_weight_is_a_key_like_any_other():
    data = from_arrays({"weight": np.arange(3)}, 2, shuffle=False)
    assert [batch["weight"].tolist() for batch in data] == [[0, 1], [2]]


def test_batches_have_the_rows_of_all_arrays_in_their_dtypes(tmp_path):
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (6, 4, 4))
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape)
    arrays = {"image": images, "label": [5, 4, 3, 2, 1, 0], "half": np.arange(6, dtype=np.float16)}
    batches = list(from_arrays(arrays, 4, seed=1))
    rows = [6 - 1 - label for batch in batches for label in batch["label"]]
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]
    assert {type(array) for batch in batches for array in batch.values()} == {np.ndarray}
    assert equal(
        {name: np.concatenate([batch[name] for batch in batches]) for name in arrays},
        {name: np.asarray(array)[rows] for name, array in arrays.items()},
    )


def test_a_batch_can_be_written_to_without_changing_the_data():
    array = np.zeros(4)
    data = from_arrays({"x": array}, 4, shuffle=False)
    next(iter(data))["x"][:] = 1
    assert not array.any()


LAYOUTS = {
    "in order": lambda array: array,
    "by column": np.asfortranarray,
    "every other": lambda array: np.repeat(array, 2, axis=0)[::2],
    "backwards": lambda array: array[::-1].copy()[::-1],
    "swapped": lambda array: array.astype(">f8"),
    "unaligned": lambda array: (
        np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(np.float64).reshape(array.shape)
    ),
    "a field": lambda array: np.rec.fromarrays([array, array], names="x,y")["x"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_array_of_any_layout_is_gathered_without_a_copy_of_all_of_it(layout):
    array = LAYOUTS[layout](np.arange(80_000.0).reshape(2_000, 40))
    data = from_arrays({"x": array}, 10, seed=1)
    batches = data.epoch(0)
    tracemalloc.start()
    batch = next(batches)["x"]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < array.nbytes / 4
    expected = array[np.random.PCG64([1, 0]).random_raw(2_000).argsort(kind="stable")[:10]]
    assert batch.tolist() == expected.tolist()


def test_an_epoch_is_a_grain_iterator():
    assert isinstance(rows(4, 2).epoch(0), grain.DatasetIterator)
    assert isinstance(iter(rows(4, 2)), grain.DatasetIterator)


def test_the_data_says_what_it_is():
    assert repr(rows(5, 2)) == (
        "Data(examples=5, batch_size=2, seed=0, shuffle=True, last='keep', process=0, processes=1, read_ahead=0)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: from_arrays({"image": np.ones((3, 2)), "label": np.ones(4)}, 2),
            "the arrays have the lengths {'image': 3, 'label': 4}; give at least one, and to each the same leading"
            " axis, one row an example, not empty",
        ),
        (lambda: from_arrays({"x": np.ones(2), "rate": 0.5}, 2), "lengths {'x': 2, 'rate': None}; give"),
        (lambda: from_arrays({"x": np.ones((0, 3))}, 2), "lengths {'x': 0}; give"),
        (lambda: from_arrays({}, 2), "lengths {}; give"),
        (lambda: rows(5, 2, last="short"), "last='short': write 'keep', 'drop' or 'pad'"),
        (lambda: rows(5, 2, seed=-1), "seed=-1: write an integer that is not negative"),
        (lambda: rows(5, 2).epoch(-1), "epoch(-1): epochs are counted from 0; write epoch(0) for the first"),
        (
            lambda: rows(5, 0),
            "batch_size=0 over 1 process(es): it counts the examples of all processes; write a positive multiple of 1",
        ),
        (
            lambda: dataclasses.replace(rows(8, 2), processes=4),
            "batch_size=2 over 4 process(es): it counts the examples of all processes; write a positive multiple of 4",
        ),
        (
            lambda: dataclasses.replace(rows(7, 4), processes=2),
            "7 examples in batches of 4 leave a last one of 3, which 2 processes cannot share equally;"
            " write last='pad' or last='drop'",
        ),
        (
            lambda: rows(5, 6, last="drop"),
            "5 example(s) make no batch of 6 with last='drop'; write last='keep' or last='pad', or a smaller batch",
        ),
        (
            lambda: from_arrays({"x": np.ones(3), "weight": np.ones(3)}, 2, last="pad"),
            "last='pad' adds the key 'weight', which the data has already; rename it, or write last='keep' or"
            " last='drop'",
        ),
    ],
)
def test_errors_say_what_was_given_and_what_to_write(make, message):
    with pytest.raises(DataError) as raised:
        make()
    assert message in str(raised.value)


def test_a_dataset_is_read_as_it_was_written(digits):
    batches = list(from_tfds(digits, "train", 32, seed=5).epoch(2))
    assert [len(batch["label"]) for batch in batches] == [32, 32, 32, 4]
    numbers = np.concatenate([batch["row"]["number"] for batch in batches])
    assert numbers.dtype == np.int16
    assert sorted(numbers) == list(range(100))
    bunch = datasets.load_digits()
    assert equal(
        {name: np.concatenate([batch[name] for batch in batches]) for name in ("image", "label")},
        {"image": bunch.images[numbers].astype(np.uint8), "label": bunch.target[numbers].astype(np.int64)},
    )


def test_a_dataset_is_found_by_its_name_and_prepared_only_once(tmp_path):
    by_name = [from_tfds("small_digits", "train[:10]", 5, data_dir=tmp_path) for _ in range(2)]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}
    assert written
    by_builder = from_tfds(SmallDigits(data_dir=tmp_path), "train[:10]", 5)
    labels = [[batch["label"].tolist() for batch in data] for data in (*by_name, by_builder)]
    assert labels[0] == labels[1] == labels[2]
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}


@pytest.mark.parametrize("done", [0, 1, 3, 13])
def test_a_dataset_that_is_read_ahead_resumes_exactly(digits, done):
    data = from_tfds(digits, "train", 8, seed=2, last="pad")
    interrupted = data.epoch(4)
    for _ in range(done):
        next(interrupted)
    resumed = data.epoch(4)
    resumed.set_state(interrupted.get_state())
    numbers = [[batch["row"]["number"].tolist() for batch in batches] for batches in (resumed, data.epoch(4))]
    assert numbers[0] == numbers[1][done:]


def test_processes_share_the_batches_of_a_dataset(digits):
    whole = from_tfds(digits, "train", 32, last="pad")
    parts = [list(dataclasses.replace(whole, process=process, processes=4)) for process in range(4)]
    for batch, *slices in zip(whole, *parts, strict=True):
        assert [len(part["label"]) for part in slices] == [8, 8, 8, 8]
        for name in ("image", "label", "weight"):
            assert np.array_equal(np.concatenate([part[name] for part in slices]), batch[name])


def test_sequences_of_one_length_are_stacked(tmp_path):
    features = {"pair": tfds.features.Sequence(tfds.features.Scalar(np.float32), length=2)}
    builder = Records(features, [{"pair": [i, i / 2]} for i in range(3)], data_dir=tmp_path, file_format="array_record")
    pairs = np.concatenate([batch["pair"] for batch in from_tfds(builder, "train", 2)])
    assert pairs.dtype == np.float32
    assert sorted(pairs.tolist()) == [[0.0, 0.0], [1.0, 0.5], [2.0, 1.0]]


TEXT = ({"x": tfds.features.Scalar(np.int32), "title": tfds.features.Text()}, [{"x": 1, "title": "a"}] * 2)
NESTED_TEXT = ({"about": {"title": tfds.features.Text()}}, [{"about": {"title": "a"}}] * 2)
TENSOR = tfds.features.Tensor(shape=(None,), dtype=np.int32)
SEQUENCE = tfds.features.Sequence(tfds.features.Scalar(np.int32))


@pytest.mark.parametrize(
    ("features", "records", "problem"),
    [
        (*TEXT, "the feature 'title' is text"),
        (*NESTED_TEXT, "the feature 'about/title' is text"),
        ({"x": TENSOR}, [{"x": np.ones(i, np.int32)} for i in (1, 2)], "the feature 'x' is not of one shape"),
        ({"x": SEQUENCE}, [{"x": [1] * i} for i in (0, 3)], "the feature 'x' is not of one shape"),
        ({"x": tfds.features.Dataset({"y": np.int32})}, [{"x": [{"y": 1}]}], "the feature 'x' is not of one shape"),
    ],
)
def test_a_feature_that_cannot_be_stacked_is_named_at_once(tmp_path, features, records, problem):
    builder = Records(features, records, data_dir=tmp_path, file_format="array_record")
    with pytest.raises(DataError) as raised:
        from_tfds(builder, "train", 2)
    assert str(raised.value) == (
        f"{problem}, and cannot be stacked to a batch; make arrays of one shape of it, or leave it out:"
        " ft.from_source(grain.MapDataset.source(builder.as_data_source(split)).map(function), batch_size)"
    )
    source = grain.MapDataset.source(builder.as_data_source("train"))
    for batch in from_source(source.map(lambda example: {"rows": np.int32(len(example))}), 2):
        assert batch["rows"].tolist() == [len(features)] * len(records)


def test_a_shape_that_changes_later_is_an_error_of_that_batch(tmp_path):
    records = [{"x": np.ones(2 if i < 50 else 3, np.int32)} for i in range(60)]
    builder = Records({"x": TENSOR}, records, data_dir=tmp_path, file_format="array_record")
    batches = iter(from_tfds(builder, "train", 20, shuffle=False))
    assert [next(batches)["x"].shape for _ in range(2)] == [(20, 2), (20, 2)]
    with pytest.raises(DataError, match="the feature 'x' is not of one shape"):
        next(batches)


def test_a_dataset_that_has_weights_is_not_padded(tmp_path):
    records = [{"weight": 1.0}] * 3
    builder = Records(
        {"weight": tfds.features.Scalar(np.float32)}, records, data_dir=tmp_path, file_format="array_record"
    )
    with pytest.raises(DataError, match="adds the key 'weight'"):
        from_tfds(builder, "train", 2, last="pad")


def test_a_builder_of_another_file_format_is_refused_before_it_writes(tmp_path):
    builder = SmallDigits(data_dir=tmp_path)
    with pytest.raises(DataError) as raised:
        from_tfds(builder, "train", 32)
    assert str(raised.value) == (
        "small_digits/1.0.0 has the file format tfrecord, which cannot be read at random; write"
        f' file_format="array_record", and another data_dir if {builder.data_dir} holds the dataset already'
    )
    assert not list(tmp_path.iterdir())


def test_a_dataset_prepared_in_another_file_format_is_refused(tmp_path):
    builder = SmallDigits(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    # TensorFlow alone writes tfrecord; that a dataset is in it stands in this file.
    info = pathlib.Path(builder.data_dir) / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    for dataset, options in (("small_digits", {"data_dir": tmp_path}), (SmallDigits(data_dir=tmp_path), {})):
        with pytest.raises(DataError, match=r"has the file format tfrecord, .* another data_dir if .*small_digits"):
            from_tfds(dataset, "train", 32, **options)


def test_a_feature_that_only_tensorflow_writes_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # As where it is not installed.
    features = {"x": tfds.features.Image(shape=(2, 2, 1))}
    builder = Records(
        features, [{"x": np.zeros((2, 2, 1), np.uint8)}] * 3, data_dir=tmp_path, file_format="array_record"
    )
    with pytest.raises(DataError) as raised:
        from_tfds(builder, "train", 2)
    assert str(raised.value) == (
        "records/1.0.0 cannot be written here: import of tensorflow halted; None in sys.modules. Writing some features"
        ' needs TensorFlow, reading none: call download_and_prepare() of a builder with file_format="array_record"'
        " where it is installed, or in a dataset of your own write tfds.features.Tensor for Image"
    )


@pytest.mark.parametrize(
    ("options", "given"),
    [({"data_dir": "here"}, "data_dir='here', builder_kwargs={}"), ({"builder_kwargs": {"a": 1}}, "kwargs={'a': 1}")],
)
def test_a_builder_has_its_arguments_already(digits, options, given):
    with pytest.raises(DataError) as raised:
        from_tfds(digits, "train", 2, **options)
    assert given in str(raised.value)
    assert str(raised.value).endswith(
        'write a dataset\'s name, or a builder made with all of these, Digits(data_dir=..., file_format="array_record")'
    )


def test_a_builder_class_is_no_builder():
    with pytest.raises(DataError, match=r"from_tfds\(<class .*SmallDigits'>, .* a builder made with"):
        from_tfds(SmallDigits, "train", 2)


def run(program, *arguments, path=()):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_tensorflow_is_never_imported_even_where_it_is_installed(tmp_path):
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise ImportError\n")
    program = (
        "import sys, functrain.loop.data as data\n"
        "assert not {'grain', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules)\n"
        "import test_data, tensorflow_datasets as tfds\n"
        "batches = list(data.from_tfds('small_digits', 'train', 32, data_dir=sys.argv[1], last='pad'))\n"
        "with tfds.testing.mock_data(num_examples=100):\n"
        "    batches += data.from_tfds('mnist', 'train', 50, data_dir=sys.argv[1])\n"
        "print([batch['image'].shape for batch in batches], 'tensorflow' in sys.modules)"
    )
    printed = output(run(program, tmp_path / "data", path=(tmp_path, pathlib.Path(__file__).parent)))
    assert printed.endswith(f"{[(32, 8, 8)] * 4 + [(50, 28, 28, 1)] * 2} False\n")
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
def test_two_real_processes_share_each_batch():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = (
        "import sys, json, jax, numpy as np, functrain.loop.data as data\n"
        "jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))\n"
        "shared = data.from_arrays({'row': np.arange(11)}, 4, seed=9, last='pad')\n"
        "print(json.dumps([batch['row'].tolist() for batch in shared.epoch(1)]))"
    )
    processes = [run(program, address, number) for number in range(2)]
    slices = [json.loads(output(process)) for process in processes]
    whole = lists(rows(11, 4, seed=9, last="pad").epoch(1))
    assert [first + second for first, second in zip(*slices, strict=True)] == whole


def test_arrays_without_names_are_an_error_that_says_how_they_get_one():
    with pytest.raises(DataError, match=r'from_arrays\({"image": images, "label": labels}, .* not ndarray'):
        from_arrays(np.zeros((4, 2)), batch_size=2)
