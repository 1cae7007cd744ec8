"""Real storage for the tests."""

import itertools

import pytest
from s3 import Proxy, Server, environment

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
