"""W&B without a network: its files read back, every row is there once, whatever is killed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from runs import logged
from soak import SOAK, in_soak

import functrain as ft
from functrain.errors import LogError
from functrain.loop.wandb_files import rows_in

PROGRAM = Path(__file__).parent / "tracked_run.py"

# No socket is opened but those of the machine itself.
LOG_WITHOUT_A_NETWORK = """
import os, sys
os.environ.update(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
import functrain as ft

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        place = arguments[1] if event == "socket.connect" else arguments
        host = place[0] if isinstance(place, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            print("network", event, place, flush=True)

sys.addaudithook(hook)
log = ft.WandB("quiet", directory=sys.argv[1])
log.resume(-1)
log.log(1, {"loss": 0.5})
log.close()
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in (("MODE", "offline"), ("ERROR_REPORTING", "false"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)


def ended(directory, code=0, **given):
    options = {"name": "run", "directory": str(directory), "every": 0.0}
    process = warm.Process(PROGRAM, json.dumps({"directory": str(directory), "loggers": [["WandB", options]], **given}))
    printed, errors = process.communicate()
    assert process.returncode == code, errors
    return json.loads(printed.splitlines()[-1]) if code == 0 else None


def files(directory):
    """The files of W&B in the order of time, by run."""
    found = {}
    for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.parent.name):
        found.setdefault(file.stem, []).append(file)
    return found


def rows(directory):
    """All rows of the one run."""
    ((_, of_run),) = files(directory).items()
    return [row for file in of_run for row in rows_in(file)]


def numbers(found):
    """What is the same in each run; NaN as text, which equals itself."""
    clock = {"time", "train/steps_per_second"}
    return [
        {name: str(float(value)) for name, value in row.items() if name not in clock and not name.startswith("_")}
        for row in found
    ]


def offline_run(directory):
    return ft.WandB("run", directory=directory, every=0.0)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_has_each_row_once(tmp_path):
    rng = random.Random(0)
    for kill in (20, *[2, 11, 30] * (SOAK > 1)):
        ended(tmp_path, -signal.SIGKILL, kill=kill, seconds=rng.choice([0.0, 0.02, 0.1]))
    result = ended(tmp_path)
    assert result["told"] == []
    assert numbers(rows(tmp_path)) == numbers(result["history"])
    assert [row["_step"] for row in rows(tmp_path)] == [*range(44)]
    assert [row["step"] for row in rows(tmp_path) if "valid/loss" in row] == [10, 20, 30, 40]
    assert all(math.isnan(row["train/nan@"]) and row["train/far"] == math.inf for row in rows(tmp_path)[:9])


@in_soak
@pytest.mark.slow
def test_a_run_that_goes_on_from_before_what_was_sent_is_a_new_one_with_all_rows(tmp_path):
    """Its newest checkpoints are gone."""
    ended(tmp_path, steps=24)
    for path in (tmp_path / "run").glob("24*"):
        path.rename(tmp_path / path.name)
    history = ended(tmp_path)["history"]
    of_runs = [[row for file in of_run for row in rows_in(file)] for of_run in files(tmp_path).values()]
    assert [len(found) for found in of_runs] == [26, 44]
    assert numbers(of_runs[1]) == numbers(history)


@in_soak
@pytest.mark.slow
def test_a_run_that_goes_on_has_its_id_and_a_new_one_another(tmp_path):
    logged(offline_run(tmp_path), [(1, {"loss": 0.5}), (2, {"loss": 0.25})])
    logged(offline_run(tmp_path), [(2, {"loss": 0.125}), (3, {"loss": 0.125})], start=2)  # Step 2 has a row.
    assert [(row["_step"], row["step"], row["loss"]) for row in rows(tmp_path)] == [
        (0, 1, 0.5),
        (1, 2, 0.25),
        (2, 3, 0.125),
    ]
    logged(offline_run(tmp_path), [(1, {"loss": 1.0})])
    assert [len(of_run) for of_run in files(tmp_path).values()] == [2, 1]


@pytest.mark.slow
def test_a_file_torn_at_any_byte_gives_the_rows_before(tmp_path):
    logged(offline_run(tmp_path), [(step, {f"n/{i}": step * i for i in range(1000)}) for step in range(6)])
    ((file,),) = files(tmp_path).values()
    whole, counts = file.read_bytes(), []
    assert len(whole) > 3 * 2**15  # Records lie over the bounds of blocks.
    for cut in range(0, len(whole), 997):
        (tmp_path / "torn").write_bytes(whole[:cut])
        found = [*rows_in(tmp_path / "torn")]
        assert [row["step"] for row in found] == [*range(len(found))]
        assert all(row[f"n/{i}"] == row["step"] * i for row in found for i in range(1000))
        counts.append(len(found))
    assert counts == sorted(counts)
    assert {*counts} >= {*range(6)}


@pytest.mark.slow
def test_the_configuration_and_files_are_those_of_the_run(tmp_path):
    log = ft.WandB("run", directory=tmp_path, every=0.0)
    log.resume(-1)
    log.start({"width": 64, "rates": {"body": 0.001}, "far": math.inf})
    (tmp_path / "report.html").write_text("text")
    log.artifact(tmp_path / "report.html")
    final = [{"of": "last", "step": 1, "numbers": {"test/accuracy": 0.75}}]
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "final": final}))
    log.artifact(tmp_path / "results.json")
    log.log(1, {"loss": 0.5})
    log.close()
    folder = next(tmp_path.glob("wandb/offline-run-*"))
    assert (folder / "files" / "report.html").read_text() == "text"
    written = next(folder.glob("*.wandb")).read_bytes()
    assert b"rates" in written
    assert b"report.html" in written
    assert b"final/last/test/accuracy" in written


@pytest.mark.slow
def test_nothing_leaves_the_machine(tmp_path):
    command = [sys.executable, "-c", LOG_WITHOUT_A_NETWORK, tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert "network" not in ran.stdout
    ((file,),) = files(tmp_path).values()
    assert [row["loss"] for row in rows_in(file)] == [0.5]


def test_without_wandb_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        LogError, match=r"WandB\('run', project='functrain'\): .*; write pip install 'functrain\[wandb\]'$"
    ):
        ft.WandB("run")
