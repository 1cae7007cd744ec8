"""A damaged checkpoint is never used, and is told."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import zlib

import pytest
from states import SUMMARY, at, copied, everything, flip, like, names, updated
from trees import bits, says

import functrain as ft
from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_out(path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(path):
    for inner in path.iterdir():
        shutil.rmtree(inner) if inner.is_dir() else inner.unlink()


HARMS = {
    "truncate": truncate, "zero out": zero_out, "flip a bit": flip, "delete": pathlib.Path.unlink,
    "delete folder": shutil.rmtree, "empty folder": empty,
}  # fmt: skip


def kind(name):
    """What Orbax calls a file, but for the hashes that its data files are named by."""
    return re.sub(r"[0-9a-f]{32}", "data", name)


def harmed(sound, tmp_path, harm):
    """What a harm can be done to in checkpoint 2, and a copy of the folder where it was done."""
    found = [path for path in sorted(sound.rglob("*")) if path.relative_to(sound).parts[0] in ("2", "2.manifest.json")]
    found = [path for path in found if path.is_dir() == harm.endswith("folder")]
    if harm in ("zero out", "delete"):  # For these one of each kind is enough.
        found = list({kind(str(path)): path for path in found}.values())
    for number, path in enumerate(found):
        directory = copied(sound, tmp_path / str(number))
        HARMS[harm](directory / path.relative_to(sound))
        assert everything(directory) != everything(sound)
        name = str(path.relative_to(sound))
        if (name, harm) != ("2.manifest.json", "delete"):  # Which leaves it unverified.
            yield name, directory


def test_the_matrix_has_every_kind_of_file(sound, tmp_path):
    files = {kind(name) for name, _ in harmed(sound, tmp_path / "files", "truncate")}
    folders = {name for name, _ in harmed(sound, tmp_path / "folders", "empty folder")}
    assert {"2.manifest.json", "2/facts/metadata", "2/state/_METADATA", "2/state/ocdbt.process_0/d/data"} < files
    assert {"2", "2/facts", "2/state", "2/state/ocdbt.process_0/d"} < folders


@pytest.mark.parametrize("harm", HARMS)
def test_the_latest_is_set_aside_when_damaged_and_the_one_before_it_is_used(sound, tmp_path, harm):
    for name, directory in harmed(sound, tmp_path, harm):
        before = everything(directory)
        with ft.Checkpoints(directory) as checkpoints:
            with pytest.warns(UserWarning, match=says(str(directory / "2"), "IS DAMAGED", "'2.corrupt'")) as caught:
                restored = checkpoints.restore(like=like())
            assert (restored.data, restored.path.name, len(caught)) == ({"position": 1}, "1", 1), name
            assert bits(restored.state) == bits(updated(1)[2])
            assert names(checkpoints) == ["1"]
        after = {path.replace("2.corrupt", "2"): content for path, content in everything(directory).items()}
        assert after == before, "something was deleted"


@pytest.mark.parametrize("harm", HARMS)
def test_one_that_is_asked_for_is_an_error_when_damaged_and_stays_where_it_is(sound, tmp_path, harm):
    for name, directory in harmed(sound, tmp_path, harm):
        before = everything(directory)
        inner = name.removeprefix("2/")
        what = f"'{inner}/" if harm.endswith("folder") else f"'{inner}'"
        if inner == "2":
            what = "its folder is missing" if harm == "delete folder" else "is missing"
        for step in (2, directory / "2"):
            with pytest.raises(CheckpointError, match=says(f"{directory / '2'} is damaged", what)):
                ft.Checkpoints(directory).restore(like=like(), step=step)
        assert everything(directory) == before


def test_every_file_that_is_damaged_is_named(sound, tmp_path):
    directory = copied(sound, tmp_path)
    (directory / "2" / "facts" / "metadata").unlink()
    flip(directory / "2" / "state" / "_METADATA")
    assert manifest.damages(directory / "2") == [
        "'facts/metadata' is missing",
        "'state/_METADATA' is not what was written",
    ]
    assert manifest.damages(directory / "1") == []


def test_a_sound_one_can_be_asked_for_beside_a_damaged_one(sound, tmp_path):
    directory = copied(sound, tmp_path)
    flip(directory / "2" / "facts" / "metadata")
    for step in (1, directory / "1"):
        assert ft.Checkpoints(directory).restore(like=like(), step=step).data == {"position": 1}


def test_a_folder_that_is_gone_is_missed_as_its_manifest_is_there(sound, tmp_path):
    directory = copied(sound, tmp_path)
    shutil.rmtree(directory / "2")
    with pytest.raises(CheckpointError, match=says("damaged: its folder is missing", "restore another of 1")):
        ft.Checkpoints(directory).restore(like=like(), step=2)
    with pytest.warns(UserWarning, match=says("IS DAMAGED", "its folder is missing")):
        assert ft.Checkpoints(directory).restore(like=like()).path == directory / "1"
    assert (directory / "2.corrupt.manifest.json").exists()


def test_no_bit_of_a_manifest_can_flip_unseen(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "weights").write_bytes(b"1234")
    manifest.write(tmp_path / "1", SUMMARY)
    path, written = manifest.path_of(tmp_path / "1"), manifest.load(tmp_path / "1")
    for position in range(8 * path.stat().st_size):
        flipped = bytearray(path.read_bytes())
        flipped[position // 8] ^= 1 << position % 8
        changed = tmp_path / "2.manifest.json"
        changed.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            assert manifest.load(tmp_path / "2") == written


def with_checksum(body):
    return json.dumps({"body": body, "crc32": zlib.crc32(body.encode())}).encode()


NO_MANIFESTS = [
    b"", b"[]", b"{}", b"null", b"\xff", b'{"body": 1, "crc32": 1}', b'{"body": "[]"}', b"[" * 100_000,
    with_checksum("[]"), with_checksum("{}"), with_checksum("[" * 100_000), with_checksum(json.dumps({"files": {}})),
    with_checksum(json.dumps(SUMMARY | {"files": {"facts": 3}})),
    with_checksum(json.dumps(SUMMARY | {"files": {}, "metrics": {"loss": []}})),
]  # fmt: skip


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_damage(sound, tmp_path, content):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").write_bytes(content)
    with pytest.raises(CheckpointError, match=says("damaged: '2.manifest.json' is not what was written")):
        ft.Checkpoints(directory).restore(like=like(), step=2)


def test_without_a_manifest_it_is_used_with_a_warning_where_none_has_one_or_it_is_asked_for(sound, tmp_path):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    with pytest.warns(UserWarning, match=says("2 has no manifest", "not used", "verified is 1", "step=")) as caught:
        assert ft.Checkpoints(directory).restore(like=like()).data == {"position": 1}
    assert caught[0].filename == __file__
    manifest.path_of(directory / "1").unlink()
    for step in (None, 2):
        with pytest.warns(UserWarning, match=says(str(directory / "2"), "is unverified")):
            restored = ft.Checkpoints(directory).restore(like=like(), step=step)
        assert restored.data == {"position": 2}
        assert bits(restored.state) == bits(updated(2)[2])


def test_one_that_was_not_verified_is_not_in_the_way_of_those_that_are_saved_after_it(sound, tmp_path):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    _, _, state = updated(2)
    with ft.Checkpoints(directory, keep_last=2) as checkpoints:
        checkpoints.save(state, data={"position": 2})
        checkpoints.wait()
        assert names(checkpoints) == ["1", "2", "2~2"]
        checkpoints.save(at(3, state))
        checkpoints.wait()
        assert names(checkpoints) == ["2~2", "3"]


def test_without_a_manifest_and_unreadable_it_is_damaged(sound, tmp_path):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    empty(directory / "2" / "state")
    with pytest.raises(CheckpointError, match=says("2 is damaged: it has no manifest, and cannot be read")):
        ft.Checkpoints(directory).restore(like=like(), step=2)
    shutil.rmtree(directory / "1")
    manifest.path_of(directory / "1").unlink()
    with (
        pytest.warns(UserWarning, match="IS DAMAGED"),
        pytest.raises(CheckpointError, match=says("is sound", "2: it has no manifest, and cannot be read")),
    ):
        ft.Checkpoints(directory).restore(like=like())
    assert (directory / "2.corrupt").is_dir()


def test_where_none_is_sound_that_is_an_error_until_the_run_is_started_anew(sound, tmp_path):
    directory = copied(sound, tmp_path)
    for step in "12":
        flip(directory / step / "facts" / "metadata")
    before = everything(directory)
    with (
        pytest.warns(UserWarning, match="IS DAMAGED") as caught,
        pytest.raises(CheckpointError, match=says("no checkpoint in", "\n  2: '", "\n  1: '", "fresh=True")),
    ):
        ft.Checkpoints(directory).restore(like=like())
    assert all(str(directory / step) in str(warning.message) for step, warning in zip("21", caught, strict=True))
    kept = {f"{step}.corrupt{suffix}" for step in "12" for suffix in ("", ".manifest.json")}
    assert set(os.listdir(directory)) == kept | {".lock"}
    with pytest.raises(CheckpointError, match=says("no checkpoint in", "\n  1.corrupt\n  2.corrupt\n")):
        ft.Checkpoints(directory).restore(like=like())
    with ft.Checkpoints(directory) as checkpoints:
        assert checkpoints.start_anew() == directory / "before-1"
        assert checkpoints.start_anew() is None
        assert checkpoints.restore(like=like()) is None
        checkpoints.save(updated(1)[2])
    aside = {path.replace(".corrupt", ""): content for path, content in everything(directory / "before-1").items()}
    assert aside | {".lock": b""} == before, "something was deleted"
    with ft.Checkpoints(directory) as checkpoints:
        assert checkpoints.start_anew() == directory / "before-2"
    assert set(os.listdir(directory)) == {".lock", "before-1", "before-2"}


def test_a_manifest_without_a_word_that_can_be_read_and_without_a_folder_is_still_one_that_was(tmp_path):
    (tmp_path / "7.manifest.json").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match=says("no checkpoint in", "\n  7\n")):
        ft.Checkpoints(tmp_path).restore(like=like())


def test_damaged_ones_of_one_name_are_kept_side_by_side(sound, tmp_path):
    directory = copied(sound, tmp_path)
    for aside in ("2.corrupt", "2.corrupt2", "2.corrupt3"):
        shutil.copytree(sound / "2", directory / "2", dirs_exist_ok=True)
        shutil.copy(manifest.path_of(sound / "2"), directory)
        flip(directory / "2" / "facts" / "metadata")
        with pytest.warns(UserWarning, match=says(repr(aside))):
            ft.Checkpoints(directory).restore(like=like())
        assert (directory / aside / "facts").is_dir()


def test_what_orbax_wrote_and_is_none_of_ours_is_told_and_left_alone(sound, tmp_path):
    """Another program's, or one that has lost both its manifest and its contents."""
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    (directory / "2" / "facts" / "metadata").unlink()
    before = everything(directory)
    with pytest.warns(UserWarning, match=says("'2' is called like a checkpoint", "it is left alone")):
        assert ft.Checkpoints(directory).restore(like=like()).data == {"position": 1}
    assert everything(directory) == before
    shutil.rmtree(directory / "1")
    manifest.path_of(directory / "1").unlink()
    with pytest.warns(UserWarning, match=says("'2' is called like a checkpoint", "it is left alone")):
        assert ft.Checkpoints(directory).restore(like=like()) is None


def test_an_empty_or_missing_folder_has_nothing_to_restore(tmp_path):
    assert ft.Checkpoints(tmp_path).restore(like=like()) is None
    assert ft.Checkpoints(tmp_path / "new").restore(like=like()) is None
    assert not (tmp_path / "new").exists()
