"""Power cuts: of an ext4 file system in a file, which loses what is not synced."""

import contextlib
import dataclasses
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys

from faults import CHANGE, WRITE, Fault
from sweep import Attack
from verdicts import verdict

SIZE = 1 << 26
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # As in shim.c.
CUT = Fault(CHANGE | WRITE, signal=signal.SIGKILL)
ROWS = {"power cut": CUT, "power cut, the journal written": dataclasses.replace(CUT, journal=1)}


def why_not(folder):
    """Why there are no power cuts here; None if there are."""
    if os.geteuid() != 0:
        return "to mount a file system takes root"
    try:
        with Disk(folder) as disk:
            disk.cut()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"an ext4 file system in a file can't be made, mounted or cut off: {error}"
    return None


class Disk:
    """A new file system, mounted while the context is open."""

    def __init__(self, folder):
        self.image, self.mounted = folder.with_suffix(".img"), folder

    def __enter__(self):
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(SIZE)
        _run("mkfs.ext4", "-q", "-F", self.image)
        self.mount()
        return self

    def __exit__(self, *error):
        with contextlib.suppress(subprocess.CalledProcessError):
            self.unmount()
        self.image.unlink()
        self.mounted.rmdir()

    def remount(self):
        """What is synced by it, or is lost where the power was cut; the journal is read."""
        self.unmount()
        self.mount()

    def cut(self):
        """Cuts the power, as a fault does."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, sys.byteorder))
        os.close(descriptor)

    def mount(self):
        _run("mount", "-o", "loop", self.image, self.mounted)

    def unmount(self):
        _run("umount", self.mounted)


def _run(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


def cuts(arena):
    """`{row: attacks}`: a power cut at each operation that changes files, of a new run and of one that goes on."""
    return {row: [*_of(arena, fault)] for row, fault in ROWS.items()}


def _of(arena, fault):
    for base in (arena.fresh, arena.interrupted):
        count = sum(bool(fault.kinds & kind) for kind in arena.operations(base, waits=True))
        for at in range(1, count + 1):
            struck = dataclasses.replace(fault, at=at)
            yield Attack(
                f"at operation {at} of a run that is {base.name}", functools.partial(_cut, arena, base, struck)
            )


def _cut(arena, base, fault):
    with Disk(arena.scratch()) as disk:
        directory = disk.mounted / "runs" / "digits"  # Which a new run makes.
        if base is arena.interrupted:
            shutil.copytree(base, directory, symlinks=True)
            disk.remount()
        log = arena.scratch()

        def attacked():
            ran = arena.run(directory, dataclasses.replace(fault, cut=str(disk.mounted / "cut")), log, waits=True)
            disk.remount()
            return ran

        attempt = arena.attempt(directory, attacked, base if base is arena.interrupted else None)
    if not (at := log.read_text().strip()):
        return None
    return (*verdict(attempt, arena.undisturbed, fault), dataclasses.replace(attempt, at=at))
