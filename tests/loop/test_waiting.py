"""A signal ends a run whose data does not come, and what was read is not lost."""

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import warm
from soak import SOAK
from waiting_run import AT, BATCHES, WAITS

RUN = Path(__file__).with_name("waiting_run.py")
SAFETY = 120  # Seconds after which a process hangs; what it waits for takes longer.

pytestmark = pytest.mark.slow


def finished(directory, data, **options):
    """What a run ends with that nobody stops."""
    process = warm.Process(RUN, directory, data, *(f"--{name}={value}" for name, value in options.items()))
    output, errors = process.communicate(timeout=SAFETY)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(data)`: what a run ends with that nobody stops; in what it would wait makes no difference there."""
    run = functools.cache(lambda data: finished(tmp_path_factory.mktemp("whole"), data))
    return lambda data: run("sleep" if data in WAITS else data)


def stopped(directory, data, *numbers, **options):
    """What a run printed that was sent signals while it waited, and its exit code."""
    process = warm.Process(RUN, directory, data, "--waits=1", *(f"--{name}={value}" for name, value in options.items()))
    try:
        lines = []
        while lines.count("waiting\n") < (2 if data == "grain" else 1) and "" not in lines:  # Each worker waits.
            lines.append(process.stdout.readline())
        for number in numbers:
            process.send_signal(number)
        output, errors = process.communicate(timeout=SAFETY)
    finally:
        process.kill()
    assert lines[-1] == "waiting\n", errors
    return "".join(lines) + output, process.returncode


def saved(directory):
    """The name of the checkpoint that a run left, and the position in its data."""
    (path,) = (path for path in directory.iterdir() if path.name.isdigit())
    return path.name, json.loads((path / "facts" / "metadata").read_bytes())["beside"]["data"]["json"]


@pytest.mark.parametrize(
    ("data", "number", "code"),
    [(data, signal.SIGTERM, 143) for data in ("sleep", "receive", "take", "cling")]
    + [(data, signal.SIGINT, 130) for data in ("cling", *["sleep", "receive", "take"] * (SOAK > 1))],
)
def test_a_signal_ends_a_wait_for_data_and_the_run_goes_on_from_the_batch_before(whole, tmp_path, data, number, code):
    """Data that sleeps, reads a socket, takes from a queue; its own position has passed the batch already."""
    output, exit_code = stopped(tmp_path, data, number)
    assert f"ended at {AT - 1} it was sent {number.name}\n" in output
    assert exit_code == code
    assert saved(tmp_path) == (str(AT - 1), {"number": (AT - 1) % BATCHES})
    assert finished(tmp_path, data) == whole(data)


@pytest.mark.parametrize("unroll", [2, 4])
def test_batches_that_were_read_ahead_are_read_again(whole, tmp_path, unroll):
    """The one that is waited for is the first of two, or the third of four, that one dispatch takes."""
    output, exit_code = stopped(tmp_path, "sleep", signal.SIGTERM, unroll=unroll)
    taken = AT - 1 if unroll == 2 else BATCHES
    assert (f"ended at {taken} it was" in output, exit_code) == (True, 143)
    assert finished(tmp_path, "sleep") == whole("sleep")


@pytest.mark.parametrize(("data", "unroll"), [("sleep", 1), ("cling", 1), ("take", 4)] + [("grain", 1)] * (SOAK > 1))
def test_a_thread_that_waits_for_data_ends_with_the_run_and_what_it_had_read_is_read_again(
    whole, tmp_path, data, unroll
):
    output, exit_code = stopped(tmp_path, data, signal.SIGTERM, prefetch=2, unroll=unroll)
    taken = int(output.partition("ended at ")[2].split()[0])
    assert exit_code == 143
    assert taken < AT  # It waits while the batches before it are trained on.
    assert saved(tmp_path)[0] == str(taken)
    assert finished(tmp_path, data, prefetch=1) == whole(data)


def test_a_second_signal_acts_at_once_also_while_the_first_one_is_acted_on(whole, tmp_path):
    _, exit_code = stopped(tmp_path, "sleep", signal.SIGTERM, signal.SIGTERM)
    assert exit_code in (143, -signal.SIGTERM)
    assert finished(tmp_path, "sleep") == whole("sleep")


def test_the_workers_of_grain_are_ended_with_the_run(tmp_path):
    """They wait for far longer, and Grain waits 25 seconds for each of them. Each epoch starts two."""
    output, exit_code = stopped(tmp_path, "grain", signal.SIGTERM, epochs=1)
    assert exit_code == 143
    workers = {int(line.split()[1]) for line in output.splitlines() if line.startswith("worker ")}
    assert len(workers) == 2
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    if SOAK > 1:
        assert finished(tmp_path, "grain", epochs=1) == finished(tmp_path / "whole", "grain", epochs=1)


def test_a_function_of_examples_that_waits_on_a_thread_holds_no_process_up(whole, tmp_path):
    output, exit_code = stopped(tmp_path, "mapped", signal.SIGTERM)
    taken = int(output.partition("ended at ")[2].split()[0])
    assert exit_code == 143
    assert taken <= 2  # It waits while the batches before it are trained on.
    assert saved(tmp_path)[0] == str(taken)
    assert finished(tmp_path, "mapped") == whole("mapped")
