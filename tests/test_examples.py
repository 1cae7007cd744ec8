"""The examples run as a reader would run them, each without the others, and learn real digits."""

import ast
import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import warm

import functrain as ft

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(program, *arguments):
    """What an example prints that is the only file in its folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        process = warm.Process(pathlib.Path(shutil.copy(EXAMPLES / program, folder)), *arguments)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "UserWarning" not in errors
    return output


def run_cold(program, *arguments):
    """The same, as a reader starts it."""
    environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning:functrain"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, shutil.copy(EXAMPLES / program, folder), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy_in(output):
    return float(re.search(r"^test accuracy (0\.\d{3}|1\.000)$", output, re.MULTILINE)[1])


def test_the_custom_loop_learns_the_digits():
    output = run_cold("custom_loop.py")
    assert accuracy_in(output) >= 0.98
    made = r"adamw\(learning_rate=cosine_decay_schedule, weight_decay=0.01\)"
    assert re.search(rf"^conv2 +2 +18,496 +72.2 KiB +{made}$", output, re.MULTILINE)


def test_multiple_optimizers_learns_the_digits():
    # A small network without convolutions, trained for a few seconds: chance is 0.1.
    assert accuracy_in(run("multiple_optimizers.py")) >= 0.85


def test_many_seeds_learn_the_digits_each_in_its_own_way():
    output = run("many_seeds.py")
    each = re.search(r"of each seed ([\d. ]+)$", output)[1].split()
    assert len(set(each)) > 1
    assert min(map(float, each)) >= 0.8  # Chance is 0.1.


def test_fsdp_trains_the_same_gpt_however_it_is_cut():
    small = ("--steps", 20, "--width", 32, "--depth", 1)
    cut, both = run("fsdp.py", *small), run("fsdp.py", *small, "--tensor", 2, "--zero")
    ended = [
        re.search(r"after 20 steps a character of other text costs (\d\.\d{3}) nats", out)[1] for out in (cut, both)
    ]
    assert abs(float(ended[0]) - float(ended[1])) <= 0.002
    assert float(ended[0]) < 3.7  # log(128) is 4.85.
    for shown in (
        "**/qkv/kernel   P('data', None, 'tensor')",
        "leaves reached of leaves",
        "bytes a device  parameters",
    ):
        assert shown in cut


# A dataset of one's own.


@pytest.fixture
def own_dataset(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_dataset

    return own_dataset


def test_own_dataset_learns_the_digits(tmp_path):
    assert accuracy_in(run("own_dataset.py", "--data-dir", tmp_path)) >= 0.85


def test_the_data_is_written_once_and_split_without_overlap(tmp_path, own_dataset):
    data = own_dataset.load(str(tmp_path))
    assert {name: split.examples for name, split in data.items()} == {"train": 1293, "validation": 144, "test": 360}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}
    assert written
    own_dataset.load(str(tmp_path))
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}
    images = {name: [image.tobytes() for batch in split for image in batch["image"]] for name, split in data.items()}
    assert [len(images[name]) for name in data] == [1280, 144, 360]  # Whole batches to train with.
    assert not set(images["train"]) & set(images["test"])
    assert "tensorflow" not in sys.modules


def test_an_epoch_has_every_record_once_in_an_order_that_follows_the_seed(tmp_path, own_dataset):
    builder = own_dataset.FunctrainDigits(data_dir=str(tmp_path), file_format="array_record")
    orders = [{"shuffle": False}, {"seed": 1}, {"seed": 1}, {"seed": 2}]
    epochs = [
        [batch["label"].tolist() for batch in ft.from_tfds(builder, "train[90%:]", 32, **order)] for order in orders
    ]
    flat = [[label for batch in epoch for label in batch] for epoch in epochs]
    assert [len(batch) for batch in epochs[0]] == [32, 32, 32, 32, 16]
    assert sorted(flat[0]) == sorted(flat[1]) == sorted(flat[3])
    assert flat[1] == flat[2] != flat[3]


def test_the_order_of_own_dataset_follows_its_seed_and_the_epoch(tmp_path, own_dataset):
    def labels(seed, epoch):
        return [batch["label"].tolist() for batch in own_dataset.load(str(tmp_path), seed=seed)["train"].epoch(epoch)]

    assert labels(0, 0) == labels(0, 0)
    assert labels(0, 0) != labels(0, 1)
    assert labels(0, 0) != labels(1, 0)


def test_the_custom_loop_runs_on_mnist_without_tensorflow(tmp_path):
    """On random images of MNIST's form, as no test may download."""
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import tensorflow_datasets as tfds, custom_loop\n"
        "with tfds.testing.mock_data(num_examples=100): custom_loop.main()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    process = warm.Process(program, "--dataset", "mnist", "--epochs", "1", "--data-dir", str(tmp_path))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "test accuracy" in output


@pytest.mark.parametrize("program", ["actor_critic.py", "finetune.py", "multi_loss.py", "wgan_gp.py"])
def test_an_example_has_all_that_it_imports_where_it_is_alone(program):
    """Those that learn in tests of other files, in this process."""
    assert "usage" in run(program, "--help")


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_example_imports_another(program):
    nodes = [*ast.walk(ast.parse((EXAMPLES / program).read_text()))]
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    assert not {name.split(".")[0] for name in imported} & {name.removesuffix(".py") for name in PROGRAMS}
    assert "functrain" in imported


@pytest.mark.parametrize("program", PROGRAMS)
def test_examples_are_short(program):
    limit = {"multiple_optimizers.py": 80, "fsdp.py": 150}.get(program, 120)
    assert len((EXAMPLES / program).read_text().splitlines()) < limit


def test_importing_functrain_imports_none_of_its_optional_dependencies():
    program = (
        "import sys, functrain; optional = ('flax', 'orbax', 'grain', 'tensorflow_datasets', 'tensorboardX');"
        "print([name for name in optional if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
