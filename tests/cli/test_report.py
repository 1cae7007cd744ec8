"""`functrain report`."""

import shutil
import sys

import pytest
from loop.record.written import RUN, write


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record, and where the command is given."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "runs" / "digits")


def test_the_report_is_written_into_the_run_and_where_is_said(record, told):
    assert told("report", record) == (0, "runs/digits/report.html\nruns/digits/report.md\n",
                                      "functrain report: there is no checkpoint\n")  # fmt: skip
    assert "digits" in (record / "report.html").read_text()
    assert (record / "report.md").read_text().startswith("## digits")


def test_it_is_written_anew_and_elsewhere_if_asked(record, told, data):
    assert told("report", record)[0] == told("report", record)[0] == 0
    shutil.rmtree(record.parent / "out", ignore_errors=True)
    found = data("report", record, "--out", record.parent / "out" / "deep")
    assert found == {
        "run": str(record),
        "html": str(record.parent / "out" / "deep" / "report.html"),
        "markdown": str(record.parent / "out" / "deep" / "report.md"),
        "problems": ["there is no checkpoint"],
    }
    assert (record.parent / "out" / "deep" / "report.html").exists()


def test_of_several_runs_it_says_what_differs(record, told, data):
    other = write(record.parent / "other", RUN | {"name": "other", "config": {"width": 64, "rates": {"body": 0.01}}})
    code, out, _ = told("report", record, other)
    assert code == 0
    assert out.splitlines() == [
        "configuration      digits  other",
        "config/rates/body  0.001   0.01",
        "",
        "nothing that is known differs in the results",
        "",
        "comparison/report.html",
        "comparison/report.md",
    ]
    found = data("report", record, other, "--out", record.parent / "both")
    assert found["configuration"] == {"config/rates/body": [0.001, 0.01]}
    assert found["runs"] == {"digits": str(record), "other": str(other)}
    assert (record.parent / "both" / "report.html").exists()


def test_a_run_that_left_checkpoints_and_a_log_has_a_report_too(run, told):
    code, out, err = told("report", run)
    assert (code, out.splitlines()[0]) == (0, str(run / "report.html"))
    assert "there is no run.json that says what it was made with" in err
    page = (run / "report.html").read_text()
    for piece in ("body by adamw, head by sgd", "valid/loss", "learning rate", "best valid/loss"):
        assert piece in page, piece
    assert told("verify", run)[0] == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "there is no folder {}: give that of a run, or of its checkpoints"),
        ("empty", "there is neither a checkpoint nor a log in {}: give the folder of a run"),
    ],
)
def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, told, name, says):
    (tmp_path / "empty").mkdir()
    path = tmp_path / name
    assert told("report", path) == (2, "", f"functrain report: {says.format(path)}\n")


def test_a_folder_that_can_not_be_written_is_one_line_and_exit_code_2(record, told):
    (record.parent / "file").write_text("")
    code, out, err = told("report", record, "--out", record.parent / "file")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_without_matplotlib_it_says_what_to_install(record, told, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = told("report", record)
    assert (code, out) == (2, "")
    assert err.endswith("; write pip install 'functrain[record]'\n")
