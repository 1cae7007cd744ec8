"""An S3 API on loopback, and a proxy before it that has faults."""

import contextlib
import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # Until who started it is gone.
"""


class Server:
    """moto's server as a process of its own, which keeps its objects until it is stopped."""

    def __init__(self, port=0, **environment):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        self.port = int(self._process.stdout.readline())

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def make(self, bucket):
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{bucket}", method="PUT")).read()

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self.stop()

    def stop(self):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def environment(url):
    """What obstore reads: credentials, and the server that stands for Amazon's."""
    return {
        "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-told",
    }  # fmt: skip


class Proxy:
    """Before a server: passes connections on, answers 503, says nothing, or cuts them.

    Attributes:
      fault: a function of a request's number, method and path, that says what becomes of it: "pass", "503", "hang",
        "cut" (within its body), or "lose" (carried out, and the answer cut off).
      seen: the requests, as "PUT /bucket/name".
    """

    def __init__(self, server):
        self.server, self.seen = server, []
        self.fault = lambda number, method, path: "pass"
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open, self._lock = [], threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def stop(self):
        self._listening.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._open.append(client)
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError), client, client.makefile("rb") as reading:
            while line := reading.readline():
                method, path, _ = line.decode().split(" ", 2)
                head = [line]
                while head[-1] not in (b"\r\n", b""):
                    head.append(reading.readline())
                if not self._answer(client, reading, method, path, head):
                    return

    def _answer(self, client, reading, method, path, head):
        with self._lock:
            self.seen.append(f"{method} {path}")
            number = len(self.seen)
        fault = self.fault(number, method, path)
        found = re.search(rb"(?i)content-length: (\d+)", b"".join(head))
        size = int(found[1]) if found else 0
        if fault == "hang":
            select.select([client], [], [], 60)
            return False
        if fault == "cut":
            reading.read(size // 2)
            return False
        body = reading.read(size)
        if fault == "503":
            client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
            return True
        # One request a connection, so that an answer ends where its connection does.
        head = [each for each in head if not each.lower().startswith((b"connection:", b"expect:"))]
        with socket.create_connection(("127.0.0.1", self.server.port)) as to:
            to.sendall(b"".join([*head[:-1], b"Connection: close\r\n\r\n", body]))
            answer = b""
            while piece := to.recv(1 << 16):
                answer += piece
        if fault != "lose":
            client.sendall(answer)
        return False


def objects(store):
    """The names at an address, but for those of who writes there."""
    return sorted(name for name in store.listed() if not name.startswith(".functrain/"))


_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def server():
    """An S3 API on loopback."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """An address in a bucket of its own, which this process has the environment for."""
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{next(_NUMBERS)}"
    server.make(bucket)
    return f"s3://{bucket}/digits"


@pytest.fixture
def proxy(s3, server, monkeypatch):
    """What stands between this process and the storage."""
    proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.stop()
