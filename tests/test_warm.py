"""A process that starts warm is what one that starts cold is, to those who start it and to those who kill it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

# An interrupt ends it also where the tests run in the background, whose processes ignore interrupts.
WAITING = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
print(os.getpid(), flush=True)
time.sleep(100)
"""


def cold(program):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", program], **pipes, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_is_a_process_of_its_own_that_dies_by_the_signal(number):
    killed, other = warm.Process(WAITING), warm.Process(WAITING)
    pids = [int(process.stdout.readline()) for process in (killed, other)]
    assert pids == [killed.pid, other.pid]
    assert len({os.getpid(), *pids}) == 3
    killed.send_signal(number)
    assert killed.wait(10) == killed.returncode == -number
    assert other.poll() is None
    other.kill()
    assert other.communicate(10) == ("", "")


@pytest.mark.parametrize("started", [warm.Process, cold])
@pytest.mark.parametrize(
    ("ending", "code", "error"),
    [
        ("", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_it_ends_as_an_interpreter_does(started, ending, code, error):
    process = started(
        "import atexit, os, sys; atexit.register(print, 'at exit')\n"
        f"print(__name__, sys.argv, repr(sys.path[0]), os.getcwd(), sys.stdin.readline(), flush=True); {ending}"
    )
    process.stdin.write("asked\n")
    process.stdin.flush()
    printed, errors = process.communicate(timeout=30)
    at_exit = "at exit\n" if code != -signal.SIGKILL else ""
    assert printed == f"__main__ ['-c'] '' {os.getcwd()} asked\n\n{at_exit}"
    assert (process.returncode, (errors.splitlines() or [""])[-1]) == (code, error)


def test_it_begins_without_a_backend_or_threads_of_python():
    program = (
        "import sys, threading; assert 'orbax.checkpoint' in sys.modules\n"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized(), threading.active_count())"
    )
    assert warm.Process(program).communicate(30) == ("False 1\n", "")


def test_it_is_killed_when_it_takes_too_long():
    process = warm.Process(WAITING)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.1)
    assert process.wait(10) == -signal.SIGKILL


def test_it_does_not_outlive_those_who_started_it():
    starts = f"import warm, time; print(warm.Process({WAITING!r}).pid, flush=True); time.sleep(100)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {starts}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.kill()
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
