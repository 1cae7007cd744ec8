"""The source of a run, kept beside it: the files that git knows, and what was changed in them since the commit."""

import gzip
import hashlib
import io
import os
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from functrain.errors import RecordError
from functrain.loop.record.machine import git
from functrain.loop.record.masking import Masks
from functrain.tree.text import bytes_in_words, listed

_MOST = 5 << 20  # Bytes of a file; source has less.
_MOST_OF_ALL = 100 << 20
_GONE = "no file"
# Files that may hold secrets, by their names.
_SECRET = (
    *(".env*", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".htpasswd", "credentials", "credentials.json"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx"),
    *("client_secret*.json", "secrets.json", "secrets.yaml", "secrets.yml", "secrets.toml"),
)


class Source(NamedTuple):
    """Source as it is kept.

    Attributes:
      archive: a tar.gz of it, the same bytes for the same source.
      files: how many there are.
      left_out: why a file is not in it, by name.
      masked: the files in which something secret was masked.
      digest: of all of it.
      untracked: files that git does not know, and that are not in it.
    """

    archive: bytes
    files: int
    left_out: dict[str, str]
    masked: list[str]
    digest: str
    untracked: list[str]

    def told(self, folder: str) -> list[str]:
        """What there is to warn of."""
        lacks = f"the record has no {listed(self.untracked)} of {folder}, which git does not know: git add"
        return [f"{lacks} {'it' if len(self.untracked) == 1 else 'them'}"] if self.untracked else []


def source_of(folder: Path, masks: Masks) -> Source:
    """Takes the files that git knows in a folder, as they are now, and the patch from its commit to them.

    Raises:
      RecordError: there is no such folder, or no git that knows it.
    """
    if not folder.is_dir():
        raise RecordError(f"Record(source={str(folder)!r}): there is no such folder; give the one of your code, 'src'")
    listing = git(folder, "ls-files", "-z", "--cached", "--", ".")
    if listing is None:
        raise RecordError(
            f"Record(source={str(folder)!r}): git knows nothing of it, or is not installed; run git init, or leave out"
            " source="
        )
    untracked = git(folder, "ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "*.toml", "*.yaml")
    files: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for name in sorted({*_names(listing)}):
        if (problem := _problem(folder, name, sum(map(len, files.values())))) is None:
            files[name] = (folder / name).read_bytes()
        else:
            left_out[name] = problem
    # A new repository has no commit; all is in the files then.
    without = [f":(exclude,literal){name}" for name, problem in left_out.items() if problem != _GONE]
    without += [f":(exclude,glob,icase)**/{name}" for name in _SECRET]  # That of one that was removed has all of it.
    patch = git(folder, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--", ".", *without)
    masked = {name: _masked(content, masks) for name, content in files.items()}
    changed = [name for name, content in files.items() if masked[name] != content]
    named = {f"source/{name}": content for name, content in masked.items()}
    named |= {"uncommitted.patch": _masked(patch, masks)} if patch else {}
    digest = hashlib.sha256(b"".join(f"{len(one)} {name}\0".encode() + one for name, one in named.items())).hexdigest()
    return Source(_archive(named), len(files), left_out, changed, digest, _names(untracked or b""))


def _names(listing: bytes) -> list[str]:
    return [os.fsdecode(name) for name in listing.split(b"\0") if name]


def _problem(folder: Path, name: str, taken: int) -> str | None:
    """Why a file is left out."""
    path = folder / name
    if any(fnmatch(path.name.lower(), each) for each in _SECRET):
        return "may hold secrets"
    if path.is_symlink() or not path.is_file():
        return _GONE
    if (size := path.stat().st_size) > _MOST or taken + size > _MOST_OF_ALL:
        return bytes_in_words(size)
    return None


def _masked(content: bytes, masks: Masks) -> bytes:
    # Of what is no UTF-8 the bytes that are not stay as they are.
    return masks.program(content.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
