"""Checkpoints of several devices come back on others."""

import hashlib
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from processes import ROOT
from states import KEY, one_part, squares
from trees import bits

import functrain as ft


def laid_out(devices):
    """Params over so many of the devices; None for those that nobody placed."""
    params = {
        "split": jax.random.normal(KEY, (8, 16)), "other": jax.random.normal(KEY, (16, 8)).astype(jnp.bfloat16),
        "whole": jnp.arange(3.0), "empty": jnp.zeros((0, 2)),
    }  # fmt: skip
    if devices is None:
        return params
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[-devices:])
    specs = {"split": jax.P("data"), "other": jax.P(None, "data"), "whole": jax.P(), "empty": jax.P()}
    return {name: jax.device_put(leaf, jax.NamedSharding(mesh, specs[name])) for name, leaf in params.items()}


def over_devices(devices):
    params = laid_out(devices)
    update = ft.make_update(
        lambda params, batch, key: batch * squares(params) + jax.random.normal(key), one_part(params), accumulate=2
    )
    return update, params


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """A checkpoint of a state over eight devices, with a window pending."""
    update, params = over_devices(8)
    state = update.init(params, key=KEY)
    for batch in (1.0, 2.0, 3.0):
        state, _ = update(state, batch)
    with ft.Checkpoints(tmp_path_factory.mktemp("eight")) as checkpoints:
        checkpoints.save(state)
    return checkpoints.directory, bits(state)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 4, 1, None])
def test_saved_on_eight_devices_it_comes_back_on_others_exactly(on_eight, devices):
    directory, saved_bits = on_eight
    update, params = over_devices(devices)
    # Shapes tell of meshes of several devices only.
    asked = (update.init if devices == 1 else update.abstract)(params, key=KEY)
    restored = ft.Checkpoints(directory).restore(like=asked).state
    assert bits(restored) == saved_bits

    def places(state):
        flat = ft.flatten({"params": state.params, "opt_state": state.opt_state, "key": state.key})
        return {path: leaf.sharding if getattr(leaf, "committed", True) else None for path, leaf in flat.items()}

    assert places(restored) == places(asked)
    for path, leaf in restored.window.grads["all"].items():
        assert leaf.sharding == restored.params[path].sharding
    begun = update.init(params, key=KEY)  # It trains on as a state does that was always there.
    for batch in (1.0, 2.0, 3.0, 4.0):
        begun, _ = update(begun, batch)
    finished, _ = update(restored, 4.0)
    assert places(finished) == places(begun)
    if devices == 8:
        assert bits(finished) == bits(begun)


def test_saved_where_nobody_placed_it_it_comes_back_on_eight_devices(tmp_path):
    update, params = over_devices(None)
    state, _ = update(update.init(params, key=KEY), 1.0)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        wide, params = over_devices(8)
        restored = checkpoints.restore(like=wide.init(params, key=KEY)).state  # A state does as well as shapes.
    assert bits(restored) == bits(state)
    assert {path: leaf.sharding for path, leaf in params.items()} == {
        path: leaf.sharding for path, leaf in restored.params.items()
    }
    wide(restored, 2.0)


@pytest.mark.slow
def test_a_process_with_fewer_devices_reads_what_was_saved_on_eight(on_eight):
    directory, saved_bits = on_eight
    code = """
        import sys
        import jax
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 4)
        import functrain as ft, test_placement as tests
        update, params = tests.over_devices(4)
        restored = ft.Checkpoints(sys.argv[1]).restore(like=update.abstract(params, key=tests.KEY)).state
        print(len(jax.devices()), tests.digest(tests.bits(restored)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(directory)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(pathlib.Path(__file__).parent)))
    }
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["4", digest(saved_bits)]


def digest(found):
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
