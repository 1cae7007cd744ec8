"""Several runs beside each other."""

import copy

import pytest
from loop.record.pages import Page
from loop.record.test_report import EVIL, attacked  # noqa: F401
from loop.record.written import RESULTS, RUN, rows, write

from functrain.errors import CheckpointError
from functrain.loop.record.report import compare


def run_with(config=None, **changes):
    return copy.deepcopy(RUN) | {"config": RUN["config"] | (config or {})} | changes


@pytest.fixture
def two(tmp_path):
    """Two runs, of which one had another rate, and other results."""
    results = copy.deepcopy(RESULTS)
    results["final"][1]["numbers"]["test/accuracy"] = 0.5
    log = [{name: value + (name == "valid/loss") for name, value in row.items()} for row in rows()]
    write(tmp_path / "a")
    write(tmp_path / "b", run_with({"rates": {"body": 0.01}, "clip": 1.0}, name="other"), results, log)
    return tmp_path / "a", tmp_path / "b"


def test_only_what_differs_is_named_in_the_configuration_and_in_the_results(two, tmp_path):
    _, found = compare(two, tmp_path / "out")
    assert found.names == ["digits", "other"]
    assert found.configuration == {"config/rates/body": [0.001, 0.01], "config/clip": [None, 1.0]}
    assert found.results == {
        "test/accuracy, last": [0.9625, 0.5],
        "valid/loss, best of the log": [0.1875, 1.1875],
        "valid/loss, last of the log": [0.1875, 1.1875],
    }
    assert found.same > 20


def test_a_rate_that_only_the_optimizer_knows_is_named(tmp_path):
    other = copy.deepcopy(RUN)
    other["model"]["parts"]["body"] |= {"hyperparameters": {"learning_rate": 0.5}}
    runs = [write(tmp_path / "a"), write(tmp_path / "b", other)]
    found = compare(runs, tmp_path / "out")[1]
    assert found.configuration == {"parts/body/hyperparameters/learning_rate": [0.001, 0.5]}


def test_versions_that_seldom_matter_are_folded_and_the_configuration_stands_first(tmp_path):
    other = run_with({"new": 1}, versions=RUN["versions"] | {"six": "2", "functrain": "0.3.0"}, device={"cores": 4})
    written, found = compare([write(tmp_path / "a"), write(tmp_path / "b", other)], tmp_path / "out")
    assert next(iter(found.configuration)) == "config/new"
    main, rest = found.configuration_tables
    assert [row[0] for row in main.rows][-1] == "versions/functrain"
    assert [row[0] for row in rest.rows] == ["versions/six"]
    assert "1 more a b versions/six - 2" in Page(written.html.read_text()).text


def test_the_page_has_both_tables_and_the_curves_of_both_in_each_chart(two, tmp_path):
    written, _ = compare(two, tmp_path / "out")
    page = Page(written.html.read_text())
    assert not [*page.runs_or_loads()]
    assert "config/rates/body 0.001 0.01" in page.text
    assert "test/accuracy, last 0.9625 0.5" in page.text
    assert "digits 0.1875, best 0.1875 at 16 other 1.188, best 1.188 at 16" in page.text
    named = [attributes["aria-label"] for attributes in page.of("svg") if "aria-label" in attributes]
    assert named == ["train/loss", "valid/loss", "valid/accuracy"]
    text = written.markdown.read_text()
    assert "| `config/rates/body` | 0.001 | 0.01 |" in text
    assert written.html.parent == tmp_path / "out"
    assert not (two[0] / "report.html").exists()


def test_names_that_are_alike_are_made_distinct_by_their_folders(tmp_path):
    runs = [write(tmp_path / place / "digits") for place in ("a", "b")]
    assert compare(runs, tmp_path / "out")[1].names == ["a/digits", "b/digits"]
    assert compare([runs[0], runs[0]], tmp_path / "out")[1].names[0].endswith("digits (1)")


def test_nothing_differs_between_a_run_and_itself(two, tmp_path):
    written, found = compare([two[0], two[0]], tmp_path / "out")
    assert (found.configuration, found.results) == ({}, {})
    assert "Nothing that is recorded" in written.html.read_text()


def test_a_run_without_a_record_is_compared_in_what_it_has(two, tmp_path):
    (two[1] / "run.json").unlink()
    (two[1] / "results.json").unlink()
    written, found = compare(two, tmp_path / "out")
    assert (found.configuration, found.unknown) == ({}, ["b"])
    assert found.results["valid/loss, last of the log"] == [0.1875, 1.1875]
    assert "test/accuracy, last" not in found.results
    assert "b: there is no run.json that says what it was made with" in written.problems


def test_a_number_of_which_only_one_has_a_name_differs(tmp_path):
    more = copy.deepcopy(RESULTS)
    more["final"][1]["numbers"]["test/auc"] = 0.75
    runs = [write(tmp_path / "a"), write(tmp_path / "b", results=more)]
    assert compare(runs, tmp_path / "out")[1].results == {"test/auc, last": [None, 0.75]}


def test_an_attack_is_text_beside_another_run_too(two, attacked, tmp_path):  # noqa: F811
    written, found = compare([two[0], attacked], tmp_path / "out")
    page = Page(written.html.read_text())
    assert not [*page.runs_or_loads()]
    assert "<script>ran=1</script>" in page.text
    assert EVIL in found.names[1]


def test_a_folder_that_is_no_run_is_an_error_and_nothing_is_written(two, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither a checkpoint nor a log in .*empty: give the folder of a run"):
        compare([*two, tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
