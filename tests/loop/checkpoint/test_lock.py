"""One writer at a time."""

import contextlib
import json
import os
import re
import shutil
import signal
import warnings

import jax.numpy as jnp
import optax
import pytest
import warm
from processes import run, start
from states import at, copied, everything, flip, like, names, one_part, updated
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


def test_a_child_that_outlives_its_parent_keeps_no_lock(tmp_path):
    process = start(
        """
        checkpoints = ft.Checkpoints(sys.argv[1])
        checkpoints.save(state)
        checkpoints.wait()
        child = os.fork()
        if child == 0:
            time.sleep(60)
        print(child, flush=True)
        time.sleep(60)
        """,
        tmp_path,
    )
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.returncode = warm.parent().answer(
            {"ended": process.pid}
        )  # Its child holds the pipe that else tells this.
        with ft.Checkpoints(tmp_path) as checkpoints:
            checkpoints.open()
            os.kill(child, 0)  # It is still there.
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_does_not_take_the_lock_from_its_parent(tmp_path):
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.open()
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(CheckpointError, match="another process writes"):
            ft.Checkpoints(tmp_path).open()


def test_what_a_link_leads_to_is_not_touched(tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / ".lock").symlink_to(tmp_path / "notes")
    with pytest.raises(CheckpointError, match=says("/it/.lock is a link: remove it")):
        ft.Checkpoints(tmp_path / "it").open()
    assert (tmp_path / "notes").read_text() == "mine"
    (tmp_path / "it" / ".lock").unlink()
    (tmp_path / "it" / ".lock").write_text("mine")
    with ft.Checkpoints(tmp_path / "it") as checkpoints:
        checkpoints.open()
    assert (tmp_path / "it" / ".lock").read_text() == "mine"


def test_a_file_system_without_locks_is_told_and_can_be_used_all_the_same(tmp_path):
    """The system refuses each lock, as a network file system without a lock manager does."""
    ended = run(
        """
        import ctypes, errno, platform, struct

        number = {"x86_64": 73, "aarch64": 32}[platform.machine()]
        # Of each call: its number; one further if it is flock, else two; refused; allowed.
        refused, allowed = 0x00050000 | errno.ENOLCK, 0x7FFF0000
        steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, refused), (0x06, 0, 0, allowed)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = struct.pack("HP", len(steps), ctypes.addressof(code))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # No new privileges,
        assert libc.prctl(22, 2, program) == 0, ctypes.get_errno()  # and a filter.
        found = [tried(ft.Checkpoints(sys.argv[1]).open)]
        with ft.Checkpoints(sys.argv[1], lock=False) as checkpoints:
            checkpoints.save(state)
        found.append([path.name for path in checkpoints.steps()])
        print(json.dumps(found))
        """,
        tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    (kind, told), names_of_all = json.loads(ended.stdout)
    assert kind == "CheckpointError"
    assert re.search(says(f"the file system of {tmp_path} has no locks", "No locks available", "lock=False"), told)
    assert names_of_all == ["0"]


@pytest.mark.slow
def test_a_reader_beside_a_writer_that_keeps_one_always_finds_one(tmp_path):
    process = start(
        """
        with ft.Checkpoints(sys.argv[1], keep_last=1) as checkpoints:
            for _ in range(20):
                state, _ = update(state, batch)
                checkpoints.save(state)
                checkpoints.wait()
                print("saved", flush=True)
        """,
        tmp_path,
    )
    process.stdout.readline()
    w = {"w": jnp.zeros(100_000)}
    update = ft.make_update(lambda params, batch: jnp.mean(params["w"]), one_part(w, optax.sgd(0.1)))
    like_it, seen = update.abstract(w), []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        while process.poll() is None:
            restored = ft.Checkpoints(tmp_path).restore(like=like_it)
            seen.append(int(restored.state.step))
    assert process.returncode == 0
    assert seen == sorted(seen)
    assert len({*seen}) > 3


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
    for left in ("written/3.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", "removed/1/state"):
        shutil.copytree(sound / "2" / "state", directory / ".functrain" / left)
    (directory / ".functrain" / "written" / ".2.manifest.json.tmp").write_text("{")
    checkpoints = ft.Checkpoints(directory)
    assert checkpoints.restore(like=like()).path.name == "2"
    assert (directory / ".functrain" / "written" / "3.orbax-checkpoint-tmp").exists()
    with checkpoints:
        checkpoints.open()
    assert everything(directory) == before | {".lock": b""}
