"""The folders of real runs, each made once and copied for who harms it."""

import json
import shutil

import pytest

from cli.digits import trained
from functrain.cli.main import main


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A run of four epochs, and one with another seed."""
    root = tmp_path_factory.mktemp("runs")
    trained(root / "digits", seed=0)
    trained(root / "other", seed=1)
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to be harmed."""
    return shutil.copytree(made / "digits", tmp_path / "digits")


@pytest.fixture
def told(capsys):
    """Runs a command; returns its exit code, what it printed and what it said on standard error."""

    def of(*arguments):
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        return code, *capsys.readouterr()

    return of


@pytest.fixture
def data(told):
    """What a command prints with --json."""
    return lambda *arguments: json.loads(told(*arguments, "--json")[1])
