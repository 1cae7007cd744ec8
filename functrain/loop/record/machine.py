"""What a run runs on and with: packages, devices, the command line, git."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from functrain import __version__

_SECONDS = 20.0


def versions() -> dict[str, str]:
    """Python and every installed package of which a module is imported, by name."""
    by_module = _packages()
    imported = {module.partition(".")[0] for module in [*sys.modules]}
    names = sorted({name for module in imported for name in by_module.get(module, ())}, key=str.lower)
    found = {"python": platform.python_version(), "functrain": __version__}  # Which may be installed as a folder.
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):  # It was removed since they were looked up.
            found[name] = metadata.version(name)
    return found


@functools.cache
def _packages() -> dict[str, list[str]]:
    """The installed packages of each module; looking it up takes a quarter of a second."""
    return {module: [*names] for module, names in metadata.packages_distributions().items()}


def command() -> list[str]:
    """The command line, without the interpreter."""
    return list(sys.orig_argv[1:])


def device() -> dict[str, Any]:
    """What it runs on; no name of a host."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def memory() -> dict[str, int | None]:
    """The most bytes that were in use: of each of this process's devices the fullest's, and the host's."""
    peaks = [(each.memory_stats() or {}).get("peak_bytes_in_use") for each in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return {"device": max(known, default=None), "host": _host_peak()}


def _host_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Not on this system.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git(folder: Path, *words: str) -> bytes | None:
    """What git prints; None where there is no git, or it knows nothing of the folder."""
    # Not as a hook of a repository, nor of another one's folder; and without a lock on the index of the user's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    arguments = ["git", "-c", "core.fsmonitor=false", "-c", "core.quotepath=off", "-C", os.fspath(folder), *words]
    try:
        ended = subprocess.run(arguments, env=environment, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout if ended.returncode == 0 else None


def commit(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder's repository, and whether what it tracks was changed since; None where there is none."""
    head = git(folder, "rev-parse", "--verify", "HEAD")
    if head is None:
        return None
    changes = git(folder, "status", "--porcelain", "--untracked-files=no", "--no-renames")
    return {"commit": head.decode().strip(), "dirty": bool(changes) if changes is not None else None}
