"""A checkpoint taken into other parts, whose optimizer states have names that begin alike."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import SUMMARY, squares

import functrain as ft
from functrain.loop.checkpoint import manifest

PARAMS = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0]), "c": jnp.array([5.0])}
ADAM = optax.adam(0.1)


def update_of(rules, tx=ADAM):
    parts = ft.partition(PARAMS, rules)
    optim = ft.Optimizer(parts, dict.fromkeys(parts.names, tx))
    return ft.make_update(lambda params, batch: squares(params) * batch, optim)


def moments(state, update):
    """The first and second moment of every parameter."""
    found = {}
    for part in update.optim.trained:
        flat = ft.flatten(state.opt_state[part])
        for name, leaf in flat.items():
            field, _, path = name.rpartition("/")
            if field.endswith(("mu", "nu")):
                found[field[-2:], path] = np.asarray(leaf).tolist()
    return found


@pytest.mark.parametrize(
    ("names", "tx"), [(("x", "x/0"), ADAM), (("x/inner", "x"), ft.with_lr(optax.adam, 0.1)), (("x/0/0", "x/0"), ADAM)]
)
@pytest.mark.parametrize("is_swapped", [False, True])
def test_parts_of_which_one_is_named_like_a_state_of_the_other_keep_their_moments(tmp_path, names, tx, is_swapped):
    """The leaf 0 of the state of "x" and a leaf of the state of "x/0" begin alike."""
    one, other = names
    before = update_of({one: "a", other: ...}, tx)
    after = update_of({one: ["a", "b"], other: ...} if not is_swapped else {other: "a", one: ...}, tx)
    state = before.init(PARAMS)
    for _ in range(2):
        state, _ = before(state, 1.0)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(like=after.init(PARAMS), regroup=True)
    assert moments(restored.state, after) == moments(state, before)
    assert not {"mu", "nu"} & {field for part in restored.report.dropped.values() for field in part}
    trained, _ = after(restored.state, 1.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.params))


def test_a_checkpoint_that_does_not_say_how_many_leaves_each_part_has_is_taken_too(tmp_path):
    before, after = update_of({"x": "a", "y": ...}), update_of({"x": ["a", "b"], "y": ...})
    state, _ = before(before.init(PARAMS), 1.0)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    written = tmp_path / "1" / "facts" / "metadata"
    contents = json.loads(written.read_bytes())
    del contents["optimizer_leaves"]
    written.write_text(json.dumps(contents))
    manifest.write(tmp_path / "1", SUMMARY)
    restored = ft.Checkpoints(tmp_path).restore(like=after.init(PARAMS), regroup=True)
    assert moments(restored.state, after) == moments(state, before)
