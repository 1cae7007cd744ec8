"""Killed in the middle. Python tells of every operation on a file before it is done."""

import os
import signal

import pytest
import warm
from states import SUMMARY

from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.checkpoint.staging import OWN, Staging

KILLED = """
import os, pathlib, signal, sys
from functrain.loop.checkpoint.housekeeping import set_aside
from functrain.loop.checkpoint.staging import Staging

what, directory, left = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])

def hook(event, arguments):
    global left
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

staging = Staging(directory)
sys.addaudithook(hook)
match what:
    case "publish": staging.publish("7", {"batches": 3, "content": 1, "metrics": {}})
    case "remove": staging.remove(directory / "7")
    case "set_aside": set_aside(directory / "7")
"""


def written(directory):
    staging = Staging(directory)
    staging.open()
    (staging.place("7") / "state").mkdir(parents=True)
    for name in ("a", "state/b"):
        (staging.place("7") / name).write_bytes(b"1234")
    return staging


@pytest.mark.parametrize("operation", ["publish", "remove", "set_aside"])
def test_killed_at_any_point_a_checkpoint_is_whole_or_not_there(tmp_path, operation):
    ends = set()
    for nth in range(1, 40):
        directory = tmp_path / str(nth)
        staging = written(directory)
        if operation != "publish":
            staging.publish("7", SUMMARY)
        if operation == "set_aside":
            (directory / "7" / "state" / "b").write_bytes(b"1235")
        process = warm.Process(KILLED, operation, directory, nth)
        _, errors = process.communicate()
        checkpoint = directory / "7"
        if operation == "set_aside":
            assert not checkpoint.exists() or manifest.damage(checkpoint) == "'state/b' is not what was written"
            assert {"a", "b"} <= {path.name for path in directory.rglob("*")}
        Staging(directory).open()  # As the next process does.
        assert checkpoint.exists() == manifest.path_of(checkpoint).exists() or operation == "set_aside"
        if operation != "set_aside":
            assert manifest.damage(checkpoint) in (None, "its folder is missing")
            assert {path.name for path in (directory / OWN).rglob("*")} == {"written", "removed"}
        ends.add(checkpoint.exists())
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert process.returncode == 0
    assert ends == {True, False}


def test_a_save_that_is_over_leaves_nothing_beside_the_checkpoint(tmp_path):
    staging = written(tmp_path)
    staging.publish("7", SUMMARY)
    staging.close()
    assert sorted(os.listdir(tmp_path)) == ["7", "7.manifest.json"]
    assert [entry.path.name for entry in Folder(tmp_path).entries()] == ["7"]
