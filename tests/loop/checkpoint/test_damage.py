"""A damaged checkpoint is never used, and is told."""

import contextlib
import os
import pathlib
import re
import shutil

import pytest
from states import copied, everything, flip, like, names, updated
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
    manifest.publish(tmp_path / "1", {"batches": 3, "metrics": {"valid/loss": 0.5}})
    path, written = manifest.path_of(tmp_path / "1"), manifest.load(tmp_path / "1")
    for position in range(8 * path.stat().st_size):
        flipped = bytearray(path.read_bytes())
        flipped[position // 8] ^= 1 << position % 8
        changed = tmp_path / "2.manifest.json"
        changed.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            assert manifest.load(tmp_path / "2") == written


NO_MANIFESTS = [b"", b"[]", b"{}", b"null", b"\xff", b'{"body": 1, "crc32": 1}', b'{"body": "[]"}']


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_damage(sound, tmp_path, content):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").write_bytes(content)
    with pytest.raises(CheckpointError, match=says("damaged: '2.manifest.json' is not what was written")):
        ft.Checkpoints(directory).restore(like=like(), step=2)


def test_without_a_manifest_it_is_used_with_a_warning(sound, tmp_path):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    for step in (None, 2):
        with pytest.warns(UserWarning, match=says(str(directory / "2"), "is unverified")):
            restored = ft.Checkpoints(directory).restore(like=like(), step=step)
        assert restored.data == {"position": 2}
        assert bits(restored.state) == bits(updated(2)[2])


@pytest.mark.parametrize("folder", ["facts", "state", "."])
def test_without_a_manifest_and_unreadable_it_is_set_aside(sound, tmp_path, folder):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    empty(directory / "2" / folder)
    with pytest.raises(CheckpointError, match=says("damaged")):
        ft.Checkpoints(directory).restore(like=like(), step=2)
    with pytest.warns(UserWarning, match="IS DAMAGED"):
        assert ft.Checkpoints(directory).restore(like=like()).path == directory / "1"
    assert (directory / "2.corrupt").is_dir()


def test_where_all_are_damaged_nothing_is_restored_and_each_is_told(sound, tmp_path):
    directory = copied(sound, tmp_path)
    for step in "12":
        flip(directory / step / "facts" / "metadata")
    with pytest.warns(UserWarning, match="IS DAMAGED") as caught:
        assert ft.Checkpoints(directory).restore(like=like()) is None
    assert all(str(directory / step) in str(warning.message) for step, warning in zip("21", caught, strict=True))
    kept = {f"{step}.corrupt{suffix}" for step in "12" for suffix in ("", ".manifest.json")}
    assert set(os.listdir(directory)) == kept | {".lock"}


def test_damaged_ones_of_one_name_are_kept_side_by_side(sound, tmp_path):
    directory = copied(sound, tmp_path)
    for aside in ("2.corrupt", "2.corrupt2", "2.corrupt3"):
        shutil.copytree(sound / "2", directory / "2", dirs_exist_ok=True)
        shutil.copy(manifest.path_of(sound / "2"), directory)
        flip(directory / "2" / "facts" / "metadata")
        with pytest.warns(UserWarning, match=says(repr(aside))):
            ft.Checkpoints(directory).restore(like=like())
        assert (directory / aside / "facts").is_dir()


def test_an_empty_or_missing_folder_has_nothing_to_restore(tmp_path):
    assert ft.Checkpoints(tmp_path).restore(like=like()) is None
    assert ft.Checkpoints(tmp_path / "new").restore(like=like()) is None
    assert not (tmp_path / "new").exists()
