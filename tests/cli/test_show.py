"""`functrain show`, and the curves that it draws."""

import json
import math
import shutil

import pytest
from loop.record.written import RUN, write

from functrain.cli.curves import sparkline
from functrain.loop.checkpoint.contents import FORMAT, contents_file
from functrain.loop.logs import JsonLines
from functrain.loop.record.curves import Curve


def rows_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def line_of(out, name):
    return next(line.removeprefix(name).strip() for line in out.splitlines() if line.startswith(name))


def test_what_was_trained_how_far_it_came_and_how_it_went(run, told, data):
    code, out, err = told("show", run)
    assert (code, err) == (0, "")
    assert line_of(out, "part body") == "adamw, 1 leaf, 156 B with its state"
    assert line_of(out, "part head") == "sgd, 2 leaves, 20 B with its state"
    assert line_of(out, "progress").startswith("step 16, epoch 4, 20")
    assert line_of(out, "checkpoints") == "12, 16; best by valid/loss: 16"
    losses = [row["valid/loss"] for row in rows_of(run) if "valid/loss" in row]
    assert losses == sorted(losses, reverse=True)
    assert line_of(out, "valid/loss").startswith(f"{losses[-1]:.4g} at step 16, best {losses[-1]:.4g} at step 16")
    shown = data("show", run)
    assert shown["curves"]["valid/loss"] == {"steps": [4, 8, 12, 16], "values": losses}
    assert [*shown["curves"]] == ["train/loss", "valid/loss"]
    assert "train/learning_rate/body" in data("show", run, "--all")["curves"]
    assert (shown["progress"]["step"], shown["log"]["rows"], shown["problems"]) == (16, 8, [])


def test_the_best_result_may_be_long_ago_and_a_result_that_is_no_loss_has_none(run, data):
    with_more = JsonLines(run / "log.jsonl")
    with_more.log(20, {"epoch": 5, "valid/loss": math.nan, "valid/accuracy": 0.5})
    with_more.close()
    results = data("show", run)["results"]
    assert results["valid/loss"]["last"] == "NaN"
    assert (results["valid/loss"]["best_step"], results["valid/loss"]["mode"]) == (16, "min")
    assert results["valid/accuracy"] == {"last": 0.5, "step": 20, "mode": None, "best": None, "best_step": None}


def test_a_damaged_a_foreign_and_a_torn_line_are_counted_and_the_rest_is_shown(run, told, data):
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines[2:2] = [b'{"step": 9, "tra\n', b"epoch 3 of 7\n"]
    (run / "log.jsonl").write_bytes(b"".join(lines) + b'{"step": 20, "ti')
    code, out, _ = told("show", run)
    assert code == 0
    assert line_of(out, "progress").startswith("step 16, epoch 4")
    assert '2 damaged lines are left out, the first is line 3, \'{"step": 9, "tra\'' in out
    assert "the last line is torn" in out
    log = data("show", run)["log"]
    assert (log["rows"], log["damaged"]) == (8, 2)


def test_a_log_that_is_none_hides_no_checkpoint(run, told):
    (run / "log.jsonl").write_text("epoch 1: fine\nepoch 2: finer\n")
    code, out, _ = told("show", run)
    assert code == 0
    assert "is no log: line 1 is no row, 'epoch 1: fine'" in out
    assert line_of(out, "progress").startswith("step 16, epoch 4")
    assert line_of(out, "checkpoints").startswith("12, 16")


def test_a_row_that_was_written_again_after_a_restart_counts_once(run, data):
    before = data("show", run)
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(b"".join(lines[:4] + lines[2:]))
    again = data("show", run)
    assert again["curves"] == before["curves"]
    assert (again["log"]["rows"], again["log"]["repeated"]) == (8, 2)


def test_a_log_without_checkpoints_is_shown(run, told):
    (run.parent / "alone").mkdir()
    shutil.copy(run / "log.jsonl", run.parent / "alone")
    code, out, _ = told("show", run.parent / "alone")
    assert code == 0
    assert line_of(out, "progress").startswith("step 16, epoch 4")
    assert line_of(out, "valid/loss")
    assert out.endswith("! there is no checkpoint\n")


def test_checkpoints_without_a_log_are_shown(run, told):
    (run / "log.jsonl").unlink()
    code, out, _ = told("show", run)
    assert (code, line_of(out, "part head")) == (0, "sgd, 2 leaves, 20 B with its state")
    assert line_of(out, "progress").startswith("step 16, epoch 4, 20")
    assert out.endswith(f"! there is no log in {run}\n")


def test_the_log_of_a_record_lies_in_it_or_beside_its_checkpoints(run, data):
    record = run.parent / "record"
    record.mkdir()
    run.rename(record / "checkpoints")
    assert data("show", record)["log"]["rows"] == 8
    (record / "checkpoints" / "log.jsonl").rename(record / "log.jsonl")
    shown = data("show", record)
    assert (shown["log"]["rows"], shown["checkpoints"]) == (8, ["12", "16"])


def test_a_checkpoint_of_a_newer_format_or_that_is_damaged_is_told_and_the_one_before_it_is_shown(run, told):
    file = contents_file(run / "16")
    written = json.loads(file.read_bytes())
    file.write_text(json.dumps(written | {"format": FORMAT + 1, "versions": {"functrain": "9.0"}}))
    for says in (f"was written by functrain 9.0 in format {FORMAT + 1}", "holds can't be read"):
        code, out, _ = told("show", run)
        assert (code, line_of(out, "part head")) == (0, "sgd, 2 leaves, 20 B with its state")
        assert says in out
        file.write_bytes(file.read_bytes()[:100])


def test_neither_a_checkpoint_nor_a_log_is_trouble(tmp_path, told):
    assert told("show", tmp_path) == (
        2,
        "",
        f"functrain show: there is neither a checkpoint nor a log in {tmp_path}: give the folder of a run\n",
    )


def test_what_a_record_says_is_shown_with_the_final_numbers_of_best_and_last(tmp_path, told, data):
    code, out, err = told("show", write(tmp_path))
    assert (code, err) == (0, "")
    assert line_of(out, "name") == "digits"
    assert line_of(out, "ended") == "finished, at step 16, 2025-11-22 00:08:20 UTC, after 12.2 s of training"
    assert line_of(out, "from step 8").endswith(
        "started again 2025-11-22 00:10:00 UTC; config/rates/body 0.01 -> 0.001; config/new - -> 1"
    )
    assert line_of(out, "warnings") == "4"
    assert line_of(out, "part head") == "adam(b1=0.8), 4 leaves, 4.8 KiB"
    assert line_of(out, "final").split("  ")[0] == "best valid/accuracy, step 12"
    assert line_of(out, "test/accuracy").split() == ["0.975", "0.9625"]
    assert line_of(out, "test/loss").split() == ["nan", "0.125"]
    shown = data("show", tmp_path)
    assert (shown["record"]["name"], shown["record"]["config"]) == ("digits", RUN["config"])
    assert [section["how"] for section in shown["record"]["sections"]] == ["stopped", "finished"]
    assert shown["final"][0]["numbers"] == {"test/accuracy": 0.975, "test/loss": "NaN"}
    assert shown["results"]["valid/accuracy"]["best_step"] == 16


def test_checkpoints_are_found_where_a_record_says(run, told, data):
    record = write(run.parent / "record", RUN | {"checkpoints": {"directory": "../digits", "keep_best": {}}})
    assert data("show", record)["checkpoints"] == ["12", "16"]
    assert told("verify", record)[:2] == (0, "all sound: 12, 16\n")


def test_a_record_that_names_a_checkpoint_or_nothing_as_their_folder_hides_nothing(run, told):
    for said in ("../digits/16", "gone", "\0", "~nobody/x", "log.jsonl"):
        record = write(run.parent / "record", RUN | {"checkpoints": {"directory": said, "keep_best": {}}})
        code, out, _ = told("show", record)
        assert code == 0
        assert line_of(out, "ended").startswith("finished, at step 16")
        assert "! there is no checkpoint" in out


def test_a_log_that_can_not_be_read_hides_nothing_else(run, told):
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").symlink_to("/proc/self/mem")  # It can be opened, and reading it fails.
    code, out, _ = told("show", run)
    assert code == 0
    assert f"! {run / 'log.jsonl'} can't be read: " in out
    assert line_of(out, "checkpoints").startswith("12, 16")


def test_a_record_of_checkpoints_at_an_address_misses_none(tmp_path, told):
    at = {"directory": "s3://bucket/digits", "keep_best": {}}
    assert "!" not in told("show", write(tmp_path, RUN | {"checkpoints": at}))[1]


@pytest.mark.parametrize("written", ["{", "[]", '{"format": 2, "name": 7}'])
def test_a_record_that_is_torn_foreign_or_newer_is_told_and_the_rest_is_shown(tmp_path, told, written):
    (write(tmp_path) / "run.json").write_text(written)
    code, out, _ = told("show", tmp_path)
    assert code == 0
    assert "! run.json" in out
    assert line_of(out, "progress").startswith("step 16, epoch 4")
    assert line_of(out, "test/accuracy").split() == ["0.975", "0.9625"]


def test_a_record_alone_is_shown(tmp_path, told):
    (write(tmp_path) / "log.jsonl").unlink()
    code, out, _ = told("show", tmp_path)
    assert code == 0
    assert line_of(out, "ended").startswith("finished, at step 16")


def test_what_a_log_calls_its_numbers_does_nothing_to_a_terminal(run, told):
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 17, "valid/\\u001b[2J": 1.0}\n')
    assert "valid/\\x1b[2J" in told("show", run)[1]


@pytest.mark.parametrize("where", [0, 137, 999])
def test_a_thinned_curve_has_the_extremes_of_all(where):
    values = [math.sin(step / 50) for step in range(1000)]
    values[where] = 7.0
    thin = Curve([*range(1000)], values).thinned(40)
    assert len(thin.steps) <= 40
    assert (max(thin.values), thin.steps[thin.values.index(7.0)], min(thin.values)) == (7.0, where, min(values))
    assert sparkline(values, 40).count("█") == 1
    values[where] = math.nan
    assert sparkline(values, 40).count("!") == 1


def test_sparklines_of_hard_numbers():
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([math.inf, math.nan]) == "!!"
    assert sparkline([-1.7e308, 0.0, 1.7e308]) == "▁▅█"
    assert sparkline([5e-324, 0.0]) == "▁▁"
    assert sparkline([]) == ""
