"""Objects at an address: what is put is there, and what can't be done is told."""

import os
import subprocess
import sys

import pytest
from s3 import Server, environment
from trees import says

import functrain as ft
from functrain.errors import StorageError
from functrain.loop.remote.store import Store

QUICK = {"timeout": 1.0, "patience": 1.5}


@pytest.fixture(params=["s3", "memory", "file"])
def address(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return {"memory": f"memory://{tmp_path.name}/digits", "file": (tmp_path / "it").as_uri()}[request.param]


def test_objects_are_put_got_listed_copied_and_deleted(address, tmp_path):
    store, name = Store(address), "120~3/a+b [4].x"
    file = tmp_path / "file"
    file.write_bytes(b"of a file")
    store.put(name, b"content")
    store.put("1200/x", file)
    store.put("empty", b"")
    assert (store.get(name), store.get("1200/x"), store.get("empty")) == (b"content", b"of a file", b"")
    assert {name: stat.size for name, stat in store.listed().items()} == {name: 7, "1200/x": 9, "empty": 0}
    assert [*store.listed("120~3")] == [name]
    assert store.listed("120") == {}
    assert store.listed("120~3")[name].tag == store.head(name).tag
    store.copy(name, "copied/x")
    store.fetch("copied/x", tmp_path / "to" / "it", 7)
    assert (tmp_path / "to" / "it").read_bytes() == b"content"
    store.delete([name, "was/never/there"])
    assert sorted(store.listed()) == ["1200/x", "copied/x", "empty"]
    assert store.head(name) is None
    for read in (store.get, lambda name: store.copy(name, "x"), lambda name: [*store.pieces(name, 3)]):
        with pytest.raises(FileNotFoundError, match=says("there is no", name)):
            read(name)


def test_an_address_where_nothing_was_put_has_no_objects_and_no_neighbours(address):
    Store(f"{address}-other").put("x", b"")
    store = Store(address)
    assert store.listed() == {}
    store.put("x", b"1")
    assert Store(f"{address}-other").get("x") == b""
    assert Store(address).get("x") == b"1"


def test_what_is_put_on_conditions_replaces_nothing_else(address):
    store = Store(address)
    tag = store.put("manifest", b"one", create=True)
    assert store.put("manifest", b"one", create=True) == tag  # It is what is there.
    with pytest.raises(FileExistsError, match=says("there is another", "/manifest already")):
        store.put("manifest", b"other", create=True)
    newer = store.put("manifest", b"two", replaces=tag)
    with pytest.raises(FileExistsError):
        store.put("manifest", b"three", replaces=tag)
    assert store.get("manifest") == b"two"
    store.put("manifest", b"three", replaces=newer)


def test_a_file_of_many_pieces_comes_back_as_it_was(s3, tmp_path):
    content = os.urandom(20_000_003)
    (tmp_path / "file").write_bytes(content)
    store = Store(s3)
    store.put("large", tmp_path / "file")
    store.fetch("large", tmp_path / "got", store.head("large").size)
    assert (tmp_path / "got").read_bytes() == content


@pytest.mark.parametrize("fault", ["503", "cut", "lose"])
def test_a_server_that_fails_every_third_request_loses_nothing(s3, proxy, tmp_path, fault):
    (tmp_path / "file").write_bytes(content := os.urandom(9_000_000))
    proxy.fault = lambda number, method, path: fault if number % 3 == 0 else "pass"
    store = Store(s3, timeout=2.0, patience=20.0)
    for number in range(3):
        store.put(f"{number}/manifest", b"%d" % number, create=True)
    store.put("large", tmp_path / "file")
    store.fetch("large", tmp_path / "got", len(content))
    assert (tmp_path / "got").read_bytes() == content
    assert sorted(store.listed()) == ["0/manifest", "1/manifest", "2/manifest", "large"]
    tag = store.put("lease", b"0")
    for number in range(3):
        tag = store.put("lease", b"renewed %d" % number, replaces=tag)
    store.delete(["lease", "large"])
    assert len(store.listed()) == 3


def test_a_server_that_hangs_is_told_when_the_time_is_up(s3, proxy):
    proxy.fault = lambda number, method, path: "hang"
    store = Store(s3, timeout=0.2, patience=0.4)
    for attempt in (lambda: store.put("x", b""), lambda: store.put("x", b"", create=True), store.listed):
        with pytest.raises(StorageError, match=says("could not", s3, "no answer in time", "0.4 s", "try again")):
            attempt()


def test_a_server_that_is_not_there_is_told(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=says("could not list", "127.0.0.1:1", "AWS_ENDPOINT_URL")):
        Store(s3, **QUICK).listed()


def test_a_missing_bucket_is_told_and_is_no_missing_object(s3):
    store = Store("s3://nowhere/digits", **QUICK)
    told = says("there is no bucket 'nowhere'", "NoSuchBucket", "make it, or mend the address 's3://nowhere/digits'")
    for attempt in (store.listed, lambda: store.get("x"), lambda: store.put("x", b""), lambda: store.delete(["x"])):
        with pytest.raises(StorageError, match=told):
            attempt()


def test_wrong_credentials_are_told_and_not_shown(monkeypatch):
    server = Server(INITIAL_NO_AUTH_ACTION_COUNT="1")
    try:
        server.make("locked")
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        store = Store("s3://locked/digits", **QUICK)
        for attempt in (store.listed, lambda: store.get("x"), lambda: store.put("x", b"")):
            with pytest.raises(
                StorageError, match=says("credentials are refused", "403", "AWS_SECRET_ACCESS_KEY")
            ) as told:
                attempt()
            assert "not-to-be-told" not in str(told.value)
            assert told.value.__cause__ is None
            assert told.value.__suppress_context__
    finally:
        server.stop()


def test_http_that_is_not_allowed_is_told(s3, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageError, match=says("no https", "AWS_ALLOW_HTTP=true")):
        Store(s3, **QUICK).listed()


def test_azure_without_an_account_is_told(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StorageError, match=says("whose account", "set AZURE_STORAGE_ACCOUNT_NAME")):
        Store("az://container/digits")


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = Store((tmp_path / "file").as_uri())
    with pytest.raises(StorageError, match=says("could not write", str(tmp_path / "file"))):
        store.put("x/y", b"")


def test_without_obstore_it_is_said_what_to_install():
    program = "import sys; sys.modules['obstore'] = None; import functrain.loop.remote.store as s; s.Store('s3://b/x')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "StorageError: remote storage needs obstore" in ended.stderr
    assert "pip install 'functrain[remote]'" in ended.stderr


def test_what_it_raises_is_an_error_of_functrain_and_of_the_system():
    assert issubclass(ft.StorageError, (ft.FunctrainError, OSError))
