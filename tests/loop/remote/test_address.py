"""Which addresses there are, and what is said of one that is none."""

import pathlib

import pytest
from trees import says

from functrain.errors import StorageError
from functrain.loop.remote.address import Address, cache_of, is_address


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("s3://bucket/runs//digits/", ("s3", "bucket", "runs/digits")),
        ("gs://bucket", ("gs", "bucket", "")),
        ("AZ://container/a b", ("az", "container", "a b")),
        ("memory://here", ("memory", "here", "")),
        ("file:///home/me/runs", ("file", "", "home/me/runs")),
    ],
)
def test_an_address_is_taken_apart_and_put_together(address, parts):
    assert Address.of(address) == parts
    assert Address.of(str(Address.of(address))) == parts


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s4://bucket/digits", ["s4:// is no storage that is known", "s3://, gs://", "did you mean 's3'?"]),
        ("gcs://bucket/digits", ["did you mean 'gs'?"]),
        ("abfss://container/digits", ["did you mean 'az'?"]),
        ("https://example.org/digits", ["write an address such as 's3://bucket/digits', or a folder"]),
        ("s3:/bucket/digits", ["has not two slashes", "write s3://bucket/digits", "no Path"]),
        ("s3:///digits", ["names no place", "write s3://bucket/digits"]),
        ("file://home/me", ["names no place", "write file:///home/me/digits"]),
        ("s3://bucket/../other", ["has '.' or '..' in it"]),
        ("s3://bucket/digits?versionId=1", ["has no '?'", "write s3://bucket/digits"]),
    ],
)
def test_what_is_no_address_is_told_with_what_to_write(address, told):
    assert is_address(address)
    with pytest.raises(StorageError, match=says(*told)):
        Address.of(address)


def test_who_writes_a_secret_into_an_address_does_not_see_it_again():
    with pytest.raises(StorageError, match=says("give credentials in the environment")) as raised:
        Address.of("s3://key:s3cret@bucket/digits")
    assert "s3cret" not in str(raised.value)


def test_a_folder_is_no_address():
    for folder in ("runs/digits", "/runs/s3:/digits", pathlib.Path("runs"), "layers=[64,64]", "C:run"):
        assert not is_address(folder)
    assert is_address(pathlib.Path("s3://bucket/digits"))


def test_each_address_has_a_folder_of_its_own_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = cache_of(Address.of("s3://bucket/a/b")), cache_of(Address.of("s3://bucket/a-b"))
    assert one != other
    assert {one.parent, other.parent} == {tmp_path / "functrain"}
    assert one == cache_of(Address.of("s3://bucket/a/b/"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_of(Address.of("gs://b/c")).parent == tmp_path / "home" / ".cache" / "functrain"
