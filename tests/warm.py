"""Processes that start warm: forked from one that has imported what they need, and has done nothing else.

`Process` stands for what `subprocess.Popen` starts. It is a process with its own id, pipes and memory, which signals
really end. What an interpreter takes up once, as it starts, is its parent's: the environment is what it was when the
first one was started, and all of a parent's children hash with one seed. What depends on these is to start cold. Those
with a library that is loaded before all others have a parent of their own. Threads may start and wait for them.
"""

import atexit
import concurrent.futures
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

IMPORTED = (
    "jax",
    "optax",
    "functrain.loop.fit",
    "functrain.loop.data",
    "functrain.update.make",
    "functrain.update.target",
    "grain",
    "orbax.checkpoint",
    "flax.nnx",
    "sklearn.datasets",
)


# Of the tests.


class Process:
    """`subprocess.Popen([sys.executable, path, ...], text=True)` with three pipes, or [..., "-c", text, ...].

    With `preload`, the path of a library, it has that as LD_PRELOAD gives it.
    """

    def __init__(self, program, *arguments, preload=None):
        pipes = [os.pipe() for _ in range(4)]
        (its_in, to_it), (from_it, its_out), (errors, its_errors), (end, its_life) = pipes
        is_path = isinstance(program, Path)
        asked = {
            "text": program.read_text() if is_path else program, "cwd": os.getcwd(),
            "argv": [str(program) if is_path else "-c", *map(str, arguments)],
        }  # fmt: skip
        its = [its_in, its_out, its_errors, its_life]
        self._parent = parent(preload)
        self.pid, self.returncode = self._parent.answer(asked, its), None
        for fd in its:
            os.close(fd)
        self.stdin, self.stdout, self.stderr = os.fdopen(to_it, "w"), os.fdopen(from_it), os.fdopen(errors)
        self._end = os.fdopen(end, "rb", buffering=0)  # Of a pipe that nobody writes to, which closes as it ends.

    def poll(self):
        """Its exit code, minus the signal if one ended it; None while it runs. It keeps its id until this says so."""
        return self._ended_within(0)

    def wait(self, timeout=None):
        if self._ended_within(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def _ended_within(self, timeout):
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._end, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.returncode = self._parent.answer({"ended": self.pid})
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """All that it prints, and its errors, when it has ended. Killed if that takes too long, it raises both."""
        self.stdin.close()
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            printed = [threads.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired as late:
                self.kill()
                late.output, late.stderr = (each.result() for each in printed)
                raise
        return tuple(each.result() for each in printed)


class Parent:
    """The process that forks. It ends with the tests, and ends what it has forked."""

    def __init__(self, preload):
        self._asks, (self._socket, its) = threading.Lock(), socket.socketpair()
        environment = os.environ if preload is None else {**os.environ, "LD_PRELOAD": str(preload)}
        command = [sys.executable, __file__, str(its.fileno())]
        no_pipe = dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL)
        with its:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[its.fileno()], **no_pipe)
        atexit.register(self._end)

    def answer(self, asked, fds=()):
        """What it answers: a number."""
        with self._asks:
            socket.send_fds(self._socket, [json.dumps(asked).encode()], fds)
            if not (number := self._socket.recv(16)):
                raise ChildProcessError("the process that forks has ended")
        return int(number)

    def _end(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._process.wait()


def parent(preload=None):
    """The process that forks those with this library."""
    with _STARTS:
        return _parent(preload)


_STARTS, _parent = threading.Lock(), functools.cache(Parent)


# Of the process that forks.


def child(tests):
    """What is asked of a child, and its standard streams: returns in each child, and in the parent when all is done."""
    running = set()
    while True:
        message, fds, _, _ = socket.recv_fds(tests, 1 << 20, 4)
        if not message:
            break
        asked = json.loads(message)
        if "ended" in asked:
            _, status = os.waitpid(asked["ended"], 0)
            running.remove(asked["ended"])
            tests.send(b"%d" % os.waitstatus_to_exitcode(status))
            continue
        with warnings.catch_warnings(action="ignore"):  # There are threads, of BLAS, which minds forks.
            pid = os.fork()
        if pid == 0:
            tests.close()
            return asked, fds
        running.add(pid)
        for fd in fds:
            os.close(fd)
        tests.send(b"%d" % pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def become(asked, fds):
    """Runs a program as an interpreter does, which then ends as the program lets it."""
    *standard, its_life = fds
    os.set_inheritable(its_life, False)
    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["cwd"])
    path, sys.argv = asked["argv"][0], asked["argv"]
    sys.path[0] = "" if path == "-c" else str(Path(path).parent)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = path
    exec(compile(asked["text"], path, "exec"), vars(main))


def main():
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # It ends when the tests do.
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # Else the first collection of each child copies all of it.
    if todo := child(socket.socket(fileno=int(sys.argv[1]))):
        signal.signal(signal.SIGINT, interrupted)
        become(*todo)


if __name__ == "__main__":
    main()
