"""Gradients that are not finite: updates that are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import batches_of, leaves_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


def poisoned(params, batch, model_state):
    x, poison = batch
    value = jnp.mean((x @ params["body"]["w"] @ params["head"]["w"]) ** 2) + 0 * jnp.sum(params["head"]["w"])
    value = value + jnp.sum(jnp.where(poison, jnp.nan, 0.0) * params["head"]["w"])
    return ft.Loss(value, model_state={"mean": 0.5 * model_state["mean"] + jnp.where(poison, jnp.nan, 1.0)})


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_skipped_update_leaves_every_other_bit_as_it_was_and_names_the_part(accumulate):
    params = linear_params()
    update = ft.make_update(
        poisoned, optimizer_of(params), accumulate=accumulate, nonfinite="skip",
        after=lambda params, model_state, step: (params, model_state | {"mean": model_state["mean"] + 100}),
    )  # fmt: skip
    state = update.init(params, model_state={"mean": jnp.zeros(())})
    good = [(x, False) for x in batches_of(accumulate)]
    state, metrics = run(update, state, good)
    assert int(metrics["skipped"]) == 0
    before = leaves_of(state)
    bad = [(x, i == len(good) - 1) for i, (x, _) in enumerate(good)]
    state, metrics = run(update, state, bad)
    assert int(metrics["skipped"]) == 1
    assert {part: bool(flag) for part, flag in metrics["nonfinite"].items()} == {"body": False, "head": True}
    changed = {path for path, leaf in leaves_of(state).items() if leaf != before[path]}
    # The good batches of the window count in the model state; the poisoned one does not.
    assert changed == {"step", "batches"} | ({"model/mean"} if accumulate > 1 else set())
    assert np.isfinite(float(state.model_state["mean"]))
    state, metrics = run(update, state, good)
    assert int(metrics["skipped"]) == 0
    assert int(state.step) == 3


def test_a_poisoned_batch_in_the_middle_spoils_its_window_alone():
    params = linear_params()
    update = ft.make_update(poisoned, optimizer_of(params), accumulate=3, nonfinite="skip")
    state = update.init(params, model_state={"mean": jnp.zeros(())})
    state, metrics = run(update, state, [(x, i == 0) for i, x in enumerate(batches_of(3))])
    assert int(metrics["skipped"]) == 1
    assert float(state.model_state["mean"]) == 1.5  # Of the second and third batch.
    state, metrics = run(update, state, [(x, False) for x in batches_of(3)])
    assert int(metrics["skipped"]) == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_scan_skips_alike():
    params = linear_params()
    update = ft.make_update(poisoned, optimizer_of(params), nonfinite="skip")
    stats = {"mean": jnp.zeros(())}
    batches = (batches_of(4), jnp.array([False, True, False, True]))
    state, metrics = update.scan(update.init(params, model_state=stats), batches)
    one_by_one, _ = run(
        update, update.init(params, model_state=stats), [(batches[0][i], batches[1][i]) for i in range(4)]
    )
    assert leaves_of(state) == leaves_of(one_by_one)
    assert metrics["skipped"].tolist() == [0, 1, 0, 1]


def test_raise_adds_nothing_to_the_program():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params))
    assert "is_finite" not in str(jax.make_jaxpr(update.pure)(update.init(params), batches_of(1)[0]))
    _, metrics = update(update.init(params), jnp.full((6, 4), jnp.nan))
    assert np.isnan(float(metrics["loss"]))
