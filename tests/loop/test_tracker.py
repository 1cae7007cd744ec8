"""What trackers share, with a service in memory: when rows are sent, what is tried again, what is told."""

import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from runs import X, Y, counted, update_of

import functrain as ft
from functrain.errors import LogError
from functrain.loop.tracker import Tracker


class Memory(Tracker):
    """A service that fails as often as it is told to, after it has done what it was asked for, or before."""

    def __init__(self, fails=0, refuses=(), **options):
        super().__init__(**{"every": 0.0, "patience": 30.0} | options)
        self.calls, self.fails, self.refuses = [], fails, {*refuses}

    def __repr__(self):
        return "Memory()"

    def _try(self, call):
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no route")
        self.calls.append(call)

    def _open(self, step):
        self._try(("open", step))

    def _config(self, config):
        self._try(("config", config))

    def _send(self, rows):
        self._try(("rows", [row.step for row in rows]))

    def _send_file(self, path):
        if path.name in self.refuses:
            raise PermissionError(path.name)
        self._try(("file", path.name))

    def _send_results(self, step, numbers):
        self._try(("results", step, numbers))

    def _end(self, status):
        self._try(("end", status))

    def steps(self):
        return [step for name, *rest in self.calls if name == "rows" for step in rest[0]]


def sent(memory, count):
    """Waits for as many rows."""
    until = time.monotonic() + 60
    while len(memory.steps()) < count and time.monotonic() < until:
        time.sleep(0.01)
    return memory.steps()


def test_without_checkpoints_a_row_is_sent_at_once():
    memory = Memory()
    memory.resume(-1)
    memory.log(1, {"loss": 0.5})
    assert sent(memory, 1) == [1]
    memory.close()
    assert memory.calls == [("open", -1), ("rows", [1]), ("end", "FINISHED")]


def test_a_row_waits_until_its_step_stands_and_those_that_never_did_are_told():
    memory = Memory()
    memory.resume(-1)
    memory.settle(-1)
    for step in (1, 2, 3):
        memory.log(step, {})
    memory.settle(2)
    memory.log(2, {})  # Another row of a step that stands comes after those before it.
    memory.settle(3)
    memory.log(4, {})
    memory.log(5, {})
    told = (
        "Memory() lacks 2 rows, of the steps 4 to 5: they wait for a checkpoint, as the run may go on from the one"
        " before them; result.history has them, and a run that goes on sends what it keeps"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(told)}$"):
        memory.close()
    assert memory.steps() == [1, 2, 3, 2]


def test_a_run_that_goes_on_forgets_what_waits_and_sends_what_its_log_has(tmp_path):
    log = ft.JsonLines(tmp_path / "log.jsonl")
    for step in (1, 2):
        log.log(step, {"loss": 0.5})
    memory = Memory()
    memory.settle(0)
    memory.log(7, {})
    memory.resume(2)
    memory.settle(2)
    memory.restore(ft.read_json_lines(tmp_path / "log.jsonl"))
    memory.settle(7)  # The row of step 7 was one that never happened.
    memory.close()
    assert memory.steps() == [1, 2]
    assert memory.calls[0] == ("open", 2)


@pytest.mark.parametrize("every", [2, 3])
def test_fit_sends_the_rows_of_a_checkpoint_when_it_is_whole_and_all_in_the_end(tmp_path, every):
    seen = []

    class Looking(ft.Hook):
        def update_ended(self, run):
            checkpoints.wait()
            seen.append((run.step, [*memory.steps(), *(row.step for kind, row in memory._todo if kind == "row")]))

    memory, checkpoints = Memory(), ft.Checkpoints(tmp_path, every=ft.Every(updates=every))
    ft.fit(*counted(update_of(), 8), steps=7, log=ft.Every(updates=1), loggers=[memory], checkpoints=checkpoints,
           hooks=[Looking()])  # fmt: skip
    for step, steps in seen:
        assert not steps or max(steps) <= (step - 1) // every * every
    assert memory.steps() == [1, 2, 3, 4, 5, 6, 7]
    assert seen[-1][1][:1] == [1]


def test_a_run_that_fails_sends_no_row_past_its_checkpoint_and_the_next_one_sends_them(tmp_path):
    class Failing(ft.Hook):
        def update_ended(self, run):
            if run.step == 6:
                raise OSError("the power is gone")

    def fit(memory, hooks):
        return ft.fit(*counted(update_of(), 8), steps=8, log=ft.Every(updates=1), loggers=[memory], hooks=hooks,
                      checkpoints=ft.Checkpoints(tmp_path, every=ft.Every(updates=4)))  # fmt: skip

    first, second = Memory(), Memory()
    with (
        pytest.warns(UserWarning, match=r"lacks 1 row, of the steps 5 to 5: they wait for a checkpoint"),
        pytest.raises(OSError, match="the power is gone"),
    ):
        fit(first, [Failing()])
    assert first.steps() == [1, 2, 3, 4]
    assert first.calls[-1] == ("end", "FAILED")
    fit(second, [])
    assert second.steps() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (second.calls[0], second.calls[-1]) == (("open", 4), ("end", "FINISHED"))


def test_what_fails_is_told_once_and_tried_again_in_order():
    memory = Memory(fails=3)
    memory.resume(-1)
    memory.start({"width": 64})
    memory.log(1, {})
    until = time.monotonic() + 60
    while memory._error is None and memory.fails and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.warns(
        UserWarning, match=r"^Memory\(\): ConnectionError: no route; training goes on, and the rows are kept and sent"
    ) as caught:
        memory.log(2, {})
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        memory.log(3, {})
        memory.close()
    assert [call for call in memory.calls if call[0] != "rows"] == [
        ("open", -1), ("config", {"width": 64}), ("end", "FINISHED"),
    ]  # fmt: skip
    assert memory.steps() == [1, 2, 3]


def test_a_service_that_stays_away_is_waited_for_no_longer_than_patience_says():
    memory = Memory(fails=10**9, patience=1.0)
    memory.log(1, {})
    told = (
        "Memory() lacks 1 row, of the steps 1 to 1: ConnectionError: no route; result.history has them, and a run that"
        " goes on sends what it keeps"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(told)}$"):
        memory.close()


def test_what_comes_before_a_run_is_begun_is_of_the_run(tmp_path):
    memory = Memory()
    memory.start({"width": 64})
    memory.artifact(tmp_path / "run.json")
    memory.resume(7)
    memory.close()
    assert memory.calls == [("open", 7), ("config", {"width": 64}), ("file", "run.json"), ("end", "FINISHED")]


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_with_a_record_gives_its_configuration_its_rows_its_results_and_its_files(tmp_path, saves):
    data = ft.from_arrays({"x": X, "y": Y}, batch_size=6)
    final = ft.Evaluation(lambda params, batch: {"norm": batch["y"] ** 2}, data, name="test")
    memory, record = Memory(), ft.Record(tmp_path / "run", config={"width": 64}, final=final)
    options = {"checkpoints": ft.Checkpoints(tmp_path / "checkpoints")} if saves else {}
    ft.fit(*counted(update_of()), epochs=2, log=ft.Every(updates=1), loggers=[memory], record=record, **options)
    assert memory.calls[:2] == [("open", -1), ("config", {"width": 64})]
    assert memory.steps() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {"run.json", "results.json", "report.html"} <= {what for kind, what, *_ in memory.calls if kind == "file"}
    ((step, numbers),) = [rest for kind, *rest in memory.calls if kind == "results"]
    assert step == 8
    assert numbers == {"final/last/test/norm": pytest.approx(np.mean(Y**2), rel=1e-5)}  # Sums in float32.


@pytest.mark.parametrize("written", ["", "[]", '{"final": 3}', '{"final": [{"of": "last"}]}', "\xff"])
def test_results_that_are_none_are_a_file_and_no_more(tmp_path, written):
    (tmp_path / "results.json").write_bytes(written.encode("latin-1"))
    memory = Memory()
    memory.resume(-1)
    memory.artifact(tmp_path / "results.json")
    memory.close()
    assert memory.calls == [("open", -1), ("file", "results.json"), ("end", "FINISHED")]


def test_a_file_that_fails_holds_up_no_row_and_is_told():
    memory = Memory(refuses=["report.html"])
    memory.artifact(Path("report.html"))
    memory.artifact(Path("run.json"))
    memory.log(1, {})
    assert sent(memory, 1) == [1]
    with pytest.warns(UserWarning, match=r"^Memory\(\) lacks 'report.html': PermissionError: report.html$"):
        memory.close()
    assert ("file", "run.json") in memory.calls


def test_a_closed_tracker_says_so():
    memory = Memory()
    memory.close()
    memory.close()
    for attempt in (lambda: memory.log(2, {}), lambda: memory.resume(1)):
        with pytest.raises(LogError, match=r"Memory\(\) is closed; make a new logger, or call close\(\) after the la"):
            attempt()


def test_rows_of_one_moment_have_times_of_their_own():
    memory = Memory()
    times = [memory._row(1, 1700000000.5, {}).milliseconds for _ in range(3)]
    assert times == [1700000000500, 1700000000501, 1700000000502]
