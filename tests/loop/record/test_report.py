"""The report of a run: what stands in it, and that nothing in the files can do more than be read."""

import re
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from loop.record.pages import Page
from loop.record.written import RESULTS, RUN, rows, with_a
from loop.record.written import write as record

from functrain.errors import CheckpointError
from functrain.loop.record.report import write

EVIL = "<script>ran=1</script>\"><img src=x onerror=ran=1>'`|$\\frac{x$\n[a](javascript:ran=1) \x1b[2J\ud800"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000"
    "000049454e44ae426082"
)


def page_of(directory):
    return Page(write(directory).html.read_text())


def markdown_of(directory):
    return write(directory).markdown.read_text()


def test_the_summary_comes_first_what_was_trained_how_it_ended_and_the_results_of_best_and_last(tmp_path):
    text = page_of(record(tmp_path)).text
    pieces = [
        "digits",
        "finished , at step 16, 2025-11-22 00:08:20 UTC, after 12.2 s of training",
        "1,300 parameters in 2 parts, 1,234 of them trained: body by adam, head by adam",
        "best valid/accuracy · step 12",
        "last · step 16",
        "test/accuracy 0.9750 0.9625",
        "Losses and results",
    ]
    assert sorted(pieces, key=text.find) == pieces
    assert all(piece in text for piece in pieces), text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"how": "stopped", "why": "valid/loss has not improved"}, "stopped : valid/loss has not improved"),
        ({"how": "failed", "why": "NonFiniteError: loss"}, "failed : NonFiniteError: loss"),
        ({"how": None, "ended": None, "to_step": None}, "not ended : it goes on, or was killed; started 2025-11-22"),
    ],
)
def test_how_a_run_ended(tmp_path, changes, says):
    assert says in page_of(record(tmp_path, with_a(-1, **changes))).text


def test_all_that_a_record_says_is_in_the_page(tmp_path):
    text = page_of(record(tmp_path)).text
    for piece in ("body adam(b1=0.8), learning_rate 0.001 body 4 1,234 4.8 KiB", "learning_rate 0.001 (frozen)",
                  "part optimizer", "part loss", "step 8 config/rates/body 0.01 0.001", "config/new - 1",
                  "the batch is small 4", "rates/body 0.001", "train.py --epochs 10", "version/functrain 0.2.0",
                  "git/dirty true", "source/left_out/data.bin 12 MB", "peak memory, host 3.0 MiB", "started again once",
                  "steps per second 10", "They are in checkpoints."):  # fmt: skip
        assert piece in text, piece


def test_a_chart_for_each_metric_and_each_number_of_the_parts_with_what_each_line_is(tmp_path):
    page = page_of(record(tmp_path))
    named = [attributes["aria-label"] for attributes in page.of("svg") if "aria-label" in attributes]
    assert named == ["loss", "accuracy", "learning rate", "gradient norm", "steps per second"]
    assert "train/loss 0.125" in page.text
    assert "valid/loss 0.1875, best 0.1875 at 16" in page.text
    assert "○ the best" in page.text
    assert "dashed where it was started again" in page.text


def test_nothing_in_the_page_runs_or_is_loaded_and_it_says_so_to_the_browser(tmp_path):
    page = page_of(record(tmp_path))
    assert not [*page.runs_or_loads()]
    policy = next(each["content"] for each in page.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def evil(value, is_named=False):
    """The same with every text, and every name that a program gives, as bad as a text can be."""
    if isinstance(value, str):
        return value if value in ("min", "max") else EVIL + value
    if isinstance(value, list):
        return [evil(each) for each in value]
    if not isinstance(value, dict):
        return value
    free = {"config", "versions", "device", "git", "source", "parts", "numbers", "figures", "changed", "rates"}
    free |= {"keep_best", "left_out", "memory"}
    return {EVIL + name if is_named else name: evil(each, name in free) for name, each in value.items()}


def attacking(name):
    if name in ("step", "time", "epoch"):
        return name
    return re.sub("loss|accuracy|body|head", lambda found: EVIL + found[0], name)


@pytest.fixture
def attacked(tmp_path):
    """A record in which every text is an attack."""
    log = [{attacking(name): value for name, value in row.items()} for row in rows()]
    return record(tmp_path / "<b>run", evil(RUN), evil(RESULTS), log)


def test_an_attack_in_every_field_of_every_file_is_text(attacked):
    page = page_of(attacked)
    assert not [*page.runs_or_loads()]
    assert not page.of("img")
    visible = page.text.replace("<b>run", "")
    assert visible.count("<script>ran=1</script>") > 60
    assert "\x1b" not in visible
    assert "\\x1b[2J\\ud800" in visible


def test_an_attack_in_every_field_is_code_in_markdown(attacked):
    text = markdown_of(attacked)
    assert text.count("<script>") > 20
    bare = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    bare = bare.replace("<details><summary>", "").replace("</summary>", "").replace("</details>", "")
    assert not re.search(r"[<>`\[\]$]|script|javascript", bare), bare
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5, 7), line


def test_names_that_mathtext_would_read_are_drawn(tmp_path):
    log = [{"step": step, "epoch": step, "train/$\\frac{": 1.0 + step, "train/$x^$/parts/$\\bad$/grad_norm": 1.0}
           for step in range(9)]  # fmt: skip
    text = page_of(record(tmp_path, log=log)).text
    assert "train/$\\frac{" in text
    assert "$\\bad$" in text


def test_what_is_missing_is_told_and_the_rest_is_shown(tmp_path):
    (record(tmp_path) / "log.jsonl").unlink()
    text = page_of(tmp_path).text
    assert f"there is no log in {tmp_path}" in text
    assert "test/accuracy 0.9750 0.9625" in text
    (record(tmp_path, run=None) / "run.json").unlink()
    text = page_of(tmp_path).text
    assert "there is no run.json that says what it was made with" in text
    assert "how it ended is not recorded" in text
    assert "valid/loss 0.1875" in text


@pytest.mark.parametrize("file", ["run.json", "results.json", "log.jsonl"])
@pytest.mark.parametrize("harm", ["torn", "foreign", "newer"])
def test_what_is_torn_foreign_or_newer_is_told_and_the_rest_is_shown(tmp_path, file, harm):
    path = record(tmp_path) / file
    written = path.read_text()
    newer = written.replace('"format": 1', '"format": 2') if file != "log.jsonl" else f"{written}format: 2\n"
    path.write_text({"torn": written[:-30], "foreign": "epoch 3 of 7\n", "newer": newer}[harm])
    page = page_of(tmp_path)
    told = page.text[page.text.index("What could not be read") :]
    assert {"run.json": "run.json", "results.json": "results.json", "log.jsonl": "log.jsonl"}[file] in told
    assert ("test/accuracy" in page.text) or file == "results.json"
    assert (f"- {file}" in markdown_of(tmp_path)) or file in markdown_of(tmp_path)


def test_nothing_of_a_run_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a checkpoint nor a log in .*: give the folder of a run$"):
        write(tmp_path)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"; run.json can't be read: .*: give the folder of a run$"):
        write(tmp_path)


def results_with(figures, arrays=None):
    return {"format": 1, "final": [RESULTS["final"][1] | {"figures": figures, "arrays": arrays}]}


def test_a_figure_is_in_the_page_and_one_elsewhere_or_of_another_kind_is_not(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    figures = {"good": "good.png", "out": "../secret.png", "text": "run.json", "gone": "gone.png", "link": "link.png"}
    run = record(tmp_path / "run", results=results_with(figures))
    (run / "good.png").write_bytes(PNG)
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    page = page_of(run)
    assert [each["alt"] for each in page.of("img")] == ["good, last"]
    assert page.text.count("Its file can't be shown.") == 4


def test_a_confusion_matrix_without_a_figure_is_a_table_and_an_array_that_is_none_harms_nothing(tmp_path):
    run = record(tmp_path, results=results_with({"test/has_one": "gone.png"}, "arrays.npz"))
    np.savez(run / "arrays.npz", **{"confusion": np.array([[91, 9], [8, 92]]), "<b>": np.eye(2), "has_one": np.eye(2),
                                    "a": np.ones(3), "b": np.full((2, 2), np.nan), "c": np.ones((99, 99))})  # fmt: skip
    text = page_of(run).text
    assert "test/confusion, last 0 1 0 91 9 1 8 92" in text
    assert "test/<b>, last" in text
    assert text.count("test/has_one") == 1
    pickled = np.array([{"a": 1}, None], dtype=object)
    np.savez(run / "arrays.npz", pickled)
    assert "test/confusion" not in page_of(run).text
    (run / "arrays.npz").write_bytes(b"PK\x03\x04 torn")
    assert "test/confusion" not in page_of(run).text


def test_ids_are_those_of_one_chart_each_and_all_that_are_meant_are_there(tmp_path):
    html = write(record(tmp_path)).html.read_text()
    ids = re.findall(r' id="([^"]*)"', html)
    meant = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html)
    assert len(ids) == len({*ids}) > 4
    assert {one or other for one, other in meant} == {*ids}


def test_the_same_files_are_the_same_report(tmp_path):
    run = record(tmp_path)
    first = write(run).html.read_bytes()
    assert write(run).html.read_bytes() == first


def test_what_a_program_has_set_of_matplotlib_changes_no_report_and_stays(tmp_path):
    run = record(tmp_path)
    first = write(run).html.read_bytes()
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "red", "font.size": 33.0, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert write(run).html.read_bytes() == first
        assert dict(mpl.rcParams) == before


def chart_of(tmp_path, values):
    log = [{"step": step, "train/loss": value} for step, value in enumerate(values)]
    html = write(record(tmp_path, None, None, log)).html.read_text()
    return re.search(r'<svg role="img".*?</svg>', html, re.DOTALL)[0], Page(html).text


@pytest.mark.parametrize("lost", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("count", [10, 5000])
def test_what_is_not_finite_is_marked_where_it_is(tmp_path, lost, count):
    whole, text = chart_of(tmp_path, [1.0 + step % 2 for step in range(count)])
    assert "not finite" not in text
    marked, text = chart_of(tmp_path, [1.0 + step % 2 if step != 7 else lost for step in range(count)])
    assert "\u00d7 not finite" in text
    assert marked.count("<use") == whole.count("<use") + 1


def test_one_spike_among_many_rows_is_drawn(tmp_path):
    chart, _ = chart_of(tmp_path, [1.0 + (step == 31_234) for step in range(50_000)])
    assert len(chart) < 40_000
    labels = [float(label) for label in re.findall(r">([\d.]+)</text>", chart)]
    assert 1.5 <= max(label for label in labels if label < 10) <= 2.1


@pytest.mark.parametrize(
    "values",
    [[1.0], ["NaN"], ["NaN"] * 5000, [0.0, 0.0], [-1.7e308, 1.7e308], [5e-324, 1.0], [1e-300, 1e300], [3.0] * 1000],
    ids=["one", "nan", "nans", "zeros", "widest", "smallest", "decades", "constant"],
)
def test_hard_numbers_are_drawn(tmp_path, values):
    chart_of(tmp_path, values)


@pytest.mark.parametrize("steps", [[0], [-5, 5], [2**62, 2**62 + 1], [7, 7, 7]])
def test_hard_steps_are_drawn(tmp_path, steps):
    log = [{"step": step, "epoch": epoch, "train/loss": 1.0} for epoch, step in enumerate(steps)]
    write(record(tmp_path, None, None, log))


def test_many_parts_and_many_numbers_are_folded_and_not_hidden(tmp_path):
    numbers = {f"test/report/f1/{index}": index / 50 for index in range(50)}
    log = [{"step": step, **{f"train/parts/p{part}/grad_norm": 1.0 for part in range(40)}} for step in range(3)]
    results = {"format": 1, "final": [RESULTS["final"][0] | {"numbers": {"test/loss": 0.5} | numbers}]}
    text = page_of(record(tmp_path, results=results, log=log)).text
    assert "50 more" in text
    assert "test/report/f1/49 0.98" in text
    assert "and 16 more, which are not drawn" in text


def test_phases_of_one_part_are_told_apart(tmp_path):
    log = [{"step": step, "train/a/parts/g/grad_norm": 1.0, "train/b/parts/g/grad_norm": 2.0, "train/a/loss": 1.0}
           for step in range(3)]  # fmt: skip
    text = page_of(record(tmp_path, results=None, log=log)).text
    assert "g (a) 1" in text
    assert "g (b) 2" in text
    assert "Results last at step train/a/loss 1 2 " in text


def test_the_report_for_a_pull_request_has_the_summary_the_results_the_parts_and_what_changed(tmp_path):
    text = markdown_of(record(tmp_path))
    assert text.startswith("## digits\n\nfinished, at step 16, ")
    assert "|  | `best valid/accuracy · step 12` | `last · step 16` |" in text
    assert "| `test/accuracy` | 0.9750 | 0.9625 |" in text
    assert "| body | `adam(b1=0.8), learning_rate 0.001` | body | 4 | 1,234 | 4.8 KiB |" in text
    assert "| step 8 | `config/rates/body` | 0.01 | 0.001 |" in text
    assert "<svg" not in text


def test_without_matplotlib_it_says_what_to_install(tmp_path):
    program = (
        "import sys, pathlib; sys.modules['matplotlib'] = None\n"
        "from functrain.loop.record.report import write; write(pathlib.Path(sys.argv[1]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, record(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "LogError: a report needs matplotlib: " in ended.stderr
    assert ended.stderr.endswith("; write pip install 'functrain[record]'\n")
    assert not (tmp_path / "report.html").exists()


def test_a_report_imports_no_jax_and_no_pyplot(tmp_path):
    program = (
        "import sys, pathlib; from functrain.loop.record.report import write; write(pathlib.Path(sys.argv[1]));"
        " assert not {'jax', 'matplotlib.pyplot', 'orbax'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program, record(tmp_path)], check=True)
