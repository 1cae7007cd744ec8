"""One run by each layout in one, two and four real processes: it is one run, and goes on in fewer of them."""

import itertools
import json
import signal
import socket
import time
from pathlib import Path

import layout_run
import numpy as np
import pytest
import tensorflow_datasets as tfds
import warm
from soak import SOAK, in_soak
from test_data import Records

import functrain as ft

RUN, STEPS = Path(__file__).parent / "layout_run.py", 24


def ended(processes, layout, folder, data="arrays", **failing):
    """The exit codes, what is printed and the errors of some processes; seconds from the first end to the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = json.dumps({"layout": layout, "folder": str(folder), "data": str(data), **failing})
    started = [warm.Process(RUN, port, process, processes, asked) for process in range(processes)]
    if failing:
        started[failing["who"]].wait(timeout=180)
    begin = time.monotonic()
    printed, errors = zip(*(process.communicate(timeout=180) for process in started), strict=True)
    return [process.returncode for process in started], printed, errors, time.monotonic() - begin


def left(processes, layout, folder, data="arrays"):
    """What each process of a run that comes to its end left."""
    codes, printed, errors, _ = ended(processes, layout, folder, data)
    assert codes == [0] * processes, errors
    return [json.loads(output.splitlines()[-1]) for output in printed]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run in one process left by the simplest layout."""
    return left(1, "dp", tmp_path_factory.mktemp("alone"))[0]


def check_is_one_run(of_all, alone):
    """Processes left one run, that of another."""
    first = of_all[0]
    for name in ("losses", "evaluated", "params", "memories"):
        assert all(each[name] == first[name] for each in of_all), name
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=0, atol=2.5e-6)
    np.testing.assert_allclose(first["evaluated"], alone["evaluated"], rtol=0, atol=2.5e-6)
    np.testing.assert_allclose(first["params"]["rest"], alone["params"]["rest"], rtol=0, atol=2.5e-6)
    np.testing.assert_allclose(first["params"]["body"], alone["params"]["body"], rtol=0, atol=1e-4)  # Adam's drift.
    assert first["rows"] == [[number, loss] for number, loss in enumerate(first["losses"], start=1)]
    assert first["evaluations"] == [[2 * number, loss] for number, loss in enumerate(first["evaluated"], start=1)]
    assert not any(each["rows"] for each in of_all[1:])  # One process writes.
    for leaf, slices in first["digests"].items():
        for index in {index for each in of_all for index in each["digests"][leaf]}:
            replicas = {each["digests"][leaf][index] for each in of_all if index in each["digests"][leaf]}
            assert len(replicas) == 1, (leaf, index, slices)


ALL = [*itertools.product(("dp", "fsdp", "zero", "tp", "2d", "host"), (1, 2, 4))]


@in_soak
@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes"), ALL)
def test_a_layout_trains_evaluates_and_logs_over_processes_as_data_parallel_does_in_one(
    alone, tmp_path, layout, processes
):
    of_all = left(processes, layout, tmp_path)
    check_is_one_run(of_all, alone)
    assert of_all[0]["memories"] == (["device", "pinned_host"] if layout == "host" else ["device"])


@in_soak
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_examples_of_grain_and_of_a_dataset_come_in_the_order_of_arrays(alone, tmp_path, processes):
    features = {"token": tfds.features.Scalar(np.int64), "y": tfds.features.Tensor(shape=(8,), dtype=np.float32)}
    builder = Records(features, layout_run.examples(60), data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare()
    for name, data in (("grain", "grain"), ("tfds", builder.data_dir)):
        check_is_one_run(left(processes, "2d", tmp_path / name, data), alone)


def check_stops(processes, layout, folder, how, at):
    """Processes end when one of them does, at a step; returns the exit codes."""
    codes, _, errors, seconds = ended(processes, layout, folder, how=how, who=processes - 1, at=at)
    assert all(code not in (0, None) for code in codes), errors
    last = ft.read_json_lines(folder / "log.jsonl")[-1]["step"]
    assert at - 1 <= last < STEPS  # A step is logged after its hooks were told.
    assert seconds < 30
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param("dp", marks=in_soak), pytest.param("tp", marks=in_soak), "2d"])
def test_a_run_that_is_told_to_end_goes_on_in_fewer_processes_and_then_in_one(alone, tmp_path, layout):
    for processes, at in ((4, 3), (2, 12)) if SOAK > 1 else ((2, 5),):
        codes = check_stops(processes, layout, tmp_path, "is told to end", at)
        assert codes == [128 + signal.SIGTERM] * processes
    check_is_one_run(left(1, layout, tmp_path), alone)


@in_soak
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_a_run_of_which_a_process_is_killed_ends_and_goes_on_in_two_processes_and_then_in_one(alone, tmp_path, layout):
    for processes, at in ((4, 5), (2, 11)):
        codes = check_stops(processes, layout, tmp_path, "is killed", at)
        assert codes[-1] == -signal.SIGKILL
    check_is_one_run(left(1, layout, tmp_path), alone)


@in_soak
@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 2])
def test_an_exception_in_a_process_ends_those_with_which_it_shares_its_tensors(tmp_path, who):
    codes, _, errors, seconds = ended(4, "tp", tmp_path, how="raises", who=who, at=4)
    assert codes == [1] * 4
    assert seconds < 30
    assert f"process {who} of 4 failed: ValueError: broken here; the others end too" in errors[who]
    for other in {0, 1, 2, 3} - {who}:
        assert f"ended, as process {who} of 4 failed: ValueError: broken here" in errors[other]
