"""The examples run as a reader would run them, and learn real digits."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(program, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error::UserWarning:functrain"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy_in(output):
    return float(re.search(r"^test accuracy (0\.\d{3}|1\.000)$", output, re.MULTILINE)[1])


def test_the_custom_loop_learns_the_digits(tmp_path):
    output = run("custom_loop.py", "--data-dir", tmp_path)
    assert accuracy_in(output) >= 0.98
    assert re.search(r"^conv2 +2 +18,496 +72.2 KiB +adamw$", output, re.MULTILINE)


def test_multiple_optimizers_learns_the_digits(tmp_path):
    # A small network without convolutions, trained for a few seconds: chance is 0.1.
    assert accuracy_in(run("multiple_optimizers.py", "--data-dir", tmp_path)) >= 0.85


def test_many_seeds_learn_the_digits_each_in_its_own_way(tmp_path):
    output = run("many_seeds.py", "--data-dir", tmp_path)
    each = re.search(r"of each seed ([\d. ]+)$", output)[1].split()
    assert len(set(each)) > 1
    assert min(map(float, each)) >= 0.8  # Chance is 0.1.


def test_the_data_is_written_once_and_split_without_overlap(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits

    data = digits.load("digits", str(tmp_path))
    assert {name: len(source) for name, source in data.items()} == {"train": 1293, "validation": 144, "test": 360}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}
    assert written
    digits.load("digits", str(tmp_path))
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}
    images = {name: [source[i]["image"].tobytes() for i in range(len(source))] for name, source in data.items()}
    assert not set(images["train"]) & set(images["test"])
    assert "tensorflow" not in sys.modules


def test_an_epoch_has_every_record_once_in_an_order_that_follows_the_seed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits

    source = digits.load("digits", str(tmp_path))["validation"]
    epochs = [
        [batch["label"].tolist() for batch in digits.batches(source, 32, shuffle_seed=s)] for s in (None, 1, 1, 2)
    ]
    flat = [[label for batch in epoch for label in batch] for epoch in epochs]
    assert [len(batch) for batch in epochs[0]] == [32, 32, 32, 32, 16]
    assert sorted(flat[0]) == sorted(flat[1]) == sorted(flat[3])
    assert flat[1] == flat[2] != flat[3]


def test_the_custom_loop_runs_on_mnist_without_tensorflow(tmp_path):
    """On random images of MNIST's form, as no test may download."""
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import tensorflow_datasets as tfds, custom_loop\n"
        "with tfds.testing.mock_data(num_examples=100): custom_loop.main()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    arguments = ["--dataset", "mnist", "--epochs", "1", "--data-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout


@pytest.mark.parametrize("program", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_are_short(program):
    limit = 80 if program == "multiple_optimizers.py" else 120
    assert len((EXAMPLES / program).read_text().splitlines()) < limit


def test_importing_functrain_imports_none_of_its_optional_dependencies():
    program = (
        "import sys, functrain; optional = ('flax', 'orbax', 'grain', 'tensorflow_datasets', 'tensorboardX');"
        "print([name for name in optional if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
