"""Killed in the middle. Python tells of every operation on a file before it is done; the module needs no JAX."""

import subprocess
import sys

import pytest
from states import flip

from functrain.loop.checkpoint import manifest

KILLED = """
import importlib.util, os, pathlib, signal, sys

spec = importlib.util.spec_from_file_location("manifest", sys.argv[1])
manifest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(manifest)
left = int(sys.argv[4])

def hook(event, arguments):
    global left
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

step = pathlib.Path(sys.argv[3])
sys.addaudithook(hook)
manifest.publish(step, {}) if sys.argv[2] == "publish" else getattr(manifest, sys.argv[2])(step)
"""


@pytest.mark.parametrize("operation", ["publish", "remove", "set_aside"])
def test_killed_at_any_point_nothing_damaged_looks_sound(tmp_path, operation):
    for nth in range(1, 20):
        step = tmp_path / str(nth) / "7"
        (step / "state").mkdir(parents=True)
        for name in ("a", "state/b"):
            (step / name).write_bytes(b"1234")
        if operation != "publish":
            manifest.publish(step, {})
        if operation == "set_aside":
            flip(step / "state" / "b")
        command = [sys.executable, "-c", KILLED, manifest.__file__, operation, str(step), str(nth)]
        ended = subprocess.run(command, check=False).returncode
        files = {path.name for path in step.parent.rglob("*") if path.is_file()}
        if operation == "publish":
            assert manifest.damage(step) is None  # Whole with or without a manifest, which is never half of one.
        elif operation == "remove":
            assert not step.exists() or manifest.damage(step) is None
            assert not manifest.path_of(step).exists() or step.exists()
        else:
            assert not step.exists() or manifest.damage(step) == "'state/b' is not what was written"
            assert {"a", "b"} <= files
        manifest.clear(step.parent)
        assert not [path for path in step.parent.iterdir() if path.name.startswith(".")]
        if ended == 0:
            break
    assert ended == 0
    assert nth > 2
