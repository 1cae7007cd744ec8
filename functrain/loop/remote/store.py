"""Objects at an address, by name: put, get, listed and deleted, within a time and tried again."""

import contextlib
import datetime
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from functrain.errors import StorageError
from functrain.loop.remote.address import Address
from functrain.loop.remote.problems import is_of_bucket, is_passing, told

_Done = TypeVar("_Done")
_PIECE = 8 << 20  # Bytes of a request: so small that each has time enough.
_AT_ONCE = 4  # Objects, and pieces of each: so many are in memory.
_CLIENT = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes", "proxy_ca_certificate")
_PAUSES = (0.1, 15.0)  # Seconds before a request is made again: at first, and at most.


class Stat(NamedTuple):
    """What a listing says of an object: bytes, the tag of its content, and when it was put, in seconds since 1970."""

    size: int
    tag: str | None
    time: float


class Store:
    """Objects at an address, by name; every request has a time limit, and is made again where that may help.

    Credentials and servers come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
    `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`; of Google and Azure likewise), and no message shows them. An object is there
    whole or not at all. Threads may share a store.

    >>> store = Store("memory://doctest/digits")
    >>> tag = store.put("log.jsonl", b"one row")
    >>> store.get("log.jsonl"), [*store.listed()]
    (b'one row', ['log.jsonl'])
    >>> store.delete(["log.jsonl"])

    Args:
      address: `s3://bucket/prefix`, `gs://`, `az://container/prefix`, `file:///folder`, or `memory://name`, of
        which each is there once in a process.
      timeout: seconds for one request, of at most 8 MiB.
      patience: seconds for which a request that fails is made again.

    Raises:
      StorageError: the address is none, or obstore is not installed. So does every method, where storage can't be
        reached, or does not do what it is asked for.
    """

    def __init__(self, address: str, *, timeout: float = 60.0, patience: float = 180.0) -> None:
        self.address = Address.of(address)
        self._patience = patience
        self._objects = _opened(self.address, timeout, patience)
        self._prefix = f"{self.address.prefix}/" if self.address.prefix else ""

    def put(self, name: str, content: bytes | Path, *, create: bool = False, replaces: str | None = None) -> str:
        """Puts an object, of bytes or of a file, in place of what is there.

        Args:
          name: below the address, such as "120/facts/metadata".
          content: the bytes, or a file with them; a large one is sent in pieces, several at once.
          create: only where there is no object of this name, or this very one.
          replaces: only where the object of this name has this tag. (Of files it is looked up before; elsewhere the two
            are one operation.)

        Returns:
          The tag of what is there now.

        Raises:
          FileExistsError: there is another object than `create` or `replaces` allow.
        """
        if not create and replaces is None:
            return self._tag(self._tried("write", name, lambda: self._put(name, content)))
        whole = content.read_bytes() if isinstance(content, Path) else content
        mode: Any = "create" if create else {"e_tag": replaces}
        if self.address.scheme == "file" and not create:
            self._check_tag(name, replaces)
            mode = None
        try:
            return self._tag(self._tried("write", name, lambda: self._put(name, whole, mode), insist=True))
        except FileExistsError:
            # A request that was carried out and whose answer was lost was made again.
            with contextlib.suppress(FileNotFoundError):
                if self.get(name) == whole and (found := self.head(name)) is not None and found.tag is not None:
                    return found.tag
            raise

    def get(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
          FileNotFoundError: there is none.
        """
        return bytes(self._tried("read", name, lambda: self._obstore.get(self._objects, self._path(name)).bytes()))

    def fetch(self, name: str, file: Path, size: int) -> None:
        """Writes an object of so many bytes to a file, piece by piece; the folders of the file are made.

        Raises:
          FileNotFoundError: there is none.
          OSError: the file can't be written; of a `StorageError` the object can't be read.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb", buffering=0) as output:
            for piece in self.pieces(name, size):
                rest = memoryview(piece)
                while rest:
                    rest = rest[output.write(rest) :]

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of an object of so many, in pieces.

        Raises:
          FileNotFoundError: there is none.
        """
        if size == 0:
            yield self.get(name)
        for start in range(0, size, _PIECE):
            piece = functools.partial(
                self._obstore.get_range, self._objects, self._path(name), start=start, end=min(size, start + _PIECE)
            )
            yield bytes(self._tried("read", name, piece))

    def head(self, name: str) -> Stat | None:
        """What is known of an object; None if there is none."""
        try:
            return _stat(self._tried("read", name, lambda: self._obstore.head(self._objects, self._path(name))))
        except FileNotFoundError:
            return None

    def listed(self, prefix: str = "") -> dict[str, Stat]:
        """All objects by name, or those in one folder of them.

        Args:
          prefix: whole segments: "120" has "120/facts/metadata", and not "1200/facts/metadata".
        """
        path = self._path(prefix).rstrip("/")

        def found() -> dict[str, Stat]:
            chunks = self._obstore.list(self._objects, path or None, chunk_size=1000)
            return {meta["path"].removeprefix(self._prefix): _stat(meta) for chunk in chunks for meta in chunk}

        return self._tried("list", prefix, found)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; one that is not there is no error."""
        paths = [self._path(name) for name in names]
        try:
            if paths:
                self._tried("delete", paths[0].removeprefix(self._prefix), lambda: self._delete(paths))
        except FileNotFoundError:
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._tried("delete", path.removeprefix(self._prefix), functools.partial(self._delete, [path]))

    def copy(self, name: str, to: str) -> None:
        """Copies an object within the storage.

        Raises:
          FileNotFoundError: there is none.
        """
        self._tried("copy", name, lambda: self._obstore.copy(self._objects, self._path(name), self._path(to)))

    def in_parallel(self, call: Callable[[str], _Done], names: Iterable[str]) -> list[_Done]:
        """What a function does for each name, for several at once.

        Raises:
          Exception: the first that it raised; those that had not begun are left out.
        """
        with ThreadPoolExecutor(_AT_ONCE, "functrain-remote") as threads:
            todo = [threads.submit(call, name) for name in names]
            try:
                return [each.result() for each in todo]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    @property
    def _obstore(self) -> Any:
        return _obstore()

    def _put(self, name: str, content: bytes | Path, mode: Any = None) -> Any:
        options = (
            {"mode": mode, "use_multipart": False} if mode else {"chunk_size": _PIECE, "max_concurrency": _AT_ONCE}
        )
        return self._obstore.put(self._objects, self._path(name), content, **options)

    def _check_tag(self, name: str, tag: str | None) -> None:
        if (found := self.head(name)) is None or found.tag != tag:
            raise FileExistsError(f"there is another {self.address / name} already")

    def _delete(self, paths: list[str]) -> None:
        self._obstore.delete(self._objects, paths)

    def _tag(self, result: Any) -> str:
        return str(result["e_tag"])

    def _path(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _tried(self, verb: str, name: str, call: Callable[[], _Done], *, insist: bool = False) -> _Done:
        """What a call returns; its errors in our words. obstore makes again all requests but those with conditions."""
        until, pause = time.monotonic() + self._patience, _PAUSES[0]
        while True:
            try:
                return call()
            except Exception as error:
                if type(error).__name__ in ("AlreadyExistsError", "PreconditionError"):
                    raise FileExistsError(f"there is another {self.address / name} already") from None
                if isinstance(error, FileNotFoundError) and not is_of_bucket(error):
                    raise FileNotFoundError(f"there is no {self.address / name}") from None
                if not insist or not is_passing(error) or time.monotonic() + pause > until:
                    # What obstore shows of an error may hold what is secret.
                    raise told(error, f"{verb} {self.address / name!r}", self.address, self._patience) from None
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])


def _stat(meta: Any) -> Stat:
    return Stat(int(meta["size"]), meta["e_tag"], meta["last_modified"].timestamp())


def _opened(address: Address, timeout: float, patience: float) -> Any:
    """The storage of obstore in which an address lies."""
    store = _obstore().store
    if address.scheme == "memory":
        return _memory(address.bucket)
    if address.scheme == "file":
        return store.LocalStore("/")
    client: Any = {"timeout": f"{timeout * 1000:.0f}ms", "connect_timeout": f"{min(timeout, 10) * 1000:.0f}ms"}
    # What is given beside the environment is in its place.
    client |= {name: value for name in _CLIENT if (value := os.environ.get(f"AWS_{name.upper()}"))}
    client["allow_http"] = str(client.get("allow_http", "")).lower() in ("1", "true", "yes", "on")
    retries: Any = {
        "max_retries": 1000,
        "retry_timeout": datetime.timedelta(seconds=patience),
        "backoff": {
            "init_backoff": datetime.timedelta(seconds=_PAUSES[0]),
            "max_backoff": datetime.timedelta(seconds=_PAUSES[1]),
            "base": 2,
        },
    }
    make = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[address.scheme]
    try:
        return make(address.bucket, client_options=client, retry_config=retries)
    except Exception as error:
        raise told(error, f"use {str(address)!r}", address, patience) from None


@functools.cache
def _memory(name: str) -> Any:
    """A storage of this process."""
    return _obstore().store.MemoryStore()


@functools.cache
def _obstore() -> Any:
    try:
        import obstore.store
    except ImportError as error:
        raise StorageError(f"remote storage needs obstore ({error}): pip install 'functrain[remote]'") from None
    return obstore
