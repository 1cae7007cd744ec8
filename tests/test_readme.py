"""The Python of README and of the pages in docs/ runs as it is written, and prints what they say."""

import code
import contextlib
import io
import pathlib
import re

import jax.numpy as jnp
import pytest

import functrain as ft

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MOST_WORDS = 1200  # What one reads before one tries a thing.


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """The blocks of a page in order, `(language, text)`."""
    return BLOCKS.findall(page.read_text())


def run(text, page, names):
    """Executes a block and returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(text, name(page), "exec"), names)
    return output.getvalue()


def without_shares(output):
    """But for what XLA counts differently from one version to the next: shares of FLOPs, temporaries."""
    return re.sub(r"\d+%|[\d.]+ \w+, on this platform", "", output)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_python_block_runs_in_order_and_prints_what_the_page_says(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "page"}, None
    for language, text in blocks(page):
        if language == "text":
            assert printed is not None, "a block of text is what the Python before it prints"
            assert without_shares(printed) == without_shares(text)
            printed = None
        elif language == "python":
            printed = run(text, page, names)
            if page.name == "models.md":
                assert jnp.isfinite(names["loss"].value)
            if "ft.fit(" in text and "evaluation=" in text:
                assert names["result"].results["valid/loss"] < 0.1
        else:
            assert language == "console"


def test_every_page_but_the_costs_has_python_to_run_and_models_has_five_kinds():
    python = {name(page): [text for language, text in blocks(page) if language == "python"] for page in PAGES}
    assert sum("make_train_step(" in text for text in python["docs/models.md"]) == 5
    assert all(python[page] for page in python if page != "benchmarks/README.md")


def test_the_first_program_runs_where_it_is_pasted_into_a_python_prompt(capsys):
    """Line by line, as a prompt reads it: an empty line ends a block, and nothing else does."""
    (_, program), (_, printed) = [block for block in blocks(README) if block[0] in ("python", "text")][:2]
    assert sum(bool(line.strip()) for line in program.splitlines()) <= 15
    assert not re.search(r"flax|equinox|haiku", program)
    prompt = code.InteractiveConsole({"__name__": "__console__"})
    capsys.readouterr()
    for line in [*program.splitlines(), ""]:
        prompt.push(line)
    seen = capsys.readouterr()
    assert seen.err == ""
    assert seen.out == printed


def test_the_first_page_can_be_read_in_five_minutes():
    assert len(README.read_text().split()) <= MOST_WORDS


def test_the_error_that_the_readme_quotes_is_the_one_that_is_raised():
    params = {"conv1": {"w": 1.0, "b": 1.0}, "conv2": {"w": 1.0, "b": 1.0}}
    with pytest.raises(ft.PartitionError) as raised:
        ft.partition(params, {"conv1": "conv_1", "rest": ...})
    assert str(raised.value) in " ".join(README.read_text().split())


def headings(page):
    """The anchors that GitHub gives the headings of a page."""
    prose = BLOCKS.sub("", page.read_text())
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in re.findall(r"^#+ (.*)$", prose, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^):]+)\)", page.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_and_every_example_can_be_reached_from_the_first_page():
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^):]+)\)", README.read_text())}
    programs = {name(path) for path in (ROOT / "examples").glob("*.py")}
    assert {name(page) for page in PAGES} - {"README.md"} <= linked
    assert programs <= linked


def test_every_command_of_the_pages_is_there():
    makefile = (ROOT / "Makefile").read_text()
    commands = [text for page in PAGES for language, text in blocks(page) if language == "console"]
    commands += [text for page in PAGES for text in re.findall(r"`((?:python|make) [^`]+)`", page.read_text())]
    for program in re.findall(r"python (\S+\.py)", "\n".join(commands)):
        assert (ROOT / program).exists() or (ROOT / "examples" / program).exists(), program
    for target in re.findall(r"make (\w+)", "\n".join(commands)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
