"""MLflow, its own server: every row is there once, whatever is killed."""

import json
import math
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import warm
from mlflow_server import Server
from runs import counted, logged, update_of
from soak import in_soak

import functrain as ft
from functrain.errors import LogError

PROGRAM = Path(__file__).parent / "tracked_run.py"
UNHURT = "unhurt"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def tracker(server, request):
    return lambda name=request.node.name, **options: ft.MLflow(name, uri=server.uri, **{"every": 0.0} | options)


def started(server, directory, name, **given):
    options = {"name": name, "uri": server.uri, "every": 0.0, "patience": given.pop("patience", 60.0)}
    return warm.Process(PROGRAM, json.dumps({"directory": str(directory), "loggers": [["MLflow", options]], **given}))


def ended(process, code=0):
    printed, errors = process.communicate()
    assert process.returncode == code, errors
    return json.loads(printed.splitlines()[-1]) if code == 0 else None


@pytest.fixture(scope="module")
def unhurt(server, tmp_path_factory):
    """The histories of a run that is left alone."""
    ended(started(server, tmp_path_factory.mktemp("unhurt"), UNHURT))
    return server.histories(server.run(UNHURT))


@pytest.mark.slow
def test_a_run_that_is_left_alone_has_each_row_once(unhurt):
    steps = [*range(1, 41)]
    assert [step for step, _ in unhurt["train/loss"]] == steps
    assert [step for step, _ in unhurt["valid/loss"]] == [10, 20, 30, 40]
    assert unhurt["train/nan_"] == [(step, "nan") for step in steps]
    assert unhurt["train/far"] == [(step, str(sys.float_info.max)) for step in steps]


@in_soak
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_has_the_histories_of_one_that_was_not(server, unhurt, tmp_path):
    rng = random.Random(0)
    for kill in (2, 7, 11, 20, 30):
        seconds = rng.choice([0.0, 0.02, 0.1])
        ended(started(server, tmp_path, "killed", kill=kill, seconds=seconds), -signal.SIGKILL)
    assert ended(started(server, tmp_path, "killed"))["told"] == []
    run = server.run("killed")
    assert server.histories(run) == unhurt
    assert run.info.status == "FINISHED"


@in_soak
@pytest.mark.slow
def test_a_server_that_is_killed_in_a_run_and_comes_back_loses_no_row_and_has_none_twice(server, unhurt, tmp_path):
    process = started(server, tmp_path, "hurt", slow=0.25)
    while not any(run.data.metrics for run in server.runs("hurt")):
        time.sleep(0.05)
    server.kill()
    time.sleep(2)
    server.start()
    (told,) = ended(process)["told"]
    assert server.histories(server.run("hurt")) == unhurt
    assert "; training goes on, and the rows are kept and sent when they can be" in told


@in_soak
@pytest.mark.slow
def test_a_run_that_no_server_took_is_sent_by_the_same_call_when_there_is_one(server, unhurt, tmp_path):
    nowhere = Server(tmp_path)  # It has an address, and does not run.
    told = ended(started(nowhere, tmp_path, "late", patience=2.0))["told"]
    assert "lacks 44 rows, of the steps 1 to 40: " in told[-1]
    assert ended(started(server, tmp_path, "late"))["told"] == []
    assert server.histories(server.run("late")) == unhurt


@in_soak
@pytest.mark.slow
def test_a_run_that_goes_on_from_before_what_was_sent_is_a_new_one_with_all_rows(server, unhurt, tmp_path):
    """Its newest checkpoints are gone."""
    ended(started(server, tmp_path, "back", steps=24))
    for path in (tmp_path / "run").glob("24*"):
        path.rename(tmp_path / path.name)
    ended(started(server, tmp_path, "back"))
    new, old = server.runs("back")
    assert server.histories(new) == unhurt
    assert server.histories(old)["train/loss"] == unhurt["train/loss"][:24]
    assert (new.data.tags["functrain.run"], old.data.tags["functrain.run"]) == ("back", "back before step 21")


@in_soak
@pytest.mark.slow
def test_a_new_run_of_a_name_is_another_and_one_that_goes_on_the_same(server, tracker):
    logged(tracker("two"), [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    logged(tracker("two"), [(3, {"loss": 3.0})], start=2)
    first = server.run("two")
    assert server.histories(first) == {"loss": [(1, "1.0"), (2, "2.0"), (3, "3.0")]}
    logged(tracker("two"), [(1, {"loss": 4.0})])
    new, old = server.runs("two")
    assert old.info.run_id == first.info.run_id
    assert server.histories(new) == {"loss": [(1, "4.0")]}


@in_soak
@pytest.mark.slow
def test_names_that_mlflow_refuses_are_changed_and_none_is_lost(server, tracker):
    names = [
        "recall@5",
        "recall#5",
        "a//b",
        "/a",
        "../a",
        "a/./c",
        ".",
        "",
        "x" * 300,
        "x" * 300 + "y",
        "größe",
        "a:b",
        "a\n",
    ]
    row = {name: float(i) for i, name in enumerate(names)}
    for start in (-1, 1):  # They are the same when the run goes on.
        logged(tracker("names"), [(start + 2, row)], start=start)
    found = server.histories(server.run("names"))
    assert sorted(float(value) for points in found.values() for _, value in points) == sorted([*range(len(names))] * 2)
    assert [(step, value) for step, value in found["recall_5"]] == [(1, "0.0"), (3, "0.0")]
    assert {"a/b", "größe"} <= found.keys()
    assert all(len(points) == 2 for points in found.values())


@in_soak
@pytest.mark.slow
def test_a_row_of_more_numbers_than_mlflow_takes_at_once(server, tracker):
    row = {f"n/{i}": float(i) for i in range(2500)}
    logged(tracker("wide"), [(1, row), (1, row)])  # Two of one step are two.
    found = server.client.get_metric_history(server.run("wide").info.run_id, "n/2499")
    assert len(server.run("wide").data.metrics) == 2500
    assert [(point.step, point.value) for point in found] == [(1, 2499.0)] * 2


@in_soak
@pytest.mark.slow
def test_the_configuration_is_params_and_what_changes_of_it_tags(server, tracker):
    config = {"width": 64, "rates": {"body": 0.001}, "on": True, "names": ["a", "b"], "nothing": None, "text": "",
              "long": "x" * 13000, "many": {str(i): i for i in range(150)}, "far": math.inf}  # fmt: skip
    for start, body in ((-1, 0.001), (4, 0.0005), (6, 0.001)):
        log = tracker("config")
        log.resume(start)
        log.start(config | {"rates": {"body": body}})
        log.log(start + 2, {})
        log.close()
        found = server.run("config").data
        assert found.params["rates/body"] == "0.001"
        assert found.tags.get("changed/rates/body") == {-1: None, 4: "0.0005", 6: "0.001"}[start]
    wanted = {"width": "64", "on": "true", "names": '["a", "b"]', "nothing": "null", "many/149": "149", "text": ""}
    assert {name: found.params[name] for name in wanted} == wanted
    assert "".join(found.params[name] for name in ("long", "long.2", "long.3")) == "x" * 13000


@in_soak
@pytest.mark.slow
def test_files_are_artifacts_and_the_newest_is_there(server, tracker, tmp_path):
    log = tracker("files", patience=30.0)
    log.resume(-1)
    for text in ("first", "second"):
        (tmp_path / "report.html").write_text(text)
        log.artifact(tmp_path / "report.html")
    log.artifact(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=r"^MLflow\('files', experiment='functrain'\) lacks 'gone.png': .*gone.png"):
        log.close()
    run = server.run("files").info.run_id
    assert [each.path for each in server.client.list_artifacts(run)] == ["report.html"]
    (tmp_path / "taken").mkdir()
    taken = server.client.download_artifacts(run, "report.html", str(tmp_path / "taken"))
    assert Path(taken).read_text() == "second"


@in_soak
@pytest.mark.slow
def test_the_final_numbers_are_metrics_once_however_often_they_are_given(server, tracker, tmp_path):
    final = [{"of": "last", "step": 8, "numbers": {"test/accuracy": 0.75, "test/loss": "NaN"}}]
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "final": final}))
    for _ in range(2):
        log = tracker("results")
        log.resume(8)
        log.artifact(tmp_path / "results.json")
        log.close()
    found = server.histories(server.run("results"))
    assert found == {"final/last/test/accuracy": [(8, "0.75")], "final/last/test/loss": [(8, "nan")]}


@in_soak
@pytest.mark.slow
def test_a_run_that_ends_with_an_error_has_failed(server, tracker):
    class Failing(ft.Hook):
        def update_ended(self, run):
            raise OSError("the power is gone")

    with pytest.raises(OSError, match="the power is gone"), warnings.catch_warnings(action="ignore"):
        ft.fit(*counted(update_of()), epochs=1, loggers=[tracker("failed")], hooks=[Failing()])
    assert server.run("failed").info.status == "FAILED"


def test_without_mlflow_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(LogError, match=r"MLflow\('digits', .*\): .*mlflow.*; write pip install 'functrain\[mlflow\]'$"):
        ft.MLflow("digits")


def test_an_address_of_no_server_is_an_error_before_the_run():
    problem = r"MLflow\('digits', .*\): .*htp://x.*; write an address of a server, uri='http://127.0.0.1:5000'$"
    with pytest.raises(LogError, match=f"(?s){problem}"):
        ft.MLflow("digits", uri="htp://x")
