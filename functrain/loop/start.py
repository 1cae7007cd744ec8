"""Several processes: how they begin to know each other, and how all of them end when one does."""

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax

from functrain.errors import StartError
from functrain.tree.text import aligned, listed

_KEY, _ENDED = "functrain/failed", "functrain/ended"
_LOOK, _LAST_LOOK = 0.5, 0.1  # Seconds between two looks whether another process has failed; or has ended too.
# What a collective says whose other side is gone.
_LOST = re.compile("gloo|nccl|closed by peer|connection reset|coordination", re.IGNORECASE)
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What `srun` sets in each task; a shell within an allocation, or a notebook, has but some of them.
_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")


def start(
    address: str | None = None,
    *,
    processes: int | None = None,
    process: int | None = None,
    heartbeat: int = 10,
    patience: int = 300,
) -> None:
    """Has the processes of a run know each other, before anything else of JAX is used; does nothing for one alone.

    >>> start()  # No launcher has started this process: it is alone.

    Which processes there are say the arguments, or else the environment: `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or what Slurm's `srun` sets in each of several tasks. Nothing else is
    guessed. On a TPU pod, or with another launcher, call `jax.distributed.initialize` yourself, and `ft.start()` after.

    From then on all processes end when one does. One that ends with an exception says so, and exits with 1; the others
    end within seconds with 1, and a line that says which it was, where they would wait for it in their next collective.
    One that is killed is missed after `heartbeat` seconds, and JAX ends the others.

    Args:
      address: of process 0, "10.0.0.1:1234"; the same in all.
      processes: how many there are.
      process: which this one is, from 0.
      heartbeat: seconds without a sign of a process after which all others end.
      patience: seconds to wait for all of them at the beginning.

    Raises:
      StartError: not all is said, or not the same as the environment says.
    """
    if not _is_begun():
        given = {"address": address, "processes": processes, "process": process}
        found = _said(given, os.environ)
        if found is None:
            return
        jax.distributed.initialize(
            coordinator_address=found.get("address"),
            num_processes=found.get("processes"),
            process_id=found.get("process"),
            cluster_detection_method="slurm" if not found else "deactivate",
            initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat,
        )
    end_together()
    if jax.process_index() == 0:
        print(_table(), file=sys.stderr, flush=True)


def end_together() -> None:
    """Has this process end when another one fails, and say so to the others when it does; once in a process."""
    client = _client()
    if client is None or getattr(sys.excepthook, "of_functrain", False):
        return
    before, me = sys.excepthook, f"process {jax.process_index()} of {jax.process_count()}"

    ends = threading.Event()

    def failed(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        is_lost = _LOST.search(str(error)) is not None
        if is_lost:
            time.sleep(3 * _LOOK)  # A collective fails as another process has: that is told, if it can tell.
        ends.set()
        before(kind, error, traceback)
        told = f"{me} {'lost another one' if is_lost else 'failed'}: {kind.__name__}: {error}"
        print(f"{told}; the others end too", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # Another one was the first.
            client.key_value_set(_KEY, told)
        _leave(1)

    failed.of_functrain = True  # type: ignore[attr-defined]
    sys.excepthook = failed
    watcher = threading.Thread(target=_watch, args=(client, ends), name="functrain-others", daemon=True)
    watcher.start()
    atexit.register(_end, client, watcher, ends)


def _watch(client: Any, ends: threading.Event) -> None:
    with contextlib.suppress(Exception):  # The service has ended; JAX's own heartbeat tells.
        while not ends.wait(_LOOK):
            _look(client)


def _end(client: Any, watcher: threading.Thread, ends: threading.Event) -> None:
    """Waits at the end of a program for those of the others, as JAX does after it.

    No thread may look then: Python, as it ends, takes away one that returns from JAX, which aborts the process.
    """
    ends.set()
    watcher.join()
    with contextlib.suppress(Exception):
        count = client.key_value_increment(_ENDED, 1)
        while count < jax.process_count():
            time.sleep(_LAST_LOOK)
            _look(client)
            count = int(client.key_value_try_get(_ENDED))


def _look(client: Any) -> None:
    """Ends this process if another one has failed."""
    try:
        told = client.key_value_try_get(_KEY)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return
        raise
    print(f"ended, as {told}", file=sys.stderr, flush=True)
    _leave(1)


def _leave(code: int) -> None:
    # Not as Python ends: that waits for the others in what JAX has registered.
    if jax.process_index() == 0:
        time.sleep(3 * _LOOK)  # It keeps what the others look at.
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _said(given: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Who the processes are; empty for Slurm's, None for one alone."""
    if any(value is not None for value in given.values()):
        if missing := [name for name, value in given.items() if value is None]:
            raise StartError(
                f"start() is given some of three arguments, and not {listed(missing)}: give all three, or none"
            )
        return dict(given)
    of_jax = {name: environment[name] for name in _JAX if environment.get(name)}
    if of_jax:
        if missing := [name for name in _JAX if name not in of_jax]:
            raise StartError(
                f"the environment has {listed(of_jax)} and not {listed(missing)}: set all three in each process"
            )
        address, processes, process = (of_jax[name] for name in _JAX)
        return {"address": address, "processes": int(processes), "process": int(process)}
    is_complete = all(environment.get(name) for name in _SLURM)
    return {} if is_complete and int(environment["SLURM_NTASKS"]) > 1 else None


def _is_begun() -> bool:
    return bool(jax.distributed.is_initialized())


def _client() -> Any:
    """What JAX's processes know each other by; None where there is but one, or where JAX keeps it elsewhere."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import distributed

        return distributed.global_state.client
    return None


def _table() -> str:
    rows = [("process", "devices", "kind")]
    for process in range(jax.process_count()):
        mine = [device for device in jax.devices() if device.process_index == process]
        rows.append((str(process), str(len(mine)), mine[0].device_kind if mine else "-"))
    return aligned(rows, [str.rjust, str.rjust, str.ljust])
