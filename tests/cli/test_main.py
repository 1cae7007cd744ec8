"""The program: how it starts, what it imports, how it ends."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import functrain as ft
from functrain.cli.main import main

ROOT = Path(ft.__file__).parent.parent
COMMANDS = ("show", "report", "checkpoints", "verify", "diff", "export")


def started(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in ("report", "diff", "export")])
def test_no_jax_is_imported_where_no_arrays_are_read(made, command):
    program = (
        "import sys; from functrain.cli.main import main; main(sys.argv[1:]);"
        " print([name for name in ('jax', 'numpy', 'orbax', 'matplotlib') if name in sys.modules])"
    )
    ended = started("-c", program, command, made / "digits")
    assert ended.stderr == ""
    assert ended.stdout.splitlines()[-1] == "[]"


def test_the_program_is_installed_by_its_name_and_runs_as_a_module(made):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["functrain"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
    ended = started("-m", "functrain", "verify", made / "digits")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "all sound: 12, 16\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"example:\n  functrain {command} runs/" in said
    assert "exit codes: 0" in said


@pytest.mark.parametrize("arguments", [[], ["verfy", "runs"], ["verify"], ["verify", "runs", "--jso"]])
def test_what_is_no_command_ends_with_2_and_says_what_there_is(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: functrain" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"functrain {ft.__version__}\n"


def test_a_reader_that_has_enough_is_no_trouble(made):
    program = [sys.executable, "-m", "functrain", "verify", str(made / "digits"), "--json"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_what_a_file_says_does_nothing_to_a_terminal_and_any_encoding_is_enough(run):
    path = run.rename(run.parent / "\x1b[31mröd")
    ended = started("-m", "functrain", "verify", path / "12", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 2
    assert "\\x1b[31mr\\xf6d/12 is a checkpoint itself" in ended.stderr
