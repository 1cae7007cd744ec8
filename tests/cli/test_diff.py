"""`functrain diff`."""

import jax.numpy as jnp
import numpy as np
import pytest

import functrain as ft
from cli.digits import PARAMS, flip, loss_fn


def test_a_checkpoint_is_equal_to_itself_and_to_its_run(run, told):
    code, out, err = told("diff", run / "16", run, "--all")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "equal to the bit: 10 of 10 leaves"


def test_the_norms_of_the_differences_by_leaf_and_part(run, told, data):
    """Against the same in float64 of what `load_params` reads."""
    code, out, _ = told("diff", run / "12", run / "16")
    assert code == 1
    old, new = (ft.flatten(ft.load_params(run, like=PARAMS, step=step)) for step in (12, 16))
    old, new = ({path: np.float64(leaf) for path, leaf in each.items()} for each in (old, new))
    shown = data("diff", run / "12", run / "16")
    for path in old:
        norm = np.linalg.norm(np.ravel(new[path] - old[path]))
        leaf = shown["leaves"][f"params/{path}"]
        assert leaf["difference"] == pytest.approx(norm, rel=1e-12)
        assert leaf["relative"] == pytest.approx(norm / np.linalg.norm(np.ravel(old[path])), rel=1e-12)
    head = np.hypot(*(np.linalg.norm(np.ravel(new[path] - old[path])) for path in ("head/w", "head/b")))
    assert shown["parts"]["head"]["difference"] == pytest.approx(head, rel=1e-12)
    assert [*shown["parts"]] == ["body", "head"]
    assert any(line.split()[0] == "body/w" for line in out.splitlines())


def test_what_is_only_in_one_and_what_has_another_form(run, told, data, tmp_path):
    params = {"body": {"w": jnp.zeros((2, 2))}, "head": PARAMS["head"] | {"c": jnp.ones(())}}
    parts = ft.partition(params, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": ft.FROZEN, "head": ft.FROZEN})
    with ft.Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(ft.make_update(loss_fn, optim).init(params))
    code, out, _ = told("diff", run, tmp_path / "other")
    assert code == 1
    assert "float32[3,4], now float32[2,2]" in out
    assert out.endswith("only in B: 'params/head/c'\n")
    shown = data("diff", tmp_path / "other", run, "--all")
    assert shown["only_in_a"] == ["params/head/c"]
    assert "opt_state/body/inner/0/count" in shown["only_in_b"]
    assert shown["leaves"]["params/body/w"]["difference"] is None


def test_of_a_run_it_is_the_newest_sound_one_and_a_damaged_one_is_trouble(run, told):
    flip(run / "16" / "facts" / "metadata")
    code, _, err = told("diff", run / "12", run)
    assert code == 0
    assert "16 IS DAMAGED and is not used" in err
    assert (run / "16").exists(), "it set something aside"
    code, out, err = told("diff", run / "12", run / "16")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"the checkpoint {run / '16'} is damaged: 'facts/metadata' is not what was written" in err
