"""Eight CPU devices for every test, so that sharding is tested wherever the tests run."""

import os
import shutil
import warnings

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# New examples are for those who develop; a change is judged by the same ones every time.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

COMPILED = 2**28  # Bytes of compiled programs that are kept; a session of all tests has a tenth of it.


def pytest_configure(config):
    """What is compiled once is compiled for all: for the workers, for processes that they start, for later sessions.

    JAX finds a program by all that its code follows from: its operations, the options, the devices, and the versions of
    JAX and XLA. A program that changed in any of them is compiled.
    """
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    folder = config.cache.mkdir("compiled")
    if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in folder.iterdir()) > COMPILED:
        shutil.rmtree(folder)
    kept = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in kept.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def no_donation_is_lost():
    """JAX warns where a donated buffer can't be used: then a copy is made that nobody asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        yield
