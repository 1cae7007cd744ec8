"""A record at an address: every row is there before what a run goes on from, whatever machine goes on."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import warm
from records import fitted
from runs import data_of, start, update_of
from s3 import Server, environment, objects
from s3 import s3 as s3  # noqa: PLC0414
from s3 import server as server  # noqa: PLC0414

import functrain as ft
from functrain.cli.main import main
from functrain.errors import RecordError, StorageError
from functrain.loop.lines import lines_of
from functrain.loop.record.folder import RecordFolder
from functrain.loop.record.outbox import Outbox
from functrain.loop.remote.store import Store

PROGRAM = """
    import json, os, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_platforms", "cpu")
    import functrain as ft

    address, here, epochs, kill_at, rate = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:6])
    os.environ |= json.loads(sys.argv[6]) | {"XDG_CACHE_HOME": here}
    params = {"w": jnp.zeros(2)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})

    def losses(params, batch):
        return (params["w"] * batch["x"] - 1).sum(1) ** 2

    class Killed(ft.Hook):
        def update_ended(self, run):
            if run.step == kill_at:
                run.checkpoints.wait()
                run.log({"unsaved": 1.0})
                os.kill(os.getpid(), 9)

    limits = ft.Limits(request=5.0, patience=10.0, lease=1.0)
    update = ft.make_update(lambda params, batch: losses(params, batch).mean(), optim)
    data = ft.from_arrays({"x": np.float32([[1, 2], [3, 4], [1, 1], [0, 1]])}, 2, seed=1)
    evaluation = ft.Evaluation(lambda params, batch: {"loss": losses(params, batch)}, data, name="test")
    result = ft.fit(
        update, update.init(params), data, epochs=int(epochs), log=ft.Every(updates=1), hooks=[Killed()],
        record=ft.Record(address, config={"rate": rate}, final=evaluation, report=kill_at < 0, limits=limits),
        checkpoints=ft.Checkpoints(f"{address}/checkpoints", every=ft.Every(updates=2), limits=limits),
    )
"""


def ran(address, here, *, epochs=3, kill_at=-1, rate=0.1):
    given = json.dumps(environment(os.environ["AWS_ENDPOINT_URL"]))  # A warm process has that of its parent.
    process = warm.Process(textwrap.dedent(PROGRAM), address, here, epochs, kill_at, rate, given)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (0 if kill_at < 0 else -signal.SIGKILL), errors
    return errors


def rows_at(address):
    found = [row for _, row in lines_of("log", Store(address).get("log.jsonl")).rows]
    return [(row["step"], name) for row in found for name in ("train/loss", "unsaved") if name in row]


@pytest.mark.slow
def test_each_row_is_there_once_whichever_machine_goes_on(s3, tmp_path, capsys):
    machines = [tmp_path / name for name in "aba"]
    for here, step in zip(machines, (3, 4, 5), strict=True):
        ran(s3, here, kill_at=step)
        last = rows_at(s3)[-1][0]
        assert last >= (step - 1) // 2 * 2  # That of the newest checkpoint, at least.
    ran(s3, tmp_path / "c", rate=0.2)
    assert rows_at(s3) == [(step, "train/loss") for step in range(1, 7)]
    run = json.loads(Store(s3).get("run.json"))
    assert [section["from_step"] for section in run["sections"]] == [0, 2, 2, 4]
    assert [section["how"] for section in run["sections"]] == [None, None, None, "finished"]
    assert run["sections"][3]["changed"]["config/rate"] == [0.1, 0.2]
    assert run["name"] == "digits"
    assert run["checkpoints"]["directory"] == f"{s3}/checkpoints"
    assert {"results.json", "report.html", "report.md"} <= {*objects(Store(s3))}
    assert main(["show", s3]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_new_run_keeps_the_record_of_the_one_before_at_the_address(s3, tmp_path):
    ran(s3, tmp_path / "a", epochs=1)
    first = Store(s3).get("log.jsonl")
    for name in [name for name in objects(Store(s3)) if name.startswith("checkpoints/")]:
        Store(s3).delete([name])
    ran(s3, tmp_path / "b", epochs=2)
    assert Store(s3).get("before-1/log.jsonl") == first
    assert rows_at(s3) == [(step, "train/loss") for step in range(1, 5)]


def test_a_loop_of_ones_own_sends_its_record_as_it_grows(s3, tmp_path):
    update = update_of()
    with ft.Record(s3, staging=tmp_path, report=False) as record:
        record.begin(update, update.init(start()))
        record.log(1, {"loss": 0.5})
        until = time.monotonic() + 60
        while not {"log.jsonl", "run.json"} <= {*objects(Store(s3))} and time.monotonic() < until:
            time.sleep(0.05)
        assert [row["step"] for _, row in lines_of("log", Store(s3).get("log.jsonl")).rows] == [1]
        assert json.loads(Store(s3).get("run.json"))["sections"][0]["how"] is None


def test_what_comes_up_after_the_end_is_at_the_address_too(tmp_path):
    update, address = update_of(), f"file://{tmp_path}/there"
    with ft.Record(address, staging=tmp_path / "here", report=False) as record:
        record.begin(update, update.init(start()))
        record.end(update.init(start()))
        warnings.showwarning("late", UserWarning, "train.py", 1)
    (section,) = json.loads(Store(address).get("run.json"))["sections"]
    assert section["warnings"] == [{"text": "late", "count": 1}]


@pytest.mark.parametrize(
    ("here", "there", "brought"),
    [
        ([1.0], [1.0, 2.0], True),  # Another machine went on since: rows of here have never happened.
        ([1.0, 2.0], [1.0, 3.0], True),
        ([1.0, 2.0], [1.0], False),  # What was not sent yet.
        ([1.0], [1.0], False),
        ([1.0], [], False),
    ],
)
def test_the_rows_are_those_of_the_machine_that_went_on_with_the_run(tmp_path, here, there, brought):
    folder, store = RecordFolder(tmp_path / "here"), Store(f"file://{tmp_path}/there")
    folder.write_run({"sections": [{"started": each} for each in here]})
    folder.write("log.jsonl", b"".join(b'{"step": %d}\n' % step for step in (1, 2, 3, 3, 3)))
    store.put("run.json", json.dumps({"sections": [{"started": each} for each in there]}).encode())
    store.put("log.jsonl", b"".join(b'{"step": %d}\n' % step for step in (1, 2, 3, 4)))
    store.put("results.json", b"{}")
    Outbox(store, folder).bring()
    assert ((tmp_path / "here" / "log.jsonl").read_bytes() == store.get("log.jsonl")) == brought
    run = json.loads((tmp_path / "here" / "run.json").read_bytes())
    assert [section["started"] for section in run["sections"]] == (there if brought else here)
    assert (tmp_path / "here" / "results.json").exists()


def test_a_machine_that_has_the_record_of_another_run_goes_on_with_the_one_at_the_address(s3, tmp_path):
    """That of a run which was begun anew elsewhere, and has fewer rows."""
    here, there = tmp_path / "here", tmp_path / "there"
    fitted(here, ft.Record(s3, staging=here, config={"run": 1}, report=False), epochs=3)
    state = fitted(there, ft.Record(s3, staging=there, config={"run": 2}, report=False), epochs=1).state
    record = ft.Record(s3, staging=here, config={"run": 2}, report=False)
    with pytest.warns(UserWarning, match=rf"of another run than {s3} has; it is kept in {here / 'before-1'}"):
        ft.fit(update_of(), state, data_of(), steps=10, record=record, progress=False)
    run = json.loads(Store(s3).get("run.json"))
    assert [(section["from_step"], section["changed"]) for section in run["sections"]] == [(0, {}), (5, {})]
    assert len(ft.read_json_lines(here / "before-1" / "log.jsonl")) == 3


def test_what_is_sent_of_a_file_that_is_written_anew_meanwhile_is_whole(tmp_path):
    folder, store = RecordFolder(tmp_path / "here"), Store(f"file://{tmp_path}/there")
    for name, count in (("short", 0), ("long", 1000)):
        (tmp_path / name).write_text(json.dumps({"sections": [0] * count}))
    folder.write_run({"sections": []})
    code = """
        import itertools, os
        for name in itertools.cycle(("short", "long")):
            os.link(name, "next")
            os.replace("next", "here/run.json")
    """
    outbox = Outbox(store, folder)
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path) as replacing:
        try:
            for _ in range(1000):
                outbox.sent()
                json.loads(store.get("run.json"))
        finally:
            replacing.kill()


def test_what_is_being_written_is_no_file_of_a_record_yet(tmp_path):
    folder, store = RecordFolder(tmp_path / "here"), Store(f"file://{tmp_path}/there")
    for name in ("log.jsonl", "results/a.npz", "results/.b.npz.tmp", "report.md"):
        folder.write(name, b"{}")
    Outbox(store, folder).sent()
    assert {*objects(store)} == {"log.jsonl", "results/a.npz", "report.md"}
    record = ft.Record(tmp_path / "here", report=False)
    assert [path.name for path in record.files] == ["a.npz", "report.md"]


def test_a_new_run_keeps_files_at_the_address_that_are_of_no_record(s3, tmp_path):
    Store(s3).put("results/mine.npz", b"mine")
    fitted(tmp_path, ft.Record(s3, staging=tmp_path / "here", report=False), epochs=1)
    assert Store(s3).get("before-1/results/mine.npz") == b"mine"


@pytest.mark.slow
def test_storage_that_is_gone_ends_no_run_and_is_told_once(monkeypatch, tmp_path):
    server = Server()
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    server.make("bucket")
    update = update_of()

    class Killing(ft.Hook):
        def epoch_ended(self, run):
            if run.epoch == 1:
                server.kill()

    record = ft.Record(
        "s3://bucket/digits", staging=tmp_path / "here", limits=ft.Limits(request=1.0, patience=1.0), report=False
    )
    with pytest.warns(UserWarning, match="the record can't be sent to s3://bucket/digits: .*; the run goes on") as told:
        result = ft.fit(update, update.init(start()), data_of(), epochs=4, record=record, hooks=[Killing()])
    assert int(result.state.step) == 20
    assert sum("can't be sent" in str(each.message) for each in told) == 1
    assert [row["step"] for row in ft.read_json_lines(tmp_path / "here" / "log.jsonl")] == [5, 10, 15, 20]


def test_an_address_that_is_none_and_a_bucket_that_is_not_there_are_told_before_the_run(s3, tmp_path):
    update = update_of()
    with pytest.raises(StorageError, match=r"s4:// is no storage that is known, .*did you mean 's3'"):
        ft.Record("s4://bucket/digits")
    record = ft.Record("s3://nowhere/digits", staging=tmp_path / "here", report=False)
    with pytest.raises(StorageError, match="nowhere"):
        ft.fit(update, update.init(start()), data_of(), epochs=1, record=record)
    with pytest.raises(RecordError, match=r"staging= and limits= are for an address such as 's3://bucket/digits', and"):
        ft.Record(tmp_path, staging=tmp_path)
