"""Checkpoints at an address: objects named as the files of a folder are, of which the manifest is put last.

`digits/120/facts/metadata` and the like, and `digits/120.manifest.json`: a checkpoint is there when its manifest is.
While one is sent or removed, what it consists of is written down in `.functrain/120.draft.json`, so that whoever writes
there next can remove what a killed process left, and nothing else.
"""

import itertools
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from functrain.errors import CheckpointError, StorageError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.contents import contents_file
from functrain.loop.checkpoint.durable import write_whole
from functrain.loop.checkpoint.folder import Name
from functrain.loop.checkpoint.staging import OWN
from functrain.loop.remote.store import Stat, Store

_DRAFT = ".draft.json"
_LOOKS = 100


class Mirror:
    """The checkpoints at an address, and the objects that they consist of.

    Attributes:
      store: the objects.
      known: the manifest of each checkpoint by its name, as bytes, oldest first, when it was last looked.
      taken: the first segment of the name of everything that is there.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.known: dict[str, bytes] = {}
        self.taken: set[str] = set()
        self._listing: dict[str, Stat] = {}

    def look(self) -> dict[str, Stat]:
        """Finds what is there; returns the listing.

        Raises:
          StorageError: it can't be told.
          CheckpointError: what is there is one checkpoint.
        """
        for _ in range(_LOOKS):
            self._listing = listing = self.store.listed()
            if str(contents_file(Path())) in listing:
                above = str(self.store.address).rpartition("/")[0]
                raise CheckpointError(f"{self.store.address} is a checkpoint itself: give what it lies in, {above}")
            try:
                self._read(listing)
                return listing
            except FileNotFoundError:  # Removed just then, as a newer one came.
                continue
        raise StorageError(f"{self.store.address} changes faster than it can be read: stop who writes there")

    def _read(self, listing: Mapping[str, Stat]) -> None:
        """Reads the manifests that are listed."""
        stems = [name.removesuffix(manifest.SUFFIX) for name in listing if name.endswith(manifest.SUFFIX)]
        named = {stem: name for stem in stems if (name := Name.of(stem))}
        ordered = sorted(named, key=named.__getitem__)
        texts = self.store.in_parallel(lambda name: self.store.get(f"{name}{manifest.SUFFIX}"), ordered)
        # What is only called like a manifest is somebody else's; beside what is in every checkpoint, it is damaged.
        about = contents_file(Path())
        self.known = {
            name: text
            for name, text in zip(ordered, texts, strict=True)
            if self._objects(name, text) or f"{name}/{about}" in listing
        }
        self.taken = {name.partition("/")[0] for name in listing}

    def clear(self, listing: Mapping[str, Stat]) -> None:
        """Removes what a killed process left of a checkpoint that it had begun to send, or to remove."""
        for draft in [name for name in listing if name.startswith(f"{OWN}/") and name.endswith(_DRAFT)]:
            name = draft.removeprefix(f"{OWN}/").removesuffix(_DRAFT)
            if Name.of(name) is None:
                continue
            try:
                written = self.store.get(draft)
            except FileNotFoundError:
                continue
            if written != self.known.get(name):
                # What is there by that name now may share files with what was begun.
                mine, its = self._objects(name, written), self._objects(name, self.known.get(name, b""))
                self.store.delete(sorted(mine - its))
            self.store.delete([draft])

    def send(self, checkpoint: Path) -> None:
        """Puts a checkpoint there, whole or not at all.

        Raises:
          StorageError, OSError: it is not there.
          CheckpointError: its files are not what was written, or another one of that name is there.
        """
        name, written = checkpoint.name, manifest.path_of(checkpoint).read_bytes()
        if (problem := manifest.damage(checkpoint)) is not None:
            raise CheckpointError(f"{checkpoint} is damaged: {problem}")
        self.store.put(self._draft(name), written)
        files = sorted(self._objects(name, written))
        self.store.in_parallel(lambda each: self.store.put(each, checkpoint.parent / each), files)
        try:
            self.store.put(f"{name}{manifest.SUFFIX}", written, create=True)
        except FileExistsError as error:
            raise CheckpointError(
                f"{error}: another process writes there; give this run an address of its own"
            ) from None
        self.known = _ordered({**self.known, name: written})
        self.taken |= {name, f"{name}{manifest.SUFFIX}"}
        self.store.delete([self._draft(name)])

    def removable(self) -> list[str]:
        """The names of the checkpoints of which it can be told what they consist of."""
        return [name for name, written in self.known.items() if self._objects(name, written)]

    def remove(self, name: str) -> None:
        """Removes a checkpoint; of one that is interrupted there is a whole one or none.

        Raises:
          StorageError: it is not removed, or not all of it.
        """
        written = self.known[name]
        self.store.put(self._draft(name), written)
        self.store.delete([f"{name}{manifest.SUFFIX}"])
        self.known = {other: text for other, text in self.known.items() if other != name}
        self.store.delete(sorted(self._objects(name, written)))
        self.store.delete([self._draft(name)])

    def fetch(self, name: str, directory: Path) -> str | None:
        """Brings a checkpoint into a folder, where none of that name is; says what is wrong with it, if anything is.

        Raises:
          StorageError: it can't be read.
          OSError: it can't be written.
        """
        was_listed = f"{name}{manifest.SUFFIX}" in self._listing
        problem = self._lacks(name, self._listing if was_listed else self.store.listed(name))
        if problem is not None or name not in self.known:
            return problem
        fetched = directory / OWN / "fetched"
        fetched.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=fetched)) / name
        try:
            files = manifest.parsed(self.known[name], name)["files"]
            self.store.in_parallel(lambda file: self.store.fetch(f"{name}/{file}", place / file, files[file][0]), files)
            manifest.path_of(place).write_bytes(self.known[name])
            if (damaged := manifest.damage(place)) is not None:
                return f"{damaged}, as it is at {self.store.address}"
            place.rename(directory / name)
            manifest.path_of(place).rename(manifest.path_of(directory / name))
            return None
        except FileNotFoundError as error:
            problem = self._lacks(name, self.store.listed(name))
            if problem is not None or name not in self.known:
                return problem
            raise StorageError(f"{self.store.address / name} changes while it is read ({error}): try again") from None
        finally:
            shutil.rmtree(place.parent, ignore_errors=True)

    def damages(self, name: str) -> Iterator[str]:
        """All that is wrong with a checkpoint, file by file; it is read, and not kept.

        Raises:
          StorageError: it can't be read.
        """
        try:
            files = manifest.parsed(self.known[name], f"{name}{manifest.SUFFIX}")["files"]
        except ValueError as error:
            yield str(error)
            return
        sizes = self.store.listed(name)
        for file, (size, checksum) in files.items():
            found = sizes.get(f"{name}/{file}")
            if found is None:
                yield f"{file!r} is missing"
            elif found.size != size:
                yield f"{file!r} has {found.size} bytes, not {size}"
            elif self._checksum(f"{name}/{file}", size) != checksum:
                yield f"{file!r} is not what was written"

    def brief(self, name: str, directory: Path) -> None:
        """Brings of a checkpoint into a folder what it says of itself, and none of its arrays."""
        manifest.path_of(directory / name).write_bytes(self.known[name])
        about = str(contents_file(Path()))
        if (stat := self.store.head(f"{name}/{about}")) is not None:
            self.store.fetch(f"{name}/{about}", directory / name / about, stat.size)

    def file(self, name: str, path: Path) -> bool:
        """Brings a file that lies beside the checkpoints here, in place of what is here; says if there is one."""
        try:
            content = self.store.get(name)
        except FileNotFoundError:
            return False
        write_whole(path, content)
        return True

    def move_all(self, to: str, *others: str) -> None:
        """Moves all checkpoints, and other files, to a folder beside them.

        Raises:
          StorageError: they are not all moved.
        """
        for name in self.removable():
            self._copy([*sorted(self._objects(name, self.known[name])), f"{name}{manifest.SUFFIX}"], to)
        self._copy([name for name in others if self.store.head(name) is not None], to)
        for name in self.removable():
            self.remove(name)
        self.look()

    def free(self, directory: Path) -> str:
        """The name of a folder "before-1" that is neither at the address nor in a directory."""
        names = (f"before-{number}" for number in itertools.count(1))
        return next(name for name in names if name not in self.taken and not os.path.lexists(directory / name))

    def _copy(self, names: list[str], to: str) -> None:
        def copied(name: str) -> None:
            try:
                self.store.copy(name, f"{to}/{name}")
            except FileNotFoundError:  # Of a checkpoint that is damaged.
                return

        self.store.in_parallel(copied, names)

    def _lacks(self, name: str, sizes: Mapping[str, Stat]) -> str | None:
        """What a checkpoint lacks at the address, as a listing shows; one that is there no more is known no more."""
        try:
            files: Mapping[str, Any] = manifest.parsed(self.known[name], f"{name}{manifest.SUFFIX}")["files"]
        except ValueError as error:
            return str(error)
        for file, (size, _) in files.items():
            found = sizes.get(f"{name}/{file}")
            if found is not None and found.size == size:
                continue
            if self.store.head(f"{name}{manifest.SUFFIX}") is None:
                self.known = {other: text for other, text in self.known.items() if other != name}
                return None
            what = "is missing" if found is None else f"has {found.size} bytes, not {size},"
            return f"{file!r} {what} at {self.store.address / name}"
        return None

    def _checksum(self, name: str, size: int) -> int:
        checksum = 0
        for piece in self.store.pieces(name, size):
            checksum = zlib.crc32(piece, checksum)
        return checksum

    def _draft(self, name: str) -> str:
        return f"{OWN}/{name}{_DRAFT}"

    @staticmethod
    def _objects(name: str, written: bytes) -> set[str]:
        """The objects of a checkpoint, as its manifest names them; none of a manifest that can't be read."""
        try:
            return {f"{name}/{file}" for file in manifest.parsed(written, name)["files"]}
        except ValueError:
            return set()


def _ordered(known: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: known[name] for name in sorted(known, key=lambda name: Name.of(name) or Name(0, 0, 0))}
