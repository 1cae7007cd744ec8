"""Runs of `fit` that are killed or stopped, in processes of their own, and started again with the same command."""

import fcntl
import functools
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import resume_run
import warm
from soak import SOAK, in_soak

import functrain as ft

RUN = Path(__file__).with_name("resume_run.py")
KILLS = SOAK  # Of each.
SAFETY = 180  # Seconds after which a process hangs.

# Points of a run at which it is killed, as `resume_run.event_text` has them, in the order of a save.
TRACING, READING, EVALUATING, SAVING, ENDED = (
    f"^run.{name}" for name in ("tracing", "reading", "evaluating", "saving", "ended")
)
BEFORE_THE_FIRST_FILE = r"os.mkdir \S+/[\d+~]+\.orbax-checkpoint-tmp$"
BEFORE_THE_COMMIT = r"os.rename \S+-tmp \S+/[\d+~]+$"
BEFORE_THE_MANIFEST = r"open \S+\.manifest\.json\.tmp"
WITHIN_THE_MANIFEST = r"os.rename \S+\.manifest\.json\.tmp"
WRITTEN = r"os.rename \S+/written/[\d+~]+ "
PUBLISHED = r"os.rename \S+/written/\S+\.manifest\.json \S+/\d+"
BEFORE_RETENTION = r"os.rename \S+ \S+/removed/\S+\.manifest\.json$"
UNLINKED = r"os.rename \S+ \S+/removed/[\d+~]+$"
RENAMED = r"shutil.rmtree \S+/removed/"
WITHIN_REMOVAL = r"os.remove [^/]+$"
LOG_IS_CUT = r"os.rename \S+/log\.jsonl\.tmp"

pytestmark = pytest.mark.slow


def started(directory, scenario, *, cache, number=signal.SIGKILL, at=None, cold=False, **options):
    """A process that trains, and sends itself a signal at a point, if it is told to."""
    options |= {"send": int(number), "at": at} if at is not None else {}
    arguments = [directory, scenario, f"--cache={cache}", *(f"--{name}={value}" for name, value in options.items())]
    if not cold:
        return warm.Process(RUN, *arguments)
    return subprocess.Popen(
        [sys.executable, RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def waited_for(*processes):
    """What processes printed, their errors and exit codes."""
    try:
        outputs = [process.communicate(timeout=SAFETY) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(*output, process.returncode) for output, process in zip(outputs, processes, strict=True)]


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of all processes of all tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def start(shared):
    """`start(directory, scenario, ...)`: they compile what they train once."""
    return functools.partial(started, cache=shared / "cache")


@pytest.fixture(scope="session")
def run(start):
    """`run(directory, scenario, ...)` returns output, errors and exit code of a process that ended."""
    return lambda directory, scenario, **options: waited_for(start(directory, scenario, **options))[0]


def timeless(row):
    return {name: value for name, value in row.items() if name not in ("time", "train/steps_per_second")}


def ended(directory, ran):
    """All that a run ended with: checksums of its last and its best state, its history, its log."""
    output, errors, code = ran
    assert code == 0, errors
    outcome = json.loads(output.splitlines()[-1])
    log = ft.read_json_lines(directory / "log.jsonl")
    return outcome | {"history": [*map(timeless, outcome["history"])], "log": [*map(timeless, log)]}


@pytest.fixture(scope="session")
def uninterrupted(run, shared):
    """`uninterrupted(scenario, ...)` returns what a run ends with that nobody kills; that of windows starts cold."""

    @functools.cache
    def outcome(scenario, **options):
        directory = shared / "-".join(["uninterrupted", scenario, *map(str, options.values())])
        directory.mkdir(exist_ok=True)
        with open(directory / "outcome", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # One worker runs it, which the other waits for.
            file.seek(0)
            if not (kept := file.read()):
                is_cold = scenario == "windows" or SOAK > 1
                kept = json.dumps(ended(directory, run(directory, scenario, cold=is_cold, **options)))
                file.write(kept)
        return json.loads(kept)

    return outcome


def killed(run, directory, scenario, at, nth=1, **options):
    """Starts a run, which is killed at a point; says so where it ended before it."""
    _, errors, code = run(directory, scenario, at=at, nth=nth, **options)
    assert code == -signal.SIGKILL, f"it did not get to {at!r}, or not {nth} times: {errors}"


# Killed.


@pytest.mark.parametrize("scenario", ["windows"] + ["epochs"] * (SOAK > 1))
def test_a_run_killed_at_random_ends_with_the_same_bits(start, uninterrupted, tmp_path, scenario):
    draw = random.Random(scenario)
    directories = [tmp_path / "0"]
    for kill in range(KILLS):
        directory = directories[-1]
        # By turns at a random time, and at a random one of what is done to files, most of which is done in a moment.
        if kill % 2:
            process = start(directory, scenario, at=f" {directory}/|^os.remove ", nth=draw.randint(1, 400))
        else:
            process = start(directory, scenario)
            assert process.stdout.readline() == "started\n"
            time.sleep(draw.uniform(0, 1.5))
            process.kill()
        ran = waited_for(process)[0]
        if ran[2] != -signal.SIGKILL:  # It was through; what is killed from here on is another run.
            assert ended(directory, ran) == uninterrupted(scenario)
            directories.append(tmp_path / str(len(directories)))
    ran = waited_for(start(directories[-1], scenario))[0]
    assert ended(directories[-1], ran) == uninterrupted(scenario)


ALL_POINTS = {
    "windows": [
        (TRACING, 1), (READING, 5), (SAVING, 1), (BEFORE_THE_FIRST_FILE, 2), (BEFORE_THE_COMMIT, 2), (LOG_IS_CUT, 1),
        (BEFORE_THE_MANIFEST, 2), (WITHIN_THE_MANIFEST, 2), (WRITTEN, 2), (EVALUATING, 2), (PUBLISHED, 2), (ENDED, 1),
    ],
    "epochs": [
        (EVALUATING, 2), (BEFORE_RETENTION, 3), (UNLINKED, 2), (RENAMED, 4), (WITHIN_REMOVAL, 5), (READING, 6),
        (SAVING, 4), (BEFORE_THE_MANIFEST, 3), (ENDED, 1),
    ],
}  # fmt: skip
POINTS = {  # Without those at which the tests below kill or stop a run.
    "windows": [(BEFORE_THE_FIRST_FILE, 2), (WITHIN_THE_MANIFEST, 2), (PUBLISHED, 2)],
    "epochs": [(BEFORE_RETENTION, 3), (UNLINKED, 2), (WITHIN_REMOVAL, 5), (ENDED, 1)],
}


@pytest.mark.parametrize(("scenario", "points"), (ALL_POINTS if SOAK > 1 else POINTS).items())
def test_a_run_killed_at_every_point_of_a_save_ends_with_the_same_bits(run, uninterrupted, tmp_path, scenario, points):
    for at, nth in points:
        killed(run, tmp_path, scenario, at, nth)
    assert ended(tmp_path, run(tmp_path, scenario)) == uninterrupted(scenario)


def test_the_record_of_a_run_killed_at_every_point_has_each_row_once_and_the_same_results(run, uninterrupted, tmp_path):
    results, run_written = "results.json", r"open \S+run\.json\.tmp"
    others = [(run_written, 2), (run_written, 1), (WRITTEN, 2), (EVALUATING, 3), (ENDED, 1)] if SOAK > 1 else []
    points = [(BEFORE_THE_COMMIT, 2), (LOG_IS_CUT, 1), *others, (r"open \S+results\.json\.tmp", 1)]
    for at, nth in points:
        killed(run, tmp_path, "recorded", at, nth)
    assert ended(tmp_path, run(tmp_path, "recorded")) == uninterrupted("recorded")
    whole = next(path for path in tmp_path.parents[1].rglob(f"uninterrupted-recorded/{results}"))
    assert (tmp_path / results).read_bytes() == whole.read_bytes()
    sections = json.loads((tmp_path / "run.json").read_text())["sections"]
    assert [section["how"] for section in sections] == [None] * (len(sections) - 1) + ["stopped"]
    assert all(one["from_step"] <= other["from_step"] for one, other in itertools.pairwise(sections))


def test_the_best_state_is_kept_by_a_run_killed_before_its_manifest_was_written(run, uninterrupted, tmp_path):
    killed(run, tmp_path, "windows", r"open \S+/\.20\.manifest\.json\.tmp")  # The best is that of step 20.
    assert ended(tmp_path, run(tmp_path, "windows")) == uninterrupted("windows")


def test_a_finished_run_started_again_changes_nothing(run, uninterrupted, tmp_path):
    expected = uninterrupted("windows")
    assert expected["stopped"] == "valid/loss has not improved for 4 evaluations"
    assert expected["best"] != expected["last"]
    for _ in range(2):
        assert ended(tmp_path, run(tmp_path, "windows")) == expected


@pytest.mark.parametrize(
    ("scenario", "unroll"), [("alternate", 2)] + [("alternate", 1), ("phase", 1), ("phase", 2)] * (SOAK > 1)
)
def test_phases_killed_within_a_cycle_end_with_the_same_bits(run, uninterrupted, tmp_path, scenario, unroll):
    for at, nth in [("^run.updated", 5), (BEFORE_THE_MANIFEST, 1)]:
        killed(run, tmp_path, scenario, at, nth, unroll=unroll)
    assert ended(tmp_path, run(tmp_path, scenario, unroll=unroll)) == uninterrupted(scenario, unroll=unroll)


def test_a_damaged_checkpoint_is_not_trained_on_by_a_run_killed_while_it_is_set_aside(run, uninterrupted, tmp_path):
    killed(run, tmp_path, "windows", "^run.updated", 9)
    newest = max(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    largest = max((tmp_path / str(newest)).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    killed(run, tmp_path, "windows", r"os.rename \S+manifest\.json \S+\.corrupt")
    ran = run(tmp_path, "windows")
    assert f"THE CHECKPOINT {tmp_path / str(newest)} IS DAMAGED and is not used" in ran[1]
    assert ended(tmp_path, ran) == uninterrupted("windows")


# Stopped.


@pytest.mark.parametrize(
    ("number", "code", "points"),
    [
        (signal.SIGTERM, 143, [(TRACING, 1), (BEFORE_THE_COMMIT, 2)]),
        (signal.SIGINT, 130, [(SAVING, 2)]),
        *[(signal.SIGTERM, 143, [(READING, 2), (EVALUATING, 3), (SAVING, 2)])] * (SOAK > 1),
    ],
)
def test_a_signal_ends_a_run_which_then_goes_on_to_the_same_bits(run, uninterrupted, tmp_path, number, code, points):
    for at, nth in points:
        _, errors, exit_code = run(tmp_path, "windows", number=number, at=at, nth=nth)
        assert exit_code == code, errors
    assert ended(tmp_path, run(tmp_path, "windows")) == uninterrupted("windows")


def restored(directory, loss_fn, accumulate):
    """The newest checkpoint of a run."""
    params = resume_run.initial()
    update = ft.make_update(loss_fn, resume_run.optimizer(params), accumulate=accumulate)
    return ft.Checkpoints(directory).restore(like=resume_run.begun(update, params))


def test_a_stopped_run_has_saved_the_batch_before_the_one_that_it_waited_for(run, tmp_path):
    output, _, _ = run(tmp_path, "windows", number=signal.SIGTERM, at=READING, nth=19)
    assert "ended after batch 18\n" in output
    saved = restored(tmp_path, resume_run.loss_fn, accumulate=3)
    assert [int(saved.state.batches), int(saved.state.step), int(saved.state.pending)] == [18, 7, 1]
    assert not saved.metrics  # Those of step 4 are of other parameters.


def test_a_run_stopped_at_the_last_batch_of_an_epoch_ends_the_epoch_when_it_goes_on(run, uninterrupted, tmp_path):
    output, _, _ = run(tmp_path, "epochs", number=signal.SIGTERM, at="^run.updated 7$")
    assert "ended after batch 14\n" in output
    assert ended(tmp_path, run(tmp_path, "epochs")) == uninterrupted("epochs")


@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, -signal.SIGINT)] + [(signal.SIGTERM, 143)] * (SOAK > 1))
def test_a_second_signal_stops_at_once(start, run, uninterrupted, tmp_path, second, code):
    process = start(tmp_path, "windows", number=signal.SIGTERM, at=EVALUATING, nth=3, stall=1)
    while process.stdout.readline() not in ("stalled\n", ""):
        pass
    process.send_signal(second)
    assert waited_for(process)[0][2] == code  # Within the second evaluation, which would not have ended.
    assert not (tmp_path / "8").exists()
    assert ended(tmp_path, run(tmp_path, "windows")) == uninterrupted("windows")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@in_soak  # By a layout they do in `make test`.
def test_two_processes_stop_at_one_step_and_go_on_to_the_same_bits(start, tmp_path):
    def pair(directory, *options):
        port = free_port()
        both = [start(directory, "together", port=port, process=i, **options[i]) for i in range(2)]
        return waited_for(*both)

    expected = [ended(tmp_path / "whole", ran) for ran in pair(tmp_path / "whole", {}, {})]
    slow = {"seconds": 0.1}  # JAX looks once a second whether there was a signal: 22 updates are left to it.
    stopped = pair(tmp_path / "stopped", slow, slow | {"number": signal.SIGTERM, "at": "^run.updated 2$"})
    assert [code for _, _, code in stopped] == [143, 143]
    (batch,), (other_batch,) = (re.findall("ended after batch (.*)", output) for output, _, _ in stopped)
    assert batch == other_batch
    assert [ended(tmp_path / "stopped", ran) for ran in pair(tmp_path / "stopped", {}, {})] == expected
    assert expected[0]["last"] == expected[1]["last"]


# What can't go on, or must not.


def test_data_that_cannot_be_resumed_says_so_and_starts_its_epoch_again(run, tmp_path):
    assert run(tmp_path, "plain", number=signal.SIGTERM, at="^run.updated 10$")[2] == 143
    output, errors, _ = run(tmp_path, "plain")
    assert "the data can't be resumed: epoch 1 starts again at its beginning, after 3 batches of it" in errors
    outcome = json.loads(output.splitlines()[-1])
    # Each of the 7 batches was seen once in each of 3 epochs, and the first 3 twice in the second.
    assert outcome["seen"] == [4] * 3 * resume_run.BATCH + [3] * 4 * resume_run.BATCH
    assert (outcome["step"], outcome["epochs"]) == (3 * 7 + 3, 3)


def test_a_loss_that_is_nan_ends_a_run_that_has_saved_nothing_of_it(run, tmp_path):
    for _ in range(2):
        _, errors, code = run(tmp_path, "nan")
        assert code == 1
        assert (
            "functrain.errors.NonFiniteError: step 5: 'train/loss' is not finite, nor are the parameters of part"
            f" 'body', 'head'; the last sound checkpoint is {tmp_path / '4'}; restore it and lower the rate, or leave"
            ' such updates out: make_update(..., nonfinite="skip")\nthe autopsy:\n  update 5, with batch 0 of epoch 1,'
        ) in errors
        assert 'factor = jnp.where(jnp.sum(model_state["seen"]) >= 7 * BATCH, jnp.nan, 1.0)' in errors.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["3", "4"]
    state = restored(tmp_path, resume_run.nan_loss_fn, accumulate=2).state
    assert int(state.step) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_a_window_with_nan_in_it_is_not_saved(run, tmp_path):
    _, errors, code = run(tmp_path, "nan", number=signal.SIGTERM, at=READING, nth=9)
    assert code == 1
    assert "step 4: 'train/loss' is not finite, nor are the pending gradients of part 'body', 'head'" in errors
    assert errors.endswith("the autopsy:\n  SIGTERM ended it: start the run again to have one\n")
    assert not [*tmp_path.glob("4+1*")]
