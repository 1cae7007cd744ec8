"""The log of a run, read as columns: the same rows as line by line, however it was harmed."""

import json
import math

import pytest
from loop.record.written import write

from functrain.loop.logs import read_json_lines
from functrain.loop.record.curves import Curve, extremes
from functrain.loop.record.log import read_log


def lines(*said):
    return b"".join(json.dumps(row).encode() + b"\n" for row in said)


@pytest.fixture
def log(tmp_path):
    """Reads bytes as a log."""

    def of(written):
        (tmp_path / "log.jsonl").write_bytes(written)
        return read_log(tmp_path / "log.jsonl")

    return of


def test_every_number_is_a_curve_and_all_are_those_that_are_read_line_by_line(tmp_path):
    path = write(tmp_path) / "log.jsonl"
    log, read = read_log(path), read_json_lines(path)
    assert (log.rows, log.damaged, log.repeated, log.problems) == (len(read), 0, 0, ())
    for name, curve in log.curves.items():
        expected = [(row["step"], row[name]) for row in read if name in row]
        assert [*zip(curve.steps, curve.values, strict=True)] == expected, name
    assert {*log.curves} | {"step", "time", "epoch"} == {name for row in read for name in row}
    assert log.last == {name: read[-1][name] for name in ("step", "epoch", "time")}
    assert [*zip(log.epochs.steps, log.epochs.values, strict=True)] == [(row["step"], row["epoch"]) for row in read]


def test_a_log_of_several_blocks_loses_no_row(log):
    said = [{"step": step, "epoch": 0, "train/loss": 0.5, "filler": 10**100} for step in range(1, 20_001)]
    assert log(lines(*said)).curves["train/loss"].steps.tolist() == [*range(1, 20_001)]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2, "tra\n',
        b"epoch 3 of 7\n",
        b"\n",
        b"[]\n",
        b'{"step": 1.5, "a": 1.0}\n',
        b'{"step": true, "a": 1.0}\n',
        b'{"a": 1.0}\n',
        b'{"step": 2, "a": "low"}\n',
        b'{"step": 2, "a": null}\n',
        b'{"step": 2, "a": [1.0]}\n',
        b'{"step": 2, "a": {"b": 1.0}}\n',
        b'{"step": 2, "a": 1' + b"0" * 400 + b"}\n",  # More than a float holds,
        b'{"step": 2' + b"0" * 400 + b"}\n",
        b'{"step": 2, "a": ' + b"9" * 5000 + b"}\n",  # or Python reads.
        b'{"step": 2, "a": ' + b"[" * 5000 + b"}\n",
        b"\xff\xfe\n",
        b'{"step": 2}, {"step": 3}\n',
    ],
)
def test_a_line_that_is_no_row_is_counted_and_harms_no_other(log, damage):
    found = log(lines({"step": 1, "a": 1.0}) + damage + lines({"step": 4, "a": 4.0}))
    assert (found.rows, found.damaged) == (2, 1)
    assert (found.curves["a"].steps.tolist(), found.curves["a"].values.tolist()) == ([1, 4], [1.0, 4.0])
    assert "1 damaged line is left out, the first is line 2, " in found.problems[0]


def test_two_torn_lines_do_not_make_a_row(log):
    found = log(lines({"step": 1}) + b'{"step": 2\n"a": 3.0}\n{"step": 4}, {"step": 5}\n')
    assert (found.rows, found.damaged) == (1, 3)


def test_a_torn_last_line_is_told_and_a_whole_one_without_its_line_break_counts(log):
    assert "the last line is torn" in log(lines({"step": 1}) + b'{"step": 2, "ti').problems[0]
    assert log(lines({"step": 1}) + b'{"step": 2, "a": 1.0}').rows == 2
    assert log(b"").rows == 0


def test_a_file_of_which_no_line_is_a_row_is_no_log(log):
    assert "is no log: line 1 is no row, 'epoch 1: fine'" in log(b"epoch 1: fine\n").problems[0]


def test_rows_that_were_written_again_count_once_and_the_last_is_right(log):
    said = [{"step": step, "time": 0.0, "epoch": 0, "a": 1.0} for step in (1, 2, 3)]
    again = [row | {"time": 9.0, "a": 2.0} for row in said[1:]]
    found = log(lines(*said, *again, {"step": 3, "epoch": 0, "b": 1.0}, {"step": 3, "epoch": 1, "a": 7.0}))
    assert (found.rows, found.repeated) == (5, 2)
    assert found.curves["a"].steps.tolist() == [1, 2, 3, 3]
    assert found.curves["a"].values.tolist() == [1.0, 2.0, 2.0, 7.0]


def test_rows_of_other_forms_are_one_curve_in_the_order_of_the_steps(log):
    said = [
        {"step": 3, "a": 3.0},
        {"step": 1, "a": 1.0, "b": 0.0},
        {"step": 2, "a": 2.0},
        {"step": 4, "b": 0.0, "a": 4.0},
    ]
    found = log(lines(*said))
    assert found.curves["a"].steps.tolist() == found.curves["a"].values.tolist() == [1, 2, 3, 4]
    assert found.last == {"step": 4}


def test_what_is_not_finite_is_read_as_it_is_spelled(log):
    spelled = ["NaN", "Infinity", "-Infinity", 1.0]
    values = log(lines(*({"step": step, "a": value} for step, value in enumerate(spelled)))).curves["a"].values
    assert math.isnan(values[0])
    assert values.tolist()[1:] == [math.inf, -math.inf, 1.0]


@pytest.mark.parametrize("where", [0, 137, 999])
def test_of_a_stretch_the_lowest_the_highest_and_what_is_not_finite_are_left(where):
    values = [math.sin(step / 50) for step in range(1000)]
    high, low = values.index(max(values)), values.index(min(values))
    values[where] = math.nan
    kept = extremes(values, 42)
    assert len(kept) <= 42
    assert where in kept
    assert {high, low} - {where} <= {*kept}


def test_a_thinned_curve_begins_and_ends_as_all_of_it():
    values = [(step * 7919) % 1000 for step in range(1000)]
    thin = Curve([*range(1000)], values).thinned(50)
    assert (thin.steps[0], thin.steps[-1], max(thin.values), min(thin.values)) == (0, 999, 999, 0)
    assert len(thin.steps) <= 50


def test_means_and_the_best_of_what_is_finite():
    curve = Curve([0, 1, 2, 3, 4, 5], [math.nan, 1.0, 3.0, math.inf, math.nan, math.nan])
    assert [each.mean for each in curve.stretches(3)][:2] == [1.0, 3.0]
    assert (curve.best("min"), curve.best("max")) == (1, 2)
    assert Curve([0], [math.nan]).best("min") is None
    assert Curve([], []).stretches(3) == []
