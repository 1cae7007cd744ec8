"""Damage to each file of a folder of checkpoints."""

import random
from pathlib import Path

from arena import BESIDE, rows
from sweep import Attack
from verdicts import damage_verdict

from functrain.loop.checkpoint.contents import contents_file

LEFT_BEHIND = (".functrain", "orbax-checkpoint-tmp")  # What a killed process left is cleared, whatever is in it.
MANIFEST = ".manifest.json"
PROOF = contents_file(Path())  # Without this and a manifest, a folder is nobody's.


def flip(file, _):
    content = bytearray(file.read_bytes())
    if content:
        content[random.Random(file.name).randrange(len(content))] ^= 1
    file.write_bytes(content)


def truncate(file, _):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file, _):
    file.write_bytes(bytes(file.stat().st_size))


def remove(file, _):
    file.unlink()


def swap(file, other):
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


DAMAGES = (flip, truncate, zero, remove, swap)
ROWS = {
    "a damaged file": lambda of_file: [],
    "a damaged file, its manifest gone": lambda of_file: [of_file],
    "a damaged file, no manifests": lambda of_file: ["*"],
}


def of_files(arena):
    """`{row: attacks}`: each damage to each file of what an interrupted run left, with its manifest and without."""
    base = arena.interrupted
    files = sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file() and not path.is_symlink())
    files = [name for name in files if not any(left in str(name) for left in LEFT_BEHIND) and str(name) not in BESIDE]
    has_manifests = any(name.name.endswith(MANIFEST) for name in files)
    return {
        row: [
            Attack(f"{damage.__name__} {name}", _harm(arena, base, name, other, damage, row))
            for name, other in zip(files, files[1:] + files[:1], strict=True)
            for damage in DAMAGES
            if not (ROWS[row]("") and damage is remove and name.match(f"*/{PROOF}"))
        ]
        for row in (ROWS if has_manifests else [*ROWS][:1])
    }


def _harm(arena, base, name, other, damage, row):
    def go():
        directory = arena.copy(base)
        damage(directory / name, directory / other)
        for of_file in ROWS[row](name.parts[0].removesuffix(MANIFEST)):
            for manifest in directory.glob(f"{of_file}{MANIFEST}"):
                manifest.unlink()
        verified, still = [*directory.glob(f"*{MANIFEST}")], rows(directory, strict=False)
        attempt = arena.attempt(directory, lambda: arena.run(directory), base)
        return (*damage_verdict(attempt, arena.undisturbed, verified=bool(verified), rows=still), attempt)

    return go
