"""Tests of the command line: a package, as pytest takes only one `conftest` in folders that are none."""
