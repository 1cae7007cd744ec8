"""`functrain checkpoints`."""

import json
import re

import pytest

from cli.digits import flip
from functrain.loop.checkpoint.contents import FORMAT, contents_file


def table(out):
    return [re.split(r"  +", line) for line in out.splitlines()]


def rewritten(checkpoint, **changes):
    """Contents of one's own, in a checkpoint without checksums."""
    file = contents_file(checkpoint)
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))
    checkpoint.with_name(f"{checkpoint.name}.manifest.json").unlink()


def test_a_line_for_each_with_its_bytes_by_part_its_results_and_whether_it_is_sound(run, told, data):
    code, out, err = told("checkpoints", run)
    assert (code, err) == (0, "")
    head, first, second = table(out)
    assert head == ["checkpoint", "epoch", "saved (UTC)", "body", "head", "the rest", "valid/loss"]
    # AdamW: 12 floats and two moments of them, a count, a rate and the steps of it; SGD: 4 half floats, one, two rates.
    assert [first[i] for i in (0, 1, 3, 4)] == ["12", "3", "156 B", "20 B"]
    assert [second[i] for i in (0, 1, 7)] == ["16", "4", "sound"]
    row = data("checkpoints", run)["checkpoints"][1]
    assert (row["name"], row["step"], row["epoch"], row["state"]) == ("16", 16, 4, "sound")
    assert (row["bytes"]["body"], row["problems"]) == (156, [])
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert row["results"] == {"valid/loss": logged[-1]["valid/loss"]}
    assert abs(row["time"] - logged[-1]["time"]) < 3600


def test_one_that_is_damaged_is_listed_with_what_is_wrong(run, told, data):
    flip(run / "16" / "facts" / "metadata")
    _, out, _ = told("checkpoints", run)
    assert table(out)[2][-1] == "damaged"
    assert out.endswith("16: 'facts/metadata' is not what was written\n")
    assert [row["state"] for row in data("checkpoints", run)["checkpoints"]] == ["sound", "damaged"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"format": FORMAT + 1, "versions": {"functrain": "9.0"}},
            f"functrain 9.0 in format {FORMAT + 1}",
        ),
        ({"beside": 3}, "holds can't be read"),
        ({"configuration": {"parts": 3}}, "holds can't be read"),
        ({"leaves": {"params/w": 3}}, "holds can't be read"),
    ],
)
def test_one_of_a_newer_format_or_of_contents_that_make_no_sense_hides_no_other(run, told, changes, says):
    rewritten(run / "16", **changes)
    code, out, _ = told("checkpoints", run)
    assert code == 0
    assert [table(out)[1][i] for i in (0, 3, -1)] == ["12", "156 B", "sound"]
    assert table(out)[2][-1] == "unverified"
    assert says in out


def test_a_folder_in_which_all_was_set_aside(run, told):
    for name in ("12", "16"):
        (run / name).rename(run / f"{name}.corrupt")
        (run / f"{name}.manifest.json").rename(run / f"{name}.corrupt.manifest.json")
    code, out, _ = told("checkpoints", run)
    assert (code, out.splitlines()[0]) == (0, "there is no checkpoint but what was set aside")
    assert "'12.corrupt', '16.corrupt'" in out
