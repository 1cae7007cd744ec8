"""What an update measures of each part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import batches_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_measured_is_the_same_update_with_telemetry_by_part(accumulate):
    params, batches = linear_params(), batches_of(accumulate)
    optim = optimizer_of(params)
    update = ft.make_update(loss_fn, optim, accumulate=accumulate)
    state, metrics = update.init(params), {}
    for batch in batches:
        state, metrics = update.measured(state, batch)
    plain, _ = run(update, update.init(params), batches)
    # A program of its own may fuse otherwise: float32's last bit, which Adam's first step does not magnify.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, plain.params)
    grads = jax.tree.map(lambda *g: sum(g) / len(g), *[jax.grad(loss_fn)(params, batch) for batch in batches])
    for part in ("body", "head"):
        telemetry = metrics["parts"][part]
        change = float(jnp.linalg.norm(state.params[part]["w"] - params[part]["w"]))
        norm = float(jnp.linalg.norm(params[part]["w"]))
        assert float(telemetry["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(grads[part]["w"])), rel=1e-5)
        assert float(telemetry["param_norm"]) == pytest.approx(norm, rel=1e-6)
        assert float(telemetry["update_norm"]) == pytest.approx(change, rel=1e-4)
        assert float(telemetry["update_ratio"]) == pytest.approx(change / norm, rel=1e-4)
    assert float(metrics["parts"]["head"]["learning_rate"]) == np.float32(0.1)
    assert "learning_rate" not in metrics["parts"]["body"]


def test_a_part_that_is_all_zero_has_a_ratio_of_zero():
    params = jax.tree.map(jnp.zeros_like, linear_params())
    update = ft.make_update(lambda p, b: jnp.sum(p["body"]["w"] + p["head"]["w"][0]), optimizer_of(params))
    _, metrics = update.measured(update.init(params), None)
    assert float(metrics["parts"]["body"]["update_ratio"]) == 0.0
