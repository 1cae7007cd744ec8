"""Eight CPU devices for every test, so that sharding is tested wherever the tests run."""

import os
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


@pytest.fixture
def no_donation_is_lost():
    """JAX warns where a donated buffer can't be used: then a copy is made that nobody asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        yield
