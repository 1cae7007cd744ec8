"""Addresses of remote storage: which they are, and what is wrong with one that is none."""

import difflib
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from functrain.errors import StorageError

SCHEMES = ("s3", "gs", "az", "memory", "file")
_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/.*", re.DOTALL)
_OTHERS = {
    "s3a": "s3",
    "s3n": "s3",
    "gcs": "gs",
    "azure": "az",
    "abfs": "az",
    "abfss": "az",
    "adl": "az",
    "mem": "memory",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Address(NamedTuple):
    """Where objects lie: `scheme://bucket/prefix`.

    Attributes:
      scheme: one of `SCHEMES`.
      bucket: of S3 and Google, or a container of Azure; "" of files.
      prefix: what the names of all objects begin with, without slashes at its ends.
    """

    scheme: str
    bucket: str
    prefix: str

    @classmethod
    def of(cls, address: str) -> "Address":
        """Takes an address apart.

        >>> Address.of("s3://bucket/runs/digits/")
        Address(scheme='s3', bucket='bucket', prefix='runs/digits')

        Raises:
          StorageError: it is none.
        """
        given, _, rest = address.partition(":")
        scheme = given.lower()
        if scheme not in SCHEMES:
            near = _OTHERS.get(scheme) or next(iter(difflib.get_close_matches(scheme, SCHEMES, 1, 0.5)), None)
            hint = f"did you mean {near!r}?" if near else "write an address such as 's3://bucket/digits', or a folder"
            known = ", ".join(f"{each}://" for each in SCHEMES)
            raise StorageError(f"{given}:// is no storage that is known, there are {known}; {hint}")
        example = "file:///home/me/digits" if scheme == "file" else f"{scheme}://bucket/digits"
        if any(mark in rest for mark in "?#@") or _CONTROL.search(rest):
            raise StorageError(
                f"an address has no '?', '#', '@' and no control characters: write {example}, and give credentials in"
                " the environment"
            )
        if not rest.startswith("//"):
            raise StorageError(f"{address!r} has not two slashes: write {example}, as a str and no Path")
        bucket, _, path = rest[2:].partition("/")
        segments = [segment for segment in path.split("/") if segment]
        if {".", ".."} & {*segments}:
            raise StorageError(f"{address!r} has '.' or '..' in it: write the address without them, {example}")
        if bool(bucket) == (scheme == "file") or (scheme == "file" and not segments):
            raise StorageError(f"{address!r} names no place: write {example}")
        return cls(scheme, bucket, "/".join(segments))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def __truediv__(self, name: str) -> str:
        """The address of an object."""
        return f"{self}/{name}" if name else str(self)


def is_address(place: str | os.PathLike[str]) -> bool:
    """Whether something is meant as an address rather than as a folder.

    >>> is_address("s3://bucket/digits"), is_address("runs/digits"), is_address("s4:/bucket")
    (True, False, True)
    """
    return _ADDRESS.fullmatch(os.fspath(place)) is not None  # A Path has made one slash of two.


def cache_of(address: Address) -> Path:
    """The folder of this machine for what lies at an address, in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    readable = re.sub(r"[^a-zA-Z0-9-]+", "-", str(address))[-40:].strip("-")
    return (
        Path(root).expanduser() / "functrain" / f"{readable}-{hashlib.sha256(str(address).encode()).hexdigest()[:12]}"
    )
