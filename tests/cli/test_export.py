"""`functrain export`."""

import resource
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

import functrain as ft
from cli.digits import PARAMS, loss_fn


def bits(leaves):
    return {name: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in leaves.items()}


def test_the_parameters_come_back_by_their_paths_to_the_bit(run, told, tmp_path):
    code, out, err = told("export", run, tmp_path / "all.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'all.safetensors'}: 3 leaves of 'body', 'head', ")
    exported = safetensors.flax.load_file(tmp_path / "all.safetensors")
    assert exported["head/w"].dtype == jnp.bfloat16
    assert bits(exported) == bits(ft.flatten(ft.load_params(run, like=PARAMS)))


def test_one_part_of_a_checkpoint_that_is_named(run, told, data, tmp_path):
    assert told("export", run / "12", tmp_path / "body.safetensors", "--part", "body")[0] == 0
    exported = safetensors.flax.load_file(tmp_path / "body.safetensors")
    assert bits(exported) == bits({"body/w": ft.load_params(run, like=PARAMS, step=12)["body"]["w"]})
    shown = data("export", run / "12", tmp_path / "two.safetensors", "--part", "head", "--part", "body")
    assert (shown["parts"], len(shown["leaves"])) == (["head", "body"], 3)


def test_doubles_large_and_small_are_not_rounded(told, tmp_path):
    with jax.enable_x64(True):
        params = {"small": jnp.full((3, 4), 1 / 3), "large": jnp.full(300_000, 1 / 3), "none": jnp.zeros((0, 2))}
        parts = ft.partition(params, {"all": ...})
        update = ft.make_update(loss_fn, ft.Optimizer(parts, {"all": ft.FROZEN}))
        with ft.Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(update.init(params))
    assert told("export", tmp_path / "run", tmp_path / "all.safetensors")[::2] == (0, "")
    exported = safetensors.numpy.load_file(tmp_path / "all.safetensors")
    assert bits(exported) == bits(ft.flatten(params))


def test_a_file_that_is_there_is_replaced_only_by_force(run, told, tmp_path):
    file = tmp_path / "mine"
    file.write_bytes(b"mine")
    code, _, err = told("export", run, file)
    assert (code, file.read_bytes()) == (2, b"mine")
    assert err == f"functrain export: {file} is there already: give another file, or --force to replace it\n"
    assert told("export", run, file, "--force")[0] == 0
    assert len(safetensors.flax.load_file(file)) == 3


def test_a_file_that_can_not_be_written_whole_is_not_there(run, told, tmp_path):
    (tmp_path / "out").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        code, _, err = told("export", run, tmp_path / "out" / "all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert code == 2
    assert "File too large" in err
    assert err.endswith("make room, or give another file\n")
    assert [*(tmp_path / "out").iterdir()] == []


def test_a_part_that_is_none_and_a_dtype_that_safetensors_does_not_have(run, told, tmp_path):
    code, _, err = told("export", run, tmp_path / "out", "--part", "bodi")
    assert code == 2
    assert "there is no part 'bodi'" in err
    assert err.endswith("there are 'body', 'head'; did you mean 'body'?\n")
    params = {"w": jnp.zeros(4, jnp.int4)}
    parts = ft.partition(params, {"all": ...})
    with ft.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(ft.make_update(loss_fn, ft.Optimizer(parts, {"all": ft.FROZEN})).init(params))
    code, _, err = told("export", tmp_path / "run", tmp_path / "out")
    assert (code, (tmp_path / "out").exists(), err.count("\n")) == (2, False, 1)
    assert 'Unknown dtype "int4"' in err
    assert err.endswith("export other parts, --part\n")


def test_without_safetensors_it_says_what_to_install(run, told, tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = told("export", run, tmp_path / "out")
    assert code == 2
    assert err.endswith("write pip install 'functrain[export]'\n")


def test_a_folder_that_is_not_there_is_not_made(run, told, tmp_path):
    code, _, err = told("export", run, tmp_path / "none" / "out")
    assert (code, err) == (2, f"functrain export: there is no folder {tmp_path / 'none'} to write to: make it first\n")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["export", "diff"])
def test_a_run_that_is_not_there(told, tmp_path, command):
    code, _, err = told(command, tmp_path / "none", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert f"there is no folder {tmp_path / 'none'}" in err
