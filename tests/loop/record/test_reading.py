"""run.json and results.json, whatever is in them."""

import copy
import json
import math
import subprocess
import sys

import pytest
from loop.record.written import PART, RESULTS, RUN, write

from functrain.loop.record.reading import NOTHING, file_within, read_results, read_run


def read(directory):
    problems = []
    return read_run(directory, problems), read_results(directory, problems), problems


def test_what_a_record_says_is_read_as_it_was_written(tmp_path):
    run, results, problems = read(write(tmp_path))
    assert problems == []
    assert (run.name, run.config, run.command) == ("digits", RUN["config"], ("train.py", "--epochs", "10"))
    assert (run.versions, run.device, run.git, run.source) == tuple(
        RUN[name] for name in ("versions", "device", "git", "source")
    )
    assert run.parts["body"]._asdict() == PART
    assert (run.parameters, run.optimizers, run.audit) == (RUN["model"]["parameters"], "part  optimizer", "part  loss")
    assert (run.checkpoints, run.keep_best) == ("checkpoints", {"valid/accuracy": "max"})
    first, last = run.sections
    assert (first.how, first.why, first.checkpoint, first.to_step) == ("stopped", "SIGTERM", None, 8)
    assert (first.warnings, first.memory) == ((("the batch is small", 2),), {"host": 3 << 20})
    assert last.changed == {"config/rates/body": (0.01, 0.001), "config/new": (None, 1)}
    assert [final.of for final in results] == ["best valid/accuracy", "last"]
    assert math.isnan(results[0].numbers["test/loss"])
    assert results[1].figures == {"test/confusion": "results/last.png"}


def test_what_is_null_is_no_problem(tmp_path):
    run = RUN | {"git": None, "source": None, "model": None, "checkpoints": None, "config": {}}
    open_section = dict.fromkeys(RUN["sections"][0])
    found, _, problems = read(write(tmp_path, run | {"sections": [open_section]}))
    assert problems == []
    assert (found.git, found.parts, found.checkpoints, found.sections[0].how) == ({}, {}, None, None)


def test_a_missing_file_is_no_problem_and_says_nothing(tmp_path):
    assert read(tmp_path) == (None, (), [])


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('{"format": 1, "name": "dig', "run.json can't be read: "),
        ("", "run.json can't be read: "),
        ("[1, 2]", "run.json is no record"),
        ("\xff", "run.json can't be read: "),
        ('{"format": 1, "config": ' + '{"a": ' * 40 + "1" + "}" * 41, "run.json is nested deeper than 30"),
        ('{"format": 1, "config": ' + "[" * 100_000, "run.json can't be read: "),
    ],
    ids=["torn", "empty", "foreign", "binary", "nested", "deep"],
)
def test_a_file_that_can_not_be_read_is_told_and_the_other_is_shown(tmp_path, written, says):
    (write(tmp_path) / "run.json").write_bytes(written.encode("latin-1"))
    run, results, problems = read(tmp_path)
    assert (run, len(results), len(problems)) == (None, 2, 1)
    assert problems[0].startswith(says)
    assert problems[0].endswith("; it is left out")


def test_of_a_newer_format_what_is_known_is_shown_and_it_is_told(tmp_path):
    run, _, problems = read(write(tmp_path, RUN | {"format": 2, "sections": "elsewhere"}))
    assert run.name == "digits"
    assert problems[0] == (
        "run.json is of format 2, and this functrain reads 1: what it knows of it is shown; a newer functrain shows all"
    )
    assert problems[1:] == ["run.json: 'sections' is no list: 'elsewhere'; it is left out"]


FOREIGN = [7, -1.5, "x", True, [], [1], {}, {"a": 1}, "NaN", 10**400]


def places(value, path=()):
    """Every field of JSON, by the keys to it."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda value: repr(value)[:8])
def test_what_is_of_another_kind_is_left_out_wherever_it_is(tmp_path, foreign):
    """Every field of both files, one after the other."""
    for which, said in enumerate((RUN, RESULTS)):
        for path in places(said):
            harmed = copy.deepcopy(said)
            at = harmed
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = foreign
            run, results, problems = read(write(tmp_path, **{("run", "results")[which]: harmed}))
            assert run is not None
            assert all(isinstance(problem, str) for problem in problems)
            assert len(run.sections) >= 1 or path[0] == "sections"
            assert len(results) >= 1 or path[0] == "final"


def test_of_much_that_is_foreign_a_few_are_told(tmp_path):
    numbers = {f"test/{index}": "low" for index in range(50_000)}
    _, _, problems = read(write(tmp_path, results={"format": 1, "final": [RESULTS["final"][0] | {"numbers": numbers}]}))
    assert len(problems) == 21
    assert "'test/0' is no number: 'low'" in problems[0]
    assert problems[-1] == "... and more that is left out"


def test_nothing_is_what_an_empty_record_says(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 1}))
    assert read(tmp_path)[0] == NOTHING


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link", "results", "", "a\0b", "missing", "~/x"])
def test_a_file_that_a_record_names_is_one_within_its_folder(tmp_path, name):
    record = tmp_path / "record"
    (record / "results").mkdir(parents=True)
    (record / "results" / "own").write_text("own")
    (tmp_path / "secret").write_text("secret")
    (record / "link").symlink_to(tmp_path / "secret")
    assert file_within(record, name) is None
    assert file_within(record, "results/own").read_text() == "own"


def test_reading_imports_no_jax_and_no_numpy():
    program = (
        "import sys, functrain.loop.record.left;"
        " assert not {'jax', 'numpy', 'matplotlib', 'orbax'} & {*sys.modules}, sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
