"""Loggers that fail, and processes that are killed: every row is there in the end, once, or is told to be missing."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import warm
from runs import Recorder, counted, scripted, update_of
from soak import SOAK, some
from test_logs import events

import functrain as ft
from functrain.errors import LogError
from functrain.loop.logs import read_json_lines
from functrain.loop.rows import Rows
from functrain.loop.unfailing import Unfailing

ROOT = Path(__file__).parents[2]

PRELUDE = """
    import json, os, pathlib, signal, sys, warnings
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_platforms", "cpu")
    import functrain as ft

    directory = pathlib.Path(sys.argv[1])
    params = {"w": jnp.zeros(2)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})

    def loss_fn(params, batch):
        metrics = {f"of some length {number}": 0.1 for number in range(50)}  # A row is a good part of a page.
        return ft.Loss(jnp.mean((params["w"] - batch["x"]) ** 2), metrics=metrics)

    update = ft.make_update(loss_fn, optim)
    data = ft.from_arrays({"x": np.ones((24, 2), np.float32)}, batch_size=2)
"""

# The disk is full from the third update on, and has room again at the eighth, or never.
FULL = """
    class Filling(ft.Hook):
        def update_ended(self, run):
            filler = directory / "filler"
            if run.step == 3:
                with filler.open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(512))
                    except OSError:
                        pass
            if run.step == 8 and sys.argv[2] == "freed":
                filler.unlink()

    log = ft.JsonLines(directory / "log" / "log.jsonl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ft.fit(update, update.init(params), data, epochs=1, log=ft.Every(updates=1), hooks=[Filling()],
                        loggers=[log, ft.TensorBoard(directory / "board")])
    print(json.dumps({"warnings": [str(each.message) for each in caught], "rows": len(result.history),
                      "log": [row["step"] for row in ft.read_json_lines(directory / "log" / "log.jsonl")]}))
    sys.stdout.flush()
    os.system(f"cp -r {directory}/log {directory}/board {sys.argv[3]}")
"""

KILLED = """
    class Killing(ft.Hook):
        def update_ended(self, run):
            if run.step == int(sys.argv[2]):
                checkpoints.wait()
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = ft.Checkpoints(directory / "run", every=ft.Every(updates=3))
    result = ft.fit(update, update.init(params), data, epochs=1, log=ft.Every(updates=1), checkpoints=checkpoints,
                    loggers=[ft.TensorBoard(directory / "board")], hooks=[Killing()])
"""


def shown(directory):
    """The steps of the losses that TensorBoard shows: a start hides what came before it from its step on."""
    steps = []
    for event in events(directory):
        if event.HasField("session_log"):
            steps = [step for step in steps if step < event.step]
        steps += [event.step for value in event.summary.value if value.tag == "train/loss"]
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("disk", some(["freed", "full"], 2))
def test_a_full_disk_ends_no_run_and_what_it_did_not_take_is_written_when_it_has_room(tmp_path, disk):
    mount = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    script = f'mount -t tmpfs -o size=200k none {tmp_path / "disk"} && exec "$@"'
    (tmp_path / "disk").mkdir()
    (tmp_path / "kept").mkdir()
    if subprocess.run([*mount, script, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(FULL)
    command = [*mount, script, "sh", sys.executable, "-c", code, tmp_path / "disk", disk, tmp_path / "kept"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["rows"] == 12
    steps = [*range(1, 13)]
    boards = shown(tmp_path / "kept" / "board")
    written = (tmp_path / "kept" / "log" / "log.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in written.splitlines()] == found["log"]
    assert written.endswith(b"\n")
    first = [text for text in found["warnings"] if "could not write the row of step" in text]
    assert len(first) == 2
    for name, text in zip(("JsonLines('", "TensorBoard('"), sorted(first), strict=True):
        assert re.match(
            rf"{re.escape(name)}.*'\) could not write the row of step \d: OSError: \[Errno 28\] No space left on"
            r" device; training goes on, and the rows are kept and written when it can be: make room, or mend the pl",
            text,
        )
    if disk == "freed":
        assert found["log"] == boards == steps
        assert found["warnings"] == first
        return
    lacking = [text for text in found["warnings"] if text not in first]
    for there, text in zip((found["log"], boards), lacking, strict=True):
        assert there == steps[: len(there)]
        told = f"lacks {12 - len(there)} rows that could not be written, of the steps {len(there) + 1} to 12: OSError: "
        assert told in text
        assert text.endswith("No space left on device; result.history has them")


@pytest.mark.slow
@pytest.mark.parametrize("step", [6] + [4, 8] * (SOAK > 1))
def test_a_killed_run_loses_no_row_before_its_checkpoint_and_has_none_twice(tmp_path, step):
    """The row of the update that was killed is not written yet."""
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(KILLED)
    killed = warm.Process(script, tmp_path, step)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert shown(tmp_path / "board") == [*range(1, step)]
    again = warm.Process(script, tmp_path, 0)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert shown(tmp_path / "board") == [*range(1, 13)]
    assert [row["step"] for row in read_json_lines(tmp_path / "run" / "log.jsonl")] == [*range(1, 13)]


@pytest.mark.parametrize("make", [lambda path: ft.JsonLines(path / "log.jsonl"), ft.TensorBoard])
def test_a_log_that_cannot_be_opened_ends_no_run_and_is_opened_when_it_can_be(tmp_path, make):
    """A file is where its folder is to be."""
    place = tmp_path / "place"

    class Mending(ft.Hook):
        def update_ended(self, run):
            if run.step == 3 and mends:
                place.unlink()

    for mends in (False, True):
        place.write_text("in the way")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ft.fit(*counted(update_of()), epochs=1, log=ft.Every(updates=1), loggers=[make(place)], hooks=[Mending()])
        first, *others = [str(each.message) for each in caught]
        assert re.search(r"could not go on from step -1: (FileExistsError|NotADirectoryError): ", first)
        if not mends:
            assert len(others) == 1
            assert "lacks 4 rows that could not be written, of the steps 1 to 4: " in others[0]
    assert not others
    found = shown(place) if make is ft.TensorBoard else [row["step"] for row in read_json_lines(place / "log.jsonl")]
    assert found == [1, 2, 3, 4]


def test_the_log_beside_the_checkpoints_may_fail_as_well(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epochs in (1, 2):
            result = ft.fit(
                *counted(update_of()), epochs=epochs, log=ft.Every(updates=2), checkpoints=ft.Checkpoints(tmp_path)
            )
    told = [str(each.message) for each in caught]
    assert [text.partition(":")[0].partition(" could")[2] for text in told if " could not go on" in text] == [
        " not go on from step -1", " not go on from step 4",
    ]  # fmt: skip
    assert any("log.jsonl can't be read, and result.history lacks its rows: " in text for text in told)
    assert [row["step"] for row in result.history] == [6, 8]


class Flaky:
    """A logger of one's own, of which some calls fail."""

    def __init__(self, fails):
        self.calls, self.rows, self.fails = 0, [], fails

    def log(self, step, row):
        self.calls += 1
        if self.fails(self.calls):
            raise ConnectionError("no route")
        self.rows.append(step)

    def resume(self, step):
        self.rows.append(f"from {step}")

    def close(self):
        self.rows.append("closed")


@pytest.mark.parametrize("fails", [lambda call: call % 2, lambda call: call < 7, lambda call: call in (3, 4, 8)])
def test_a_logger_of_ones_own_that_fails_gets_every_row_once_and_in_order(fails):
    logger, events = Flaky(fails), 8
    with pytest.warns(
        UserWarning, match=r"could not write the row of step \d: ConnectionError: no route; tr"
    ) as caught:
        ft.fit(*counted(update_of(), events), epochs=1, log=ft.Every(updates=1), loggers=[logger])
    told = [str(each.message) for each in caught]
    missing = [step for step in range(1, 9) if step not in logger.rows]
    assert logger.rows == ["from -1", *range(1, 9 - len(missing)), "closed"]
    assert len(told) == 1 + bool(missing)


class Tracking(Flaky):
    """One that takes the configuration and the files of a run as well, of which some fail as rows do."""

    def __init__(self, fails=lambda call: False, lost=()):
        super().__init__(fails)
        self.lost = {*lost}

    def start(self, config):
        self.calls += 1
        if self.fails(self.calls):
            raise ConnectionError("no route")
        self.rows.append(config)

    def artifact(self, path):
        if path.name in self.lost:
            raise FileNotFoundError(path.name)
        self.rows.append(path.name)


def test_a_configuration_that_fails_is_given_again_before_the_next_row():
    logger = Tracking(fails=lambda call: call == 1)
    kept = Unfailing(logger)
    kept.resume(-1)
    with pytest.warns(UserWarning, match=r"could not take the configuration: ConnectionError: no route; training goes"):
        kept.start({"width": 64})
    assert logger.rows == ["from -1"]
    kept.log(1, {})
    assert logger.rows == ["from -1", {"width": 64}, 1]


def test_a_file_that_fails_holds_up_no_row_is_tried_again_and_told_in_the_end():
    logger = Tracking(lost={"plot.png", "run.json"})
    kept = Unfailing(logger)
    with pytest.warns(UserWarning, match=r"could not take run\.json: FileNotFoundError: run\.json; training goes on"):
        kept.artifact(Path("run.json"))
    kept.artifact(Path("plot.png"))
    kept.artifact(Path("report.html"))
    kept.log(1, {})
    logger.lost.remove("run.json")
    kept.flush()
    assert logger.rows == ["report.html", 1, "run.json"]
    with pytest.warns(UserWarning, match=r"lacks 'plot\.png', which it did not take: FileNotFoundError: plot\.png$"):
        kept.close()
    assert logger.rows[3:] == ["closed"]


def test_a_logger_without_a_place_for_them_takes_no_configuration_and_no_files():
    rows = Rows([logger := Flaky(lambda call: False), tracking := Tracking()], None, log_last=False)
    rows.start({"width": 64})
    rows.artifact(Path("run.json"))
    rows.close()
    assert (logger.rows, tracking.rows) == (["closed"], [{"width": 64}, "run.json", "closed"])


class Refusing(Flaky):
    def log(self, step, row):
        raise LogError("rename it")


def test_a_mistake_with_a_logger_is_raised(tmp_path):
    closed = ft.JsonLines(tmp_path / "log.jsonl")
    closed.close()
    for logger, problem in ((closed, "is closed; make a new logger"), (Refusing(lambda call: False), "rename it")):
        with pytest.raises(LogError, match=problem):
            ft.fit(*counted(update_of()), epochs=1, log=ft.Every(updates=1), loggers=[logger])


def test_rows_are_flushed_before_a_save(tmp_path):
    class Flushed(Flaky):
        def flush(self):
            recorder.events.append(("flush", self.rows[-1]))

    recorder = Recorder(of=lambda run: run.step)
    ft.fit(
        *counted(update_of()), epochs=1, log=ft.Every(updates=1), hooks=[recorder],
        loggers=[Flushed(lambda call: False)], checkpoints=ft.Checkpoints(tmp_path, every=ft.Every(updates=2)),
    )  # fmt: skip
    seen = [event for event in recorder.events if event[0] in ("flush", "checkpoint_saved")]
    assert seen[:4] == [("flush", 2), ("checkpoint_saved", 2), ("flush", 4), ("checkpoint_saved", 4)]


def test_rows_of_step_0_are_those_of_a_run_that_goes_on_and_not_of_a_new_one(tmp_path):
    """Windows that are longer than an epoch: the first epochs end before a step."""

    def fit(directory, epochs):
        result = ft.fit(
            *counted(update_of(accumulate=100, remainder="carry")), epochs=epochs, evaluation=scripted(*range(epochs)),
            checkpoints=ft.Checkpoints(directory), loggers=[mine],
        )  # fmt: skip
        rows = read_json_lines(directory / "log.jsonl")
        assert [(row["step"], row["epoch"]) for row in rows] == [(row["step"], row["epoch"]) for row in result.history]
        return [(row["step"], row["epoch"]) for row in rows]

    mine = Flaky(lambda call: False)
    assert fit(tmp_path / "run", 2) == [(0, 1), (0, 2)]
    assert fit(tmp_path / "run", 3) == [(0, 1), (0, 2), (0, 3)]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.jsonl").write_bytes((tmp_path / "run" / "log.jsonl").read_bytes())
    assert fit(tmp_path / "new", 1) == [(0, 1)]
    assert [row for row in mine.rows if isinstance(row, str)] == [
        "from -1", "closed", "from 0", "closed", "from -1", "closed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [(b'{"step": 2', b'{"step" 2', [2]), (b'"epoch"', b'"epocj"', []), (b'"epoch"', b'"ep\xffch"', [2])],
)
def test_a_run_goes_on_over_a_log_that_is_damaged(tmp_path, old, new, lost):
    """Of a line that still is a row, with another name in it, nothing can be seen."""
    log = tmp_path / "log.jsonl"
    for epochs in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = ft.fit(
                *counted(update_of()), epochs=epochs, log=ft.Every(updates=2), checkpoints=ft.Checkpoints(tmp_path)
            )
        kept = [step for step in range(2, 4 * epochs + 1, 2) if step not in lost or epochs == 1]
        assert [row["step"] for row in result.history] == [row["step"] for row in read_json_lines(log)] == kept
        assert len(caught) == (bool(lost) and epochs == 2)
        log.write_bytes(log.read_bytes().replace(old, new, 1))
    assert (tmp_path / "log.jsonl.damaged").exists() == bool(lost)
