"""What a record keeps of the source, and what is never in it."""

import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
from records import committed, fitted, read, record_of, saved, unpacked
from runs import Recorder

from functrain.errors import RecordError
from functrain.loop.record.masking import Masks

ROOT = Path(__file__).parents[2]


# The source.


def test_the_source_is_what_git_knows_and_the_patch_since(tmp_path):
    code, runs = tmp_path / "code", tmp_path / "runs"
    committed(code, {"src/train.py": "rate = 1\n", "src/old.py": "gone\n", "README": "elsewhere\n"})
    (code / "src/train.py").write_text("rate = 2\n")
    (code / "src/old.py").unlink()
    (code / "src/new.py").write_text("new = 1\n")
    with pytest.warns(UserWarning, match=r"the record has no 'new\.py' of src, which git does not know: git add it"):
        fitted(runs, record_of(runs, source=code / "src"), 1, checkpoints=saved(runs))
    kept = unpacked(runs / "source.tar.gz")
    assert kept["source/train.py"] == "rate = 2\n"
    assert kept.keys() == {"source/train.py", "uncommitted.patch"}
    assert {"-rate = 1", "+rate = 2", "-gone"} <= {*kept["uncommitted.patch"].splitlines()}
    run = read(runs)
    assert (run["git"]["dirty"], run["source"]["files"]) == (True, 1)
    assert run["git"]["commit"] == subprocess.check_output(["git", "-C", code, "rev-parse", "HEAD"], text=True).strip()
    (code / "src/new.py").unlink()
    fitted(runs, record_of(runs, source=code / "src"), 2, checkpoints=saved(runs))
    assert [path.name for path in runs.glob("source*")] == ["source.tar.gz"]
    (code / "src/train.py").write_text("rate = 3\n")
    fitted(runs, record_of(runs, source=code / "src"), 3, checkpoints=saved(runs))
    assert unpacked(runs / "source-3.tar.gz")["source/train.py"] == "rate = 3\n"
    assert [*read(runs)["sections"][2]["changed"]] == ["source/digest"]


def test_a_source_that_git_knows_nothing_of_says_so_before_the_first_update(tmp_path):
    recorder = Recorder()
    for source, said in ((tmp_path / "nowhere", "there is no such folder"), (tmp_path, "git knows nothing of it")):
        with pytest.raises(RecordError, match=said):
            fitted(tmp_path / "run", record_of(tmp_path / "run", source=source), hooks=[recorder])
    assert not recorder.at("update_ended")


# What is never in it.

SECRETS = {
    "environment": "swordfish-of-the-environment",
    "variable": "an-everyday-variable-that-is-not-secret",
    "hub": "hf_" + "a1B2" * 8,
    "option": "opensesame",
    "equals": "abracadabra",
    "config": "joshua-1983",
    "git": "ghp_" + "x9" * 18,
    "literal": "correcthorsebattery",
    "patch": "sk-" + "Q7" * 14,
    "dotenv": "rosebud-rosebud",
    "bearer": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "error": "AKIA" + "ABCDEFGH12345678",
    "url": "trustno1",
}


def test_no_secret_variable_token_or_home_is_in_a_record(tmp_path):
    home = tmp_path / "home" / "ada-lovelace"
    code, runs = home / "code", tmp_path / "runs"
    committed(code, {
        "train.py": f'API_KEY = "{SECRETS["literal"]}"\npath = "{home}/data"\n# {SECRETS["environment"]}\n',
        ".env": f"PASSWORD={SECRETS['dotenv']}\n",
    })  # fmt: skip
    (code / "train.py").write_text((code / "train.py").read_text() + f"token = '{SECRETS['patch']}' # {home}\n")
    program = f"""
        import sys, warnings
        sys.path.insert(0, "tests/loop")
        import functrain as ft
        from runs import data_of, start, update_of

        class Failing(ft.Hook):
            def epoch_ended(self, run):
                warnings.warn("see {home}/warned with {SECRETS["hub"]}")
                raise RuntimeError("no {SECRETS["error"]} at https://ada:{SECRETS["url"]}@host of {home}/failed")

        config = {{"data": "{home}/data", "auth_token": "{SECRETS["config"]}", "hub": "{SECRETS["hub"]}",
                  "nested": [{{"authorization": "{SECRETS["bearer"]}"}}], "remote": "https://{SECRETS["git"]}@github"}}
        record = ft.Record("{runs}", config=config, source="{code}")
        update = update_of()
        ft.fit(update, update.init(start()), data_of(), epochs=1, record=record, hooks=[Failing()])
    """
    options = ["--password", SECRETS["option"], f"--api-key={SECRETS['equals']}", f"--data={home}/data"]
    environment = {
        **os.environ,
        "HOME": str(home),
        "MY_SECRET_TOKEN": SECRETS["environment"],
        "PLAIN": SECRETS["variable"],
    }
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *options],
        env=environment, cwd=ROOT, text=True, check=False, capture_output=True,
    )  # fmt: skip
    assert "RuntimeError" in ended.stderr, ended.stderr
    assert {"run.json", "log.jsonl", "source.tar.gz"} <= {path.name for path in runs.iterdir()}
    found = {str(path): path.read_bytes().decode(errors="replace") for path in runs.rglob("*") if path.is_file()}
    found |= unpacked(runs / "source.tar.gz")
    assert found["source/train.py"].splitlines()[0] == 'API_KEY = "***"'
    for name, text in found.items():
        assert "ada-lovelace" not in text, name
        for kind, secret in SECRETS.items():
            assert secret not in text, (name, kind)
    run = read(runs)
    assert run["config"]["data"] == "~/data"
    assert run["command"][-4:] == ["--password", "***", "--api-key=***", "--data=~/data"]
    assert run["source"]["left_out"] == {".env": "may hold secrets"}
    assert {"text": "see ~/warned with ***", "count": 1} in run["sections"][0]["warnings"]


@pytest.mark.parametrize(
    "text",
    [
        "GET https://host/data.tar?token=swordfish9 failed",
        "https://host/data.tar?sv=1&sig=swordfish9%3D",
        "https://bucket/data?X-Amz-Credential=swordfish9&x=1",
        "{'Authorization': 'Basic swordfish9swordfish9'}",
        "curl -H 'Authorization: Bearer swordfish9swordfish9'",
        "Settings(user='ada', password='swordfish9')",
        'os.environ["OPENAI_API_KEY"] = "swordfish9"',
        'api_key: str = "swordfish9"',
        "password = b'swordfish9'",
    ],
)
def test_what_a_text_gives_to_a_secrets_name_is_masked(text):
    masks = Masks({}, home="")
    assert "***" in masks.text(text)
    assert "swordfish" not in masks.text(text) + masks.program(text)


@pytest.mark.parametrize(
    "text",
    [
        "token = tokenizer.encode(text)",
        'f"{host}?token={token}"',
        "basic understanding of a bearer",
        "d['token'] == 'x'",
    ],
)
def test_what_is_only_about_secrets_stays(text):
    assert Masks({}, home="").program(text) == text


@pytest.mark.parametrize("name", ["DB_PASS", "STRIPE_KEY", "MY_SECRET_2", "NETRC_AUTH"])
def test_what_a_secret_variable_holds_is_masked_and_what_another_does_is_not(name):
    masks = Masks({name: "swordfish", "PWD": "/work/digits", "KEYBOARD": "dvorak-us", "PYTHONPASSES": "eleven"}, "")
    assert masks.text("swordfish of /work/digits, dvorak-us eleven") == "*** of /work/digits, dvorak-us eleven"


def test_what_is_below_a_secrets_name_is_masked_and_the_words_of_a_vocabulary_are_not():
    masks = Masks({}, home="")
    given = {
        "secrets": {"db": "a", "more": [{"x": "b"}]},
        "pad_token": "<pad>",
        "special_tokens": ["<s>"],
        "none": None,
    }
    assert masks.values(given) == given | {"secrets": {"db": "***", "more": [{"x": "***"}]}}
    assert masks.command(["--password", "--rate=0.1"]) == ["--password", "--rate=0.1"]
    assert masks.command(["+db.password=1234", "token=5678", "rate=0.1"]) == [
        "+db.password=***",
        "token=***",
        "rate=0.1",
    ]


def test_a_variable_that_is_set_after_another_record_is_masked_too(tmp_path, monkeypatch):
    record_of(tmp_path)
    monkeypatch.setenv("HUB_TOKEN", "swordfish")
    assert record_of(tmp_path, config={"text": "a swordfish"}).config == {"text": "a ***"}


def test_secrets_in_files_that_are_no_utf8_or_were_removed_are_in_no_source(tmp_path):
    code, runs = tmp_path / "code", tmp_path / "runs"
    committed(
        code, {"src/train.py": "rate = 1\n", "src/.env": "A=rosebud\n", "src/deep/Key.PEM": "rosebud", "src/id": "1"}
    )
    (code / "src/train.py").write_bytes(b"# caf\xe9\npassword = 'swordfish'\n")
    (code / "src/.env").unlink()
    subprocess.run(["git", "-C", code, "rm", "-q", "src/deep/Key.PEM"], check=True)
    fitted(runs, record_of(runs, source=code / "src"), 1)
    with tarfile.open(runs / "source.tar.gz") as archive:
        kept = {each.name: archive.extractfile(each).read() for each in archive}
    assert kept["source/train.py"] == b"# caf\xe9\npassword = '***'\n"
    assert b"+password = '***'" in kept["uncommitted.patch"]
    assert not any(secret in content for content in kept.values() for secret in (b"swordfish", b"rosebud"))
    assert read(runs)["source"]["left_out"] == {".env": "may hold secrets"}
    assert read(runs)["source"]["masked"] == ["train.py"]


def test_the_home_folders_of_others_are_none_either_but_in_source_they_are_examples():
    masks, text = Masks({}, home="/root"), "/root/a /home/ada/b /Users/grace/c C:\\Users\\eve\\d /rooted/home/"
    assert masks.text(text) == "~/a ~/b ~/c ~\\d /rooted/home/"
    assert masks.program(text) == text.replace("/root/a", "~/a")


def test_short_values_of_secret_variables_are_words():
    assert Masks({"MY_TOKEN": "adam"}, home="").text("adam") == "adam"
