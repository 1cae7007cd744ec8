"""What can befall a process at one of its operations on the files of a directory."""

import ctypes
import dataclasses
import errno
import faulthandler
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

LOOK, CHANGE, READ, WRITE = 1, 2, 4, 8  # Kinds of operations, as in shim.c.
STANDS = 15  # Seconds after which it tells where it stands.
SHIM = Path(__file__).with_name("shim.c")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at the operation numbered `at`, from 1, of these kinds; at 0 nothing, and all of them are logged.

    Attributes:
      error: what the operation fails with, and those after it if it is `lasting`.
      signal: what the process gets.
      halves: of a write one half is done first; then the error is that of the next one.
      cut: a file of the file system whose power fails: what is not synced is lost,
      journal: but for what the journal holds.
    """

    kinds: int = LOOK | CHANGE | READ | WRITE
    error: int = 0
    signal: int = 0
    lasting: int = 0
    halves: int = 0
    cut: str = ""
    journal: int = 0
    at: int = 0


KILL = Fault(CHANGE | WRITE, signal=signal.SIGKILL)  # What changes nothing leaves nothing else for the next run.
ERRORS = {  # An error comes where file systems give it.
    name: Fault(kinds, error=getattr(errno, name))
    for name, kinds in {
        "EIO": LOOK | CHANGE | READ | WRITE, "ENOSPC": CHANGE | WRITE, "EACCES": LOOK | CHANGE, "ENOENT": LOOK | CHANGE,
    }.items()
}  # fmt: skip


def why_not():
    """Why there are no such faults here; None if there are."""
    if not sys.platform.startswith("linux"):
        return "the library that strikes is one for Linux"
    return None if shutil.which("cc") else "there is no C compiler, cc"


def compiled(folder):
    """The library that strikes, to be loaded before all others."""
    library = Path(folder) / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return library


def asked(fault, directory, log):
    """What to tell a process that shall meet a fault, or none, in a directory; what is struck is written to a log."""
    return json.dumps(fault and {**dataclasses.asdict(fault), "directory": str(directory), "log": str(log)})


def meet(text):
    """Has this process meet a fault, as `asked` has it."""
    if fault := json.loads(text):
        paths = [ctypes.c_char_p(fault[name].encode()) for name in ("directory", "log", "cut")]
        numbers = [fault[name] for name in ("kinds", "error", "signal", "lasting", "halves", "journal")]
        faulthandler.dump_traceback_later(STANDS)
        ctypes.CDLL(None).attack_arm(*paths, ctypes.c_long(fault["at"]), *numbers)
