"""Real storage for the tests."""

from s3 import proxy, s3, server  # noqa: F401
