"""Checkpoints of a run under one layout that goes on under another: the same bits, each in its new place."""

import jax
import numpy as np
import pytest
from meshes import BATCHES, RULES, layout_of, loss_fn, mesh, optimizer_of, start

import functrain as ft


def update_of(name, shape=(4, 2)):
    layout = layout_of(name, mesh(shape=shape)) if name else None
    return ft.make_update(loss_fn, optimizer_of(layout), accumulate=3, ema=0.9)


def bits(state):
    return {
        path: np.asarray(jax.random.key_data(leaf) if path == "key" else leaf).tobytes()
        for path, leaf in ft.flatten(state).items()
    }


def test_a_state_goes_through_every_layout_with_a_window_pending(tmp_path):
    update, key = update_of(None), jax.random.key(3)
    state = update.init(start(), key=key)
    for batch in BATCHES[:5]:
        state, _ = update(state, batch)
    expected, before = bits(state), None
    for number, name in enumerate([*RULES, "data", None]):
        update = update_of(name)
        with ft.Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(state)
            checkpoints.wait()
            like = update.abstract(start(), key=key)
            state = checkpoints.restore(like=like).state
        assert bits(state) == expected
        asked = jax.tree.map(lambda leaf: leaf.sharding, (like.params, like.opt_state, like.ema))
        found = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state, state.ema))
        assert name is None or asked == found != before
        before = found
    state, _ = update(state, BATCHES[5])
    assert (int(state.step), state.window) == (2, None)


@pytest.mark.parametrize("name", ["both, zero", "host"])
def test_a_run_that_goes_on_within_a_window_has_its_sums_where_they_lay(tmp_path, name):
    update = update_of(name)
    state, _ = update(update.init(start(), key=jax.random.key(3)), BATCHES[0])
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    lay, found = jax.tree.map(lambda leaf: leaf.sharding, state.window.grads), []

    class Looks(ft.Hook):
        def run_started(self, run):
            found.append(jax.tree.map(lambda leaf: leaf.sharding, run.state.window.grads))

    again = update.init(start(), key=jax.random.key(3))
    ft.fit(update, again, BATCHES[1:3], steps=1, checkpoints=ft.Checkpoints(tmp_path), hooks=[Looks()], progress=False)
    assert found == [lay]
