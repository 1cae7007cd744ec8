"""A save that failed is told, and the next one is tried."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap

import pytest
from processes import PRELUDE, ROOT, run
from states import at, names, updated
from trees import says

import functrain as ft
from functrain.errors import SaveError
from functrain.loop.checkpoint import manifest, plain

FAILING = """
    found = {}
    full, free = {"limit": (lambda: room(50_000), lambda: room(resource.RLIM_INFINITY)),
                  "disk": (lambda: filler.write_bytes(bytes(400_000)), lambda: filler.unlink())}[sys.argv[2]]
    directory = pathlib.Path(sys.argv[1])
    filler = directory / "filler"
    checkpoints = ft.Checkpoints(directory, keep_last=3)
    state, _ = update(state, batch)
    checkpoints.save(state)
    checkpoints.wait()
    full()
    for attempt in ("second", "third"):
        state, _ = update(state, batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save = tried(lambda: checkpoints.save(state))
        found[attempt] = {"save": save, "wait": tried(checkpoints.wait), "steps": [p.name for p in checkpoints.steps()],
                          "warnings": [str(w.message) for w in caught],
                          "left": sorted(p.name for p in directory.glob("*tmp*"))}
    found["restored"] = int(checkpoints.restore(like=state).state.step)
    found["close"] = tried(checkpoints.close)
    free()
    state, _ = update(state, batch)
    checkpoints.save(state)
    found["fourth"] = tried(checkpoints.wait)
    found["again"] = tried(checkpoints.close)
    restored = checkpoints.restore(like=state)
    found["steps"] = [p.name for p in checkpoints.steps()]
    found["same"] = bool((restored.state.params["w"] == state.params["w"]).all())
    print(json.dumps(found))
"""


def check_failing(ended):
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    for attempt, step in (("second", "2"), ("third", "3")):
        told = found[attempt]["wait"]
        assert told[0] == "SaveError"
        assert re.search(says(f"/{step} could not be written", "the one before it is whole", "the next save"), told[1])
        assert found[attempt]["save"] in (None, told)
        assert found[attempt]["steps"] == ["1"]
        assert found[attempt]["left"] == []
    assert not any("could not be written" in text for text in found["second"]["warnings"])
    assert any(re.search(says("/2 could not be written", "saving again now"), w) for w in found["third"]["warnings"])
    assert found["restored"] == 1
    assert found["close"][0] == "SaveError"
    assert (found["fourth"], found["again"]) == (None, None)
    assert (found["steps"], found["same"]) == (["1", "4"], True)


@pytest.mark.slow
def test_files_that_cannot_grow_fail_a_save_and_the_next_one_is_tried(tmp_path):
    check_failing(run(FAILING, tmp_path, "limit"))


@pytest.mark.slow
def test_a_full_disk_fails_a_save_and_the_next_one_is_tried(tmp_path):
    mount = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    script = f'mount -t tmpfs -o size=1200k none {tmp_path} && exec "$@"'
    if subprocess.run([*mount, script, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(FAILING)
    command = [*mount, script, "sh", sys.executable, "-c", code, str(tmp_path), "disk"]
    check_failing(subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["with", "fit"])
def test_a_program_whose_last_save_failed_ends_with_an_error(tmp_path, way):
    ended = run(
        """
        if sys.argv[2] == "with":
            with ft.Checkpoints(sys.argv[1]) as checkpoints:
                checkpoints.save(state)
                state, _ = update(state, batch)
                checkpoints.wait()
                room(50_000)
                with contextlib.suppress(SaveError):
                    checkpoints.save(state)
        else:
            checkpoints = ft.Checkpoints(sys.argv[1])

            class Full(ft.Hook):
                def checkpoint_saved(self, run):
                    checkpoints.wait()
                    room(50_000)

            data = ft.from_arrays({"x": np.ones(4, np.float32)}, batch_size=2)
            ft.fit(update, state, data, epochs=2, checkpoints=checkpoints, hooks=[Full()])
        print("went on")
        """,
        tmp_path, way,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "went on" not in ended.stdout
    assert re.search(says("SaveError: the checkpoint", "could not be written"), ended.stderr)
    assert names(ft.Checkpoints(tmp_path)) == [{"with": "0", "fit": "2"}[way]]


def test_who_may_not_write_gets_an_error_and_may_still_read_what_is_sound():
    with tempfile.TemporaryDirectory() as directory:  # Pytest's own folders are nobody's but ours.
        pathlib.Path(directory).chmod(0o755)
        ended = run(
            """
            directory = pathlib.Path(sys.argv[1])
            with ft.Checkpoints(directory / "it", keep_last=3) as checkpoints:
                for _ in range(2):
                    state, _ = update(state, batch)
                    checkpoints.save(state)
                checkpoints.restore(like=state)
            (directory / "it" / "2" / "facts" / "metadata").chmod(0)
            (directory / "it").chmod(0o555)
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)  # Nobody.
            found = {}
            for name, folder in (("it", directory / "it"), ("new", directory / "it" / "new")):
                found[name] = tried(lambda: ft.Checkpoints(folder).save(state))
            found["asked"] = tried(lambda: ft.Checkpoints(directory / "it").restore(like=state, step=2))
            found["newest"] = tried(lambda: ft.Checkpoints(directory / "it").restore(like=state))
            found["step"] = int(ft.Checkpoints(directory / "it").restore(like=state, step=1).state.step)
            found["files"] = sorted(os.listdir(directory / "it"))
            print(json.dumps(found))
            """,
            directory,
        )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    for name in ("it", "new"):
        assert found[name][0] == "SaveError"
        assert re.search(says("can't be written to", "Permission denied"), found[name][1])
    for name in ("asked", "newest"):
        assert found[name][0] == "CheckpointError"
        assert re.search(
            says("/it/2 can't be read", "Permission denied", "nothing was changed", "step="), found[name][1]
        )
    assert found["step"] == 1
    assert found["files"] == [".lock", "1", "1.manifest.json", "2", "2.manifest.json"]


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SaveError, match=says(str(tmp_path / "runs"), "can't be written to")):
        ft.Checkpoints(tmp_path / "runs").save(updated(0)[2])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_manifest_that_cannot_be_written_fails_the_save(tmp_path, asynchronous):
    _, _, state = updated(1)
    checkpoints = ft.Checkpoints(tmp_path, asynchronous=asynchronous, keep_last=9)
    checkpoints.save(at(1, state))
    checkpoints.wait()
    in_the_way = tmp_path / ".functrain" / "written" / ".2.manifest.json.tmp"
    in_the_way.mkdir()

    def save():
        checkpoints.save(at(2, state))
        checkpoints.wait()

    with pytest.raises(SaveError, match=says("/2 could not be written: IsADirectoryError")):
        save()
    assert os.listdir(in_the_way.parent) == []
    with pytest.warns(UserWarning, match=says("/2 could not be written", "saving again now")):
        checkpoints.save(at(2, state))
    checkpoints.close()
    assert names(checkpoints) == ["1", "2"]
    assert checkpoints.restore(like=state).path.name == "2"


def test_what_cannot_be_removed_is_told_and_fails_no_save(tmp_path):
    _, _, state = updated(1)
    checkpoints = ft.Checkpoints(tmp_path, keep_last=1, asynchronous=False)
    checkpoints.save(at(1, state))
    (tmp_path / ".functrain" / "removed").rmdir()
    (tmp_path / ".functrain" / "removed").write_text("in the way")
    with pytest.warns(UserWarning, match=says(str(tmp_path / "1"), "could not be removed")):
        checkpoints.save(at(2, state))
    assert names(checkpoints) == ["1", "2"]
    assert all(manifest.damage(tmp_path / name) is None for name in ("1", "2"))
    checkpoints.close()


def test_what_orbax_left_out_without_a_word_fails_the_save(tmp_path, monkeypatch):
    """In a folder whose name it takes for a pattern it finds nothing to merge, and says that it has saved."""
    monkeypatch.setattr(plain, "is_plain", lambda path: True)
    checkpoints = ft.Checkpoints(tmp_path / "layers=[64,64]")
    checkpoints.save(updated(1)[2])
    with pytest.raises(SaveError, match=says("/1 could not be written")):
        checkpoints.wait()
    assert names(checkpoints) == []


# A library that has threads, as TensorStore does, may wait for ever for one as a fork of it ends: an alarm ends that.
FORK = "if os.fork() == 0: signal.alarm(10); sys.exit()"


@pytest.mark.parametrize("ends", ["", "raise KeyError", FORK])
def test_a_program_that_ends_without_closing_its_checkpoints_ends_its_save(tmp_path, ends):
    ended = run(f"checkpoints = ft.Checkpoints(sys.argv[1])\ncheckpoints.save(state)\n{ends}", tmp_path)
    assert ended.returncode == (ends == "raise KeyError"), ended.stderr
    assert names(ft.Checkpoints(tmp_path)) == ["0"]
    assert manifest.damage(tmp_path / "0") is None
    assert "Traceback" not in ended.stderr.replace("Traceback", "", ends == "raise KeyError")


def test_a_failed_save_is_told_beside_the_error_that_ends_a_with_block(tmp_path):
    _, _, state = updated(1)

    def interrupted():
        with ft.Checkpoints(tmp_path) as checkpoints:
            checkpoints.open()
            (tmp_path / ".functrain" / "written" / ".1.manifest.json.tmp").mkdir()
            checkpoints.save(state)
            raise KeyError("another")

    with pytest.raises(KeyError) as raised:
        interrupted()
    assert re.search(says("/1 could not be written"), raised.value.__notes__[0])


def test_closed_twice_and_used_again(tmp_path):
    _, _, state = updated(1)
    checkpoints = ft.Checkpoints(tmp_path)
    checkpoints.close()
    for step in (1, 2):
        checkpoints.save(at(step, state))
        checkpoints.close()
        checkpoints.close()
    assert names(checkpoints) == ["1", "2"]
