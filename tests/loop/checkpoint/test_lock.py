"""One writer at a time."""

import contextlib
import json
import shutil
import signal

import pytest
from processes import start
from states import at, copied, everything, flip, like, names, updated
from trees import says

import functrain as ft
from functrain.errors import CheckpointError

WRITER = """
    checkpoints = ft.Checkpoints(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(tried({"open": checkpoints.open, "save": lambda: checkpoints.save(state),
                                "close": checkpoints.close}[line.strip()])), flush=True)
"""


@pytest.fixture
def another():
    """Asks another process to do something with checkpoints of its own."""
    with contextlib.ExitStack() as stack:

        def started(directory):
            process = start(WRITER, directory)
            stack.callback(process.kill)

            def ask(what):
                process.stdin.write(what + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            return process, ask

        yield started


def test_a_folder_has_one_writer_and_any_number_of_readers(sound, tmp_path, another):
    directory = copied(sound, tmp_path)
    _, _, state = updated(1)
    process, ask = another(directory)
    checkpoints = ft.Checkpoints(directory)
    checkpoints.restore(like=like())  # A reader locks nothing,
    assert ask("open") is None
    assert checkpoints.restore(like=like()).data == {"position": 2}  # and minds no lock.
    with pytest.raises(CheckpointError, match=says("another process writes checkpoints to", str(directory), "its own")):
        checkpoints.save(at(3, state))
    assert ask("close") is None
    checkpoints.save(at(3, state))
    assert ask("save")[0] == "CheckpointError"
    checkpoints.close()
    assert ask("open") is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoints.open()
    checkpoints.close()


def test_a_reader_that_meets_damage_sets_it_aside_only_where_nobody_writes(sound, tmp_path):
    directory = copied(sound, tmp_path)
    flip(directory / "2" / "facts" / "metadata")
    reader = ft.Checkpoints(directory)
    with ft.Checkpoints(directory) as writer:
        writer.open()
        with pytest.warns(UserWarning, match=says("IS DAMAGED", "kept as '2'")):
            assert reader.restore(like=like()).path.name == "1"
        assert names(writer) == ["1", "2"]
    with pytest.warns(UserWarning, match=says("IS DAMAGED", "kept as '2.corrupt'")):
        assert reader.restore(like=like()).path.name == "1"
    ft.Checkpoints(directory).open()  # The reader did not keep the lock.


def test_what_a_killed_process_left_half_done_is_cleared_by_the_next_writer(sound, tmp_path):
    directory = copied(sound, tmp_path)
    before = everything(directory)
    for left in ("3.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", ".removed-1/state"):
        shutil.copytree(sound / "2" / "state", directory / left)
    (directory / ".2.manifest.json.tmp").write_text("{")
    checkpoints = ft.Checkpoints(directory)
    assert checkpoints.restore(like=like()).path.name == "2"
    assert (directory / "3.orbax-checkpoint-tmp").exists()
    with checkpoints:
        checkpoints.open()
    assert everything(directory) == before | {".lock": b""}
