"""The commands, of runs at an address."""

import re
import tempfile

import pytest
from s3 import objects
from safetensors.numpy import load_file
from trees import says

import functrain as ft
from cli.digits import trained
from functrain.loop.remote.store import Store


@pytest.fixture
def sent(made, s3):
    """The run, at an address, and what is there."""
    store = Store(s3)
    for path in (made / "digits").rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            store.put(str(path.relative_to(made / "digits")), path)
    return s3


def alike(address, folder, one, other):
    """Whether two answers are the same but for where it is."""
    return one.replace(str(address), "RUN") == other.replace(str(folder), "RUN")


@pytest.mark.parametrize("command", ["show", "checkpoints", "verify"])
def test_a_command_says_of_an_address_what_it_says_of_the_folder(made, sent, told, command, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, before = made / "digits", Store(sent).listed()
    (code, out, err), (its_code, its_out, its_err) = told(command, sent), told(command, folder)
    assert (code, err) == (its_code, its_err) == (0, "")
    assert alike(sent, folder, out, its_out)
    assert alike(sent, folder, told(command, sent, "--json")[1], told(command, folder, "--json")[1])
    assert Store(sent).listed() == before
    assert not [*tmp_path.glob("functrain-*")]


def test_checkpoints_in_the_folder_of_a_run_at_an_address(made, s3, told):
    for path in (made / "digits").rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            Store(s3).put(f"checkpoints/{path.relative_to(made / 'digits')}", path)
    assert told("verify", s3) == (0, "all sound: 12, 16\n", "")
    assert told("diff", f"{s3}/checkpoints/16", s3)[0] == 0


def test_damage_is_named_and_nothing_is_changed(sent, told):
    store = Store(sent)
    store.delete(["16/state/_METADATA"])
    store.put("16/facts/metadata", store.get("16/facts/metadata").replace(b"a", b"b", 1))
    before = {name: store.get(name) for name in objects(store)}
    code, out, err = told("verify", sent)
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "16: damaged", "  'facts/metadata' is not what was written", "  'state/_METADATA' is missing", "sound: 12",
    ]  # fmt: skip
    assert told("checkpoints", sent)[0] == 0
    assert {name: store.get(name) for name in objects(store)} == before


def test_diff_and_export_read_what_is_asked_for(made, sent, told, data, tmp_path):
    assert told("diff", f"{sent}/16", made / "digits" / "16")[0] == 0
    answer = data("diff", f"{sent}/12", sent)
    assert (answer["a"], answer["b"], answer["equal"]) == (f"{sent}/12", f"{sent}/16", False)
    for place, out in ((sent, "remote"), (made / "digits", "local")):
        assert told("export", place, tmp_path / out, "--part", "body")[0] == 0
    one, other = (load_file(tmp_path / out) for out in ("remote", "local"))
    assert {name: leaf.tolist() for name, leaf in one.items()} == {name: leaf.tolist() for name, leaf in other.items()}


@pytest.mark.parametrize(
    ("address", "phrases"),
    [
        ("s3://nowhere/digits", ["there is no bucket 'nowhere'"]),
        ("s4://bucket/digits", ["did you mean 's3'?"]),
        ("{s3}-nothing", ["there is neither a checkpoint nor a log in", "-nothing"]),
    ],
)
def test_what_can_t_be_read_is_trouble(s3, told, address, phrases):
    code, out, err = told("show", address.format(s3=s3))
    assert (code, out) == (2, "")
    assert re.search(says(*phrases), err)


def test_a_record_at_an_address_is_shown_and_reported_here(s3, told, data, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(f"{s3}/checkpoints", seed=0, epochs=2, record=ft.Record(s3, config={"width": 7}, source=None))
    store = Store(s3)
    assert "run.json" in store.listed()
    before = {name: store.get(name) for name in objects(store)}
    code, out, err = told("show", s3)
    assert (code, err) == (0, "")
    assert re.search(says("step 8, epoch 2", "checkpoints", "4, 8"), out)
    assert data("show", s3)["record"]["config"] == {"width": 7}
    assert data("show", s3)["run"] == f"{s3}/checkpoints"
    assert data("show", s3)["problems"] == []
    monkeypatch.chdir(tmp_path)
    assert told("report", s3)[0] == 0
    assert (tmp_path / "digits" / "report.html").exists()
    assert {name: store.get(name) for name in objects(store)} == before


def test_what_a_run_sent_is_shown_with_its_log(s3, told, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trained(s3, seed=0, epochs=2)
    code, out, _ = told("show", s3)
    assert code == 0
    assert "step 8, epoch 2" in out
    assert "train/loss" in out
    assert told("verify", s3)[0] == 0
