"""Storage that fails, and checkpoints that are damaged there: told or tried again, and nothing is lost."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time
import zlib

import pytest
from processes import PRELUDE, ROOT, run, start
from s3 import Server, environment, objects
from states import at, like, names, saved, updated
from trees import bits, says

import functrain as ft
from functrain.errors import CheckpointError, SaveError, StorageError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.contents import contents_file
from functrain.loop.remote.store import Store

QUICK = ft.Limits(request=0.5, patience=0.7, lease=2.0)
LONGER = ft.Limits(request=5.0, patience=30.0, lease=20.0)


@pytest.fixture
def here(tmp_path):
    """`here(address, ...)`: checkpoints at an address, as seen from a machine."""

    def made(address, machine="a", limits=QUICK, **options):
        return ft.Checkpoints(address, staging=tmp_path / machine, limits=limits, **options)

    return made


def contents(store):
    return {name: store.get(name) for name in objects(store)}


# Requests that fail.


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "cut", "lose"])
def test_a_server_that_fails_every_third_request_loses_nothing(s3, proxy, here, fault):
    proxy.fault = lambda number, method, path: fault if number % 3 == 0 else "pass"
    with here(s3, limits=LONGER, keep_last=1) as checkpoints:
        for number in (1, 2):
            checkpoints.save(updated(number)[2])
            checkpoints.wait()
    restored = here(s3, "b", limits=LONGER).restore(like=like())
    assert bits(restored.state) == bits(updated(2)[2])
    proxy.fault = lambda number, method, path: "pass"
    assert {name.partition("/")[0] for name in objects(Store(s3))} == {"2", "2.manifest.json"}


@pytest.mark.slow
def test_a_failed_upload_is_a_failed_save_and_the_run_goes_on(s3, proxy, here):
    checkpoints = here(s3)
    checkpoints.open()
    proxy.fault = lambda number, method, path: "503"
    for number in (1, 2, 3):
        checkpoints.save(updated(number)[2])  # It does not wait for what is sent.
    told = says("could not be sent to", s3, "503", "it is kept in", "sent again while the run goes on")
    with pytest.raises(SaveError, match=told):
        checkpoints.wait()
    with pytest.warns(UserWarning, match=says("could not be sent to", "saving again now")):
        checkpoints.save(at(4, updated(3)[2]))
    with pytest.raises(SaveError, match=told):
        checkpoints.wait()
    proxy.fault = lambda number, method, path: "pass"
    deadline = time.monotonic() + 20  # It is sent without another save.
    while checkpoints._writer.failure is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    checkpoints.wait()
    checkpoints.close()
    assert names(here(s3, "b")) == ["3", "4"]


@pytest.mark.slow
def test_an_upload_that_hangs_holds_no_training_up(s3, proxy, here):
    checkpoints = here(s3, limits=ft.Limits(request=1.0, patience=1.5))
    checkpoints.open()
    proxy.fault = lambda number, method, path: "hang"
    began = time.monotonic()
    for number in (1, 2, 3):
        checkpoints.save(updated(number)[2], metrics={"loss": 1.0})
        checkpoints.is_best({"loss": 1.0})
    checkpoints.restore(like=like())
    assert checkpoints._writer._sender._done == 0, time.monotonic() - began  # The first is still on its way.
    with pytest.raises(SaveError, match=says("no answer in time", "1.5 s")):
        checkpoints.close()


@pytest.mark.slow
def test_an_error_in_listing_is_an_error_and_never_no_checkpoints(s3, proxy, here):
    with here(s3) as checkpoints:
        checkpoints.save(updated(1)[2])
    proxy.fault = lambda number, method, path: "503" if "list-type" in path else "pass"
    fresh = here(s3, "b")
    for attempt in (lambda: fresh.restore(like=like()), fresh.steps, fresh.open, fresh.best):
        with pytest.raises(StorageError, match=says("could not list", s3, "503")):
            attempt()
    proxy.fault = lambda number, method, path: "503" if "manifest" in path else "pass"
    with pytest.raises(StorageError, match=says("could not read", f"{s3}/1.manifest.json")):
        fresh.restore(like=like())


def test_a_missing_bucket_is_told_before_anything_is_trained(s3, here):
    for attempt in (lambda c: c.open(), lambda c: c.restore(like=like()), lambda c: c.save(updated(1)[2])):
        with pytest.raises(StorageError, match=says("there is no bucket 'nowhere'", "make it, or mend the address")):
            attempt(here("s3://nowhere/digits"))


@pytest.mark.slow
def test_a_server_that_is_killed_in_an_upload_and_comes_back_without_its_objects(monkeypatch, here):
    server = Server()
    server.make("bucket")
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    checkpoints = here("s3://bucket/digits")
    checkpoints.save(updated(1)[2])
    checkpoints.wait()
    server.kill()
    checkpoints.save(updated(2)[2])
    with pytest.raises(SaveError, match=says("nobody answers")):
        checkpoints.close()
    server = Server(server.port)
    server.make("bucket")
    with pytest.warns(UserWarning, match=says("s3://bucket/digits has no checkpoint", "'2' in", "is sent now")):
        checkpoints.open()
    assert int(checkpoints.restore(like=like()).state.step) == 2
    checkpoints.close()
    assert int(here("s3://bucket/digits", "b").restore(like=like()).state.step) == 2
    server.stop()


# Processes.


@pytest.mark.slow
def test_a_program_whose_last_upload_failed_ends_with_an_error(s3, proxy, tmp_path):
    script = """
        os.environ.update(json.loads(sys.argv[3]))
        limits = ft.Limits(request=1.0, patience=1.0)
        checkpoints = ft.Checkpoints(sys.argv[1], staging=sys.argv[2], limits=limits)
        data = ft.from_arrays({"x": np.ones(4, np.float32)}, batch_size=2)
        ft.fit(update, state, data, epochs=2, checkpoints=checkpoints)
    """
    proxy.fault = lambda number, method, path: "503" if "/4/" in path else "pass"
    ended = run(script, s3, tmp_path / "a", json.dumps(environment(proxy.url)))
    assert ended.returncode == 1
    assert re.search(says("SaveError: the checkpoint '4' could not be sent to", s3), ended.stderr)
    assert "not-to-be-told" not in ended.stderr
    proxy.fault = lambda number, method, path: "pass"
    ended = run(script, s3, tmp_path / "a", json.dumps(environment(proxy.url)))
    assert ended.returncode == 0, ended.stderr
    assert names(ft.Checkpoints(s3, staging=tmp_path / "b")) == ["2", "4"]


@pytest.mark.slow
def test_a_program_that_ends_without_closing_its_checkpoints_ends_its_upload(s3, proxy, tmp_path):
    ended = run(
        """
        os.environ.update(json.loads(sys.argv[3]))
        ft.Checkpoints(sys.argv[1], staging=sys.argv[2]).save(state)
        """,
        s3, tmp_path / "a", json.dumps(environment(proxy.url)),
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert names(ft.Checkpoints(s3, staging=tmp_path / "b")) == ["0"]


@pytest.mark.slow
def test_a_second_run_at_an_address_is_told_and_one_that_was_killed_is_followed(s3, proxy, here, tmp_path):
    process = start(
        """
        os.environ.update(json.loads(sys.argv[3]))
        checkpoints = ft.Checkpoints(sys.argv[1], staging=sys.argv[2], limits=ft.Limits(lease=2.0))
        checkpoints.save(state)
        checkpoints.wait()
        print("saved", flush=True)
        time.sleep(60)
        """,
        s3, tmp_path / "a", json.dumps(environment(proxy.url)),
    )  # fmt: skip
    assert process.stdout.readline() == "saved\n"
    with pytest.raises(CheckpointError, match=says("another process writes checkpoints to", str(tmp_path / "a"))):
        here(s3).open()  # Here it is the folder's lock that tells,
    second = here(s3, "b")
    with (
        pytest.warns(UserWarning, match=says("process", "wrote checkpoints to", s3)),
        pytest.raises(CheckpointError, match=says("another process writes checkpoints to", s3, "its own")),
    ):
        second.open()  # and elsewhere the lease.
    process.kill()
    process.wait()
    with pytest.warns(UserWarning, match=says("if it is not heard of within 2 s")):
        second.open()
    assert names(second) == ["0"]
    second.close()


def test_a_run_whose_place_was_taken_ends(s3, here):
    one = here(s3, limits=ft.Limits(lease=0.5))
    one.save(updated(1)[2])
    one.wait()
    one._place._lease._ended.set()  # As a machine that was asleep.
    other = here(s3, "b", limits=ft.Limits(lease=0.5))
    with pytest.warns(UserWarning, match="if it is not heard of"):
        other.open()
    one._place._lease._ended.clear()
    one.save(updated(2)[2])
    with pytest.raises(SaveError, match=says("another process writes checkpoints to", "took over")):
        one.wait()
    with pytest.raises(CheckpointError, match=says("took over")):
        one.save(updated(3)[2])
    other.save(at(7, updated(1)[2]))
    other.close()
    with pytest.raises(SaveError):
        one.close()
    assert names(here(s3, "c")) == ["1", "7"]


@pytest.mark.slow
def test_a_full_disk_here_fails_a_download_and_nothing_is_changed(s3, here, tmp_path):
    with here(s3) as checkpoints:
        checkpoints.save(updated(1)[2])
    full = tmp_path / "full"
    full.mkdir()
    mount = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    script = f'mount -t tmpfs -o size=16k none {full} && exec "$@"'
    if subprocess.run([*mount, script, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    code = """
        found = tried(lambda: ft.Checkpoints(sys.argv[1], staging=sys.argv[2]).restore(like=state))
        found += [len([*pathlib.Path(sys.argv[2]).rglob("*[0-9]*")])]
        print(json.dumps(found))
    """
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    command = [*mount, script, "sh", sys.executable, "-c", code, s3, str(full)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    kind, told, left = json.loads(ended.stdout)
    assert (kind, left) == ("CheckpointError", 0)
    assert re.search(says(f"{s3}/1 can't be read", "No space left", "nothing was changed"), told)


# Damage.


def lost(store, name):
    """Deletes the largest object of a checkpoint."""
    listing = store.listed(name)
    largest = max(listing, key=lambda each: listing[each].size)
    store.delete([largest])
    return largest


def flipped(store, name):
    listing = store.listed(name)
    largest = max(listing, key=lambda each: listing[each].size)
    content = bytearray(store.get(largest))
    content[len(content) // 2] ^= 1
    store.put(largest, bytes(content))
    return largest


@pytest.mark.parametrize("harm", [lost, flipped])
def test_what_is_damaged_there_is_told_the_older_one_is_used_and_nothing_is_deleted(s3, here, harm):
    with here(s3) as checkpoints:
        saved(checkpoints, [None] * 2)
    store = Store(s3)
    largest = harm(store, "2")
    before = contents(store)
    told = says(
        "THE CHECKPOINT", f"{s3}/2 IS DAMAGED and is not used", largest.removeprefix("2/"), "kept as", f"{s3}/2'"
    )
    with pytest.warns(UserWarning, match=told):
        assert here(s3, "b").restore(like=like()).path.name == "1"
    assert contents(store) == before
    with here(s3, "b", keep_last=1) as run_again:
        run_again.open()
        with pytest.warns(UserWarning, match="IS DAMAGED"):
            restored = run_again.restore(like=like())
        run_again.wait()
        assert contents(store) == before
        run_again.save(at(2, restored.state), data="again")
    assert names(here(s3, "c")) == ["2", "2~2"]
    assert here(s3, "c").restore(like=like()).data == "again"
    with pytest.raises(CheckpointError, match=says(f"{s3}/2 is damaged", "restore another of 2, 2~2")):
        here(s3, "c").restore(like=like(), step=pathlib.Path(here(s3, "c").directory, "2"))


def test_where_all_are_damaged_no_run_begins_again_without_a_word(s3, here):
    with here(s3) as checkpoints:
        saved(checkpoints, [None] * 2)
    for name in ("1", "2"):
        lost(Store(s3), name)
    with pytest.warns(UserWarning, match="IS DAMAGED"), pytest.raises(CheckpointError) as raised:
        here(s3, "b").restore(like=like())
    assert re.search(says("no checkpoint in", s3, "is sound", "fit(..., fresh=True)"), str(raised.value))


def test_a_manifest_that_leads_out_of_the_folder_is_damage(s3, here, tmp_path):
    with here(s3) as checkpoints:
        checkpoints.save(updated(1)[2])
    store = Store(s3)
    body = json.loads(json.loads(store.get("1.manifest.json"))["body"])
    for outside in ("../../out", "/tmp/out", "a//b", "./a"):
        (tmp_path / "x").mkdir(exist_ok=True)
        forged = tmp_path / "x" / "1"
        forged.mkdir(exist_ok=True)
        (forged / "weights").write_bytes(b"1")
        manifest.write(forged, {name: value for name, value in body.items() if name != "files"})
        outer = json.loads(manifest.path_of(forged).read_bytes())
        inner = json.dumps({**json.loads(outer["body"]), "files": {outside: [1, 1]}})
        store.put("1.manifest.json", json.dumps({"body": inner, "crc32": zlib.crc32(inner.encode())}).encode())
        store.put(f"1/{contents_file(pathlib.Path())}", b"x")
        with pytest.warns(UserWarning, match="is not what was written"), pytest.raises(CheckpointError):
            here(s3, "b").restore(like=like())
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_left_of_an_upload_is_removed_and_nothing_else(s3, proxy, here):
    store = Store(s3)
    checkpoints = here(s3)
    checkpoints.open()
    proxy.fault = lambda number, method, path: "503" if "1.manifest" in path else "pass"
    checkpoints.save(updated(1)[2])
    with pytest.raises(SaveError):
        checkpoints.close()
    proxy.fault = lambda number, method, path: "pass"
    assert len(objects(store)) > 5
    store.put("1/of-somebody", b"")
    with here(s3, "b") as other:
        other.open()
        assert objects(store) == ["1/of-somebody"]
