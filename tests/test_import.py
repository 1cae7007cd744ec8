"""What `import functrain` brings, and what it leaves for later."""

import subprocess
import sys

import pytest

import functrain as ft


def test_the_import_brings_no_jax_until_a_name_needs_it():
    # The first name stands on nothing, the second one on JAX.
    program = (
        "import sys, functrain as ft; assert ft.FitError and 'jax' not in sys.modules; assert 'fit' in dir(ft);"
        " ft.partition; assert 'jax' in sys.modules and 'orbax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_there_and_listed_and_no_other():
    assert ft.partition is ft.partition
    assert {*ft.__all__} <= {*dir(ft)}
    assert [name for name in ft.__all__ if not hasattr(ft, name)] == []
    with pytest.raises(AttributeError, match="module 'functrain' has no attribute 'fits'"):
        ft.fits  # noqa: B018
