"""The record of a run: what it says of it, each time that it is started."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import optax
import pytest
from records import evaluation, fitted, read, record_of, rows, saved
from runs import data_of, loss_fn, optim_of, start, update_of

import functrain as ft
from functrain.errors import CheckpointError, FitError, RecordError
from functrain.loop.record.folder import RecordFolder

ROOT = Path(__file__).parents[2]


# What it says.


def test_a_record_says_what_was_trained_by_what_on_what(tmp_path):
    result = fitted(tmp_path, record_of(tmp_path, config={"width": 4, "rates": {"body": np.float32(0.1)}}))
    run = read(tmp_path)
    assert run["config"] == {"width": 4, "rates": {"body": 0.1}}
    assert {name: run["model"]["parts"]["head"][name] for name in ("optimizer", "leaves", "parameters", "bytes")} == {
        "optimizer": "sgd", "leaves": 2, "parameters": 5, "bytes": 20,
    }  # fmt: skip
    assert run["model"]["parts"]["head"]["hyperparameters"] == {"learning_rate": 0.1}
    assert run["model"]["parameters"] == {"total": 17, "trained": 17}
    assert run["model"]["optimizers"] == str(update_of().optim)
    batch = next(iter(data_of()))
    assert run["model"]["audit"] == str(ft.audit(loss_fn, update_of().optim.parts, start(), batch, optim=optim_of()))
    assert run["versions"].items() >= {"optax": optax.__version__, "numpy": np.__version__}.items()
    assert run["device"]["platform"] == "cpu"
    (section,) = run["sections"]
    ended = {"from_step": 0, "to_step": int(result.state.step), "to_epoch": 2, "how": "finished", "why": None}
    assert section.items() >= ended.items()
    assert section["started"] < section["ended"]
    assert section["memory"]["host"] > 1e6


def test_a_run_that_goes_on_adds_a_section_that_says_what_changed(tmp_path):
    for epochs, rate in ((1, 0.1), (3, 0.2)):
        fitted(tmp_path, record_of(tmp_path, config={"rate": rate, "width": 4}), epochs, checkpoints=saved(tmp_path))
    one, two = read(tmp_path)["sections"]
    assert (one["checkpoint"], two["checkpoint"], two["from_step"], two["from_epoch"]) == (None, "5", 5, 1)
    assert two["changed"] == {"config/rate": [0.1, 0.2]}
    assert rows(tmp_path) == [(5, 1), (10, 2), (15, 3)]


def test_an_audit_is_of_the_program_that_goes_on_and_one_that_fails_ends_no_run(tmp_path):
    tries = []

    class Refusing(ft.Hook):
        def epoch_ended(self, run):
            refuses.append(1)

    def refusing(params, batch):
        if refuses:
            tries.append(1)
            raise LookupError("not on shapes alone")
        return loss_fn(params, batch)

    refuses = []
    fitted(tmp_path, epochs=1, checkpoints=saved(tmp_path))
    assert read(tmp_path)["model"]["audit"] is not None
    fitted(tmp_path, epochs=4, checkpoints=saved(tmp_path), update=update_of(refusing), hooks=[Refusing()])
    assert read(tmp_path)["model"]["audit"] is None
    assert len(tries) == 1


def test_a_finished_run_started_again_adds_nothing(tmp_path):
    for _ in range(2):
        fitted(tmp_path, record_of(tmp_path, final=evaluation()), checkpoints=saved(tmp_path))
        written = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
        assert len(read(tmp_path)["sections"]) == 1
    result = fitted(tmp_path, record_of(tmp_path, final=evaluation()), checkpoints=saved(tmp_path))
    assert result.final["last"] == read(tmp_path, "results.json")["final"][0]["numbers"]
    assert written == {path: path.read_bytes() for path in tmp_path.glob("*.json*")}


def test_a_run_that_was_finished_and_not_evaluated_is_evaluated_when_it_is_started_again(tmp_path):
    for final in ((), evaluation()):
        result = fitted(tmp_path, record_of(tmp_path, final=final), checkpoints=saved(tmp_path))
    assert len(read(tmp_path)["sections"]) == 1
    assert read(tmp_path, "results.json")["final"][0]["numbers"] == result.final["last"]


def test_a_run_that_failed_or_was_stopped_says_why(tmp_path):
    class Failing(ft.Hook):
        def epoch_ended(self, run):
            raise RuntimeError(f"no more of {Path.home()}/data")

    class Stopping(ft.Hook):
        def epoch_ended(self, run):
            run.stop("enough")

    with pytest.raises(RuntimeError):
        fitted(tmp_path / "a", hooks=[Failing()])
    fitted(tmp_path / "b", hooks=[Stopping()])
    told = [read(tmp_path / name)["sections"][0] for name in "ab"]
    assert [(each["how"], each["why"], each["to_step"]) for each in told] == [
        ("failed", "RuntimeError: no more of ~/data", 5),
        ("stopped", "enough", 5),
    ]


def test_warnings_of_a_run_are_shown_and_kept(tmp_path):
    class Loud(ft.Hook):
        def epoch_ended(self, run):
            warnings.warn("the fan is loud", stacklevel=1)

    with pytest.warns(UserWarning, match="the fan is loud"):
        fitted(tmp_path, hooks=[Loud()])
    told = read(tmp_path)["sections"][0]["warnings"]
    assert {"text": "the fan is loud", "count": 2} in told
    with pytest.warns(UserWarning, match="after it"):
        warnings.warn("after it", stacklevel=1)
    assert read(tmp_path)["sections"][0]["warnings"] == told


def test_what_came_up_is_written_at_each_epoch_and_not_at_the_end_alone(tmp_path):
    class Looking(ft.Hook):
        def epoch_ended(self, run):
            seen.append(read(tmp_path))
            warnings.showwarning("the fan is loud", UserWarning, "train.py", 1)

    seen = []
    fitted(tmp_path, hooks=[Looking()])
    assert [run["model"]["audit"] is None for run in seen] == [True, False]
    assert {"text": "the fan is loud", "count": 1} in seen[1]["sections"][0]["warnings"]


def test_the_versions_are_those_that_were_imported_whatever_is_installed_since(tmp_path):
    code = """
        import importlib.metadata, pathlib, shutil, sys
        sys.path[:0] = ["tests/loop", sys.argv[1]]
        for name in ("kept", "gone"):
            pathlib.Path(sys.argv[1], f"{name}.py").touch()
            about = pathlib.Path(sys.argv[1], f"{name}-1.0.dist-info")
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
            (about / "top_level.txt").write_text(name)
        import gone, kept
        import functrain as ft
        from records import fitted, record_of

        class Upgrading(ft.Hook):
            def epoch_ended(self, run):
                for name in ("kept", "gone"):
                    about = pathlib.Path(sys.argv[1], f"{name}-1.0.dist-info")
                    if name == "gone":
                        shutil.rmtree(about)
                    else:
                        (about / "METADATA").write_text("Metadata-Version: 2.1\\nName: kept\\nVersion: 2.0\\n")

        run = pathlib.Path(sys.argv[1], "run")
        print(int(fitted(run, record_of(run), 1, hooks=[Upgrading()]).state.step))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.stdout == "5\n", ended.stderr
    assert read(tmp_path / "run")["versions"].items() >= {"kept": "1.0", "gone": "1.0"}.items()


# What stays of another run.


def test_a_new_run_in_the_folder_of_another_keeps_the_record_of_that(tmp_path, capsys):
    fitted(tmp_path, epochs=1)
    fitted(tmp_path, epochs=2)
    assert (
        f"a new run begins; the record of the one before is kept in {tmp_path / 'before-1'}" in capsys.readouterr().out
    )
    assert [rows(tmp_path / "before-1"), rows(tmp_path)] == [[(5, 1)], [(5, 1), (10, 2)]]
    assert len(read(tmp_path)["sections"]) == 1


def test_a_run_that_came_to_nothing_leaves_nothing_to_keep(tmp_path):
    class Failing(ft.Hook):
        def run_started(self, run):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fitted(tmp_path, hooks=[Failing()])
    fitted(tmp_path)
    assert [not list(tmp_path.glob("before*")), len(read(tmp_path)["sections"])] == [True, 1]


def test_files_of_ones_own_that_are_named_like_those_of_a_record_are_kept(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    own = {name: name.encode() for name in ("results/mine.npz", "source-code.tar.gz", "report.md")}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    fitted(tmp_path)
    assert {name: (tmp_path / "before-1" / name).read_bytes() for name in own} == own
    assert f"is kept in {tmp_path / 'before-1'}" in capsys.readouterr().out


def test_a_fresh_run_moves_record_and_checkpoints_of_one_folder_together(tmp_path):
    for epochs in (1, 2):
        fitted(tmp_path, epochs=epochs, checkpoints=ft.Checkpoints(tmp_path), fresh=epochs == 2)
    assert {path.name for path in (tmp_path / "before-1").iterdir()} == {
        "5",
        "5.manifest.json",
        "log.jsonl",
        "run.json",
    }
    assert [rows(tmp_path), len(read(tmp_path)["sections"])] == [[(5, 1), (10, 2)], 1]


def test_a_state_that_has_made_steps_goes_on_with_the_record_without_checkpoints(tmp_path):
    state = fitted(tmp_path, epochs=1).state
    ft.fit(update_of(), state, data_of(), steps=10, record=record_of(tmp_path), progress=False)
    assert [step for step, _ in rows(tmp_path)] == [5, 10]
    assert [section["from_step"] for section in read(tmp_path)["sections"]] == [0, 5]


def test_a_fresh_run_of_a_state_that_has_made_steps_has_a_record_of_its_own(tmp_path):
    state = fitted(tmp_path, epochs=1).state
    ft.fit(update_of(), state, data_of(), steps=10, record=record_of(tmp_path), fresh=True, progress=False)
    assert [step for step, _ in rows(tmp_path)] == [10]
    assert [section["from_step"] for section in read(tmp_path)["sections"]] == [5]
    assert rows(tmp_path / "before-1") == [(5, 1)]


def test_what_says_where_it_lies_in_memory_is_in_a_configuration_the_same_in_each_process(tmp_path):
    first, second = (record_of(tmp_path, config={"kind": object()}).config for _ in range(2))
    assert first == second == {"kind": "<object object>"}


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"format": 1}'])
def test_what_is_no_record_is_set_aside(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "time": 0.0}\n')
    state, _ = update_of()(update_of().init(start()), next(iter(data_of())))
    with pytest.warns(UserWarning, match=r"is no record of a run, and is kept as 'run\.json\.damaged'"):
        ft.fit(update_of(), state, data_of(), steps=2, record=record_of(tmp_path), progress=False)
    assert (tmp_path / "run.json.damaged").read_bytes() == content
    assert len(read(tmp_path)["sections"]) == 1


def test_a_record_of_a_newer_format_is_left_alone(tmp_path):
    (tmp_path / "run.json").write_text('{"format": 2}')
    with pytest.raises(RecordError, match=r"of format 2, and this functrain writes format 1: go on with the functrain"):
        RecordFolder(tmp_path).run()


def test_two_processes_do_not_write_one_record(tmp_path):
    code = """
        import functrain as ft, sys
        record = ft.Record(sys.argv[1], report=False)
        record.open(goes_on=True)
        print(flush=True)
        input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        other.stdout.readline()
        with pytest.raises(CheckpointError, match=r"another process writes a record to .*: wait for it or stop it"):
            fitted(tmp_path)
        other.communicate(b"\n")
    fitted(tmp_path)


# Given wrongly, and in need.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": 3}, r"config=3: give names to the values, config=\{'width': 64\}"),
        ({"final": [3]}, r"final=3 is no Evaluation: write final=ft\.Evaluation\(eval_step, test\)"),
        ({"final": [evaluation(), evaluation()]}, r"two final evaluations have one name: \['test', 'test'\]"),
    ],
)
def test_an_argument_that_is_none_says_what_to_write(tmp_path, options, said):
    with pytest.raises(RecordError, match=said):
        record_of(tmp_path, **options)


def test_a_record_among_the_hooks_says_where_it_goes(tmp_path):
    with pytest.raises(FitError, match=r"hooks= has a Record, which would keep no log: write fit\(\.\.\., record="):
        fitted(tmp_path, hooks=[record_of(tmp_path)])


def test_a_file_in_the_place_of_the_folder_and_a_record_by_its_name_alone_are_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"is a file: give the record a folder, ft\.Record\('runs/digits'\)"):
        record_of(tmp_path / "file")
    with pytest.raises(FitError, match=r"record= takes Record, not 'runs' \(str\): write ft\.Record\('runs'\)"):
        fitted(tmp_path, record="runs")


def test_a_report_without_matplotlib_says_what_to_install(tmp_path):
    code = """
        import sys
        from importlib.machinery import PathFinder

        class Without(PathFinder):
            @classmethod
            def find_spec(cls, name, *more):
                return None if name.partition(".")[0] == "matplotlib" else super().find_spec(name, *more)

        sys.meta_path[:] = [Without if each is PathFinder else each for each in sys.meta_path]
        import functrain as ft
        ft.Record(sys.argv[1], report=False)
        ft.Record(sys.argv[1])
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (
        "RecordError: the report of a record is drawn by matplotlib: pip install 'functrain[record]', or"
        in ended.stderr
    )


def test_a_full_disk_ends_no_run(tmp_path):
    code = """
        import resource, sys
        sys.path.insert(0, "tests/loop")
        import functrain as ft
        from runs import data_of, start, update_of

        class Filling(ft.Hook):
            def run_started(self, run):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

        update = update_of()
        record = ft.Record(sys.argv[1], report=False)
        result = ft.fit(update, update.init(start()), data_of(), epochs=1, record=record, hooks=[Filling()])
        print(int(result.state.step), len(result.history))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.stdout == "5 1\n", ended.stderr
    told = "can't be written to"
    assert ended.stderr.count(told) == 1
    assert "the record of the run can't be written to" in ended.stderr
    assert "File too large; the run goes on" in ended.stderr
    assert not (tmp_path / "run.json").exists()
