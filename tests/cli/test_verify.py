"""`functrain verify`."""

import json
import shutil

import pytest

from cli.digits import flip


def test_all_sound(run, told, data):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert told("verify", run) == (0, "all sound: 12, 16\n", "")
    assert data("verify", run)["sound"] is True
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_every_damaged_file_is_named_and_it_fails(run, told, data):
    flip(run / "16" / "facts" / "metadata")
    (run / "16" / "state" / "_METADATA").unlink()
    flip(run / "12.manifest.json")
    code, out, err = told("verify", run)
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "12: damaged",
        "  '12.manifest.json' is not what was written",
        "16: damaged",
        "  'facts/metadata' is not what was written",
        "  'state/_METADATA' is missing",
    ]
    assert [(each["name"], each["state"]) for each in data("verify", run)["checkpoints"]] == [
        ("12", "damaged"),
        ("16", "damaged"),
    ]
    assert {path.name for path in run.iterdir()} >= {"12", "16"}, "it set something aside"


def test_a_folder_that_is_gone_and_one_without_checksums_are_not_sound(run, told):
    shutil.rmtree(run / "16")
    (run / "12.manifest.json").unlink()
    code, out, _ = told("verify", run)
    assert code == 1
    assert out == "12: unverified\n  it has no manifest of checksums\n16: damaged\n  its folder is missing\n"


def test_what_was_set_aside_before_is_named_and_is_no_new_damage(run, told):
    (run / "16").rename(run / "16.corrupt")
    (run / "16.manifest.json").rename(run / "16.corrupt.manifest.json")
    assert told("verify", run)[:2] == (0, "all sound: 12\nset aside as damaged before: '16.corrupt'\n")


def test_checkpoints_within_the_folder_of_a_run(run, told):
    (run.parent / "record").mkdir()
    run.rename(run.parent / "record" / "checkpoints")
    assert told("verify", run.parent / "record") == (0, "all sound: 12, 16\n", "")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "there is no folder {}: give that of a run, or of its checkpoints"),
        ("empty", "there is no checkpoint in {}: give the folder of a run, or of its checkpoints"),
        ("digits/16", "{} is a checkpoint itself: give its folder, {parent}"),
        ("digits/log.jsonl", "{} is a file: give a folder, such as "),
    ],
)
def test_what_is_no_folder_of_checkpoints_is_one_line_and_exit_code_2(run, told, place, says):
    (run.parent / "empty").mkdir()
    path = run.parent / place
    code, out, err = told("verify", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("functrain verify: " + says.format(path, parent=path.parent))


def test_json_is_one_document(run, told):
    code, out, err = told("verify", run, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "directory": str(run),
        "sound": True,
        "checkpoints": [{"name": name, "state": "sound", "problems": []} for name in ("12", "16")],
        "set_aside": [],
    }
