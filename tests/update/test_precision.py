"""Losses in 16 bits: casts by part, and the scale of a float16 loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import batches_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


@pytest.mark.parametrize("compute_dtype", [jnp.bfloat16, {"body": jnp.bfloat16}])
def test_parameters_are_cast_for_the_loss_alone(compute_dtype):
    params = linear_params()
    seen = {}

    def dtypes(params, batch):
        seen.update({path: leaf.dtype for path, leaf in ft.flatten(params).items()})
        return loss_fn(params, batch).astype(jnp.float32)

    update = ft.make_update(dtypes, optimizer_of(params), compute_dtype=compute_dtype, accumulate=2)
    state, _ = run(update, update.init(params), batches_of(3))
    head = jnp.float32 if isinstance(compute_dtype, dict) else jnp.bfloat16
    assert seen == {"body/w": jnp.bfloat16, "head/w": head}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.window))} == {jnp.dtype(jnp.float32)}
    exact = ft.make_update(loss_fn, optimizer_of(params), accumulate=2)
    expected, _ = run(exact, exact.init(params), batches_of(3))
    # bfloat16 has 8 bits: gradients of size 1 are off by some 2^-8, and the rate is 0.1.
    np.testing.assert_allclose(state.params["head"]["w"], expected.params["head"]["w"], atol=0.1 * 2**-6)
    assert not jnp.array_equal(state.params["head"]["w"], expected.params["head"]["w"])


def test_a_dynamic_scale_rescues_gradients_that_float16_would_lose():
    params = {"w": jnp.float32(1.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(1.0)})

    def tiny(params, batch):
        # The gradient of the float16 product is 2^-26, which float16 rounds to zero.
        return (params["w"] * batch[0] * batch[1]).astype(jnp.float32)

    for scale, expected in ((None, 0.0), (ft.DynamicScale(initial=2.0**12), 2.0**-26)):
        update = ft.make_update(tiny, optim, compute_dtype=jnp.float16, loss_scale=scale)
        _, metrics = update.measured(update.init(params), jnp.full(2, 2.0**-13, jnp.float16))
        assert float(metrics["parts"]["w"]["grad_norm"]) == expected


def test_a_dynamic_scale_halves_on_overflow_and_doubles_after_a_row_of_good_updates():
    params = {"w": jnp.float32(1.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.0)})
    update = ft.make_update(
        lambda params, batch: (params["w"] * batch).astype(jnp.float32), optim,
        compute_dtype=jnp.float16, loss_scale=ft.DynamicScale(initial=2.0**14, period=2),
    )  # fmt: skip
    state, seen = update.init(params), []
    for x in (1.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0):  # 2^15 * 4 and 2^14 * 4 are more than float16's 65504.
        state, metrics = update(state, jnp.float16(x))
        seen.append((int(np.log2(metrics["loss_scale"])), int(metrics["skipped"])))
        assert float(metrics["loss"]) == x
    assert seen == [(14, 0), (14, 0), (15, 0), (15, 1), (14, 1), (13, 0), (13, 0)]
    assert float(state.scale_state.scale) == 2.0**14


def test_a_scale_never_falls_below_its_minimum_nor_overflows_itself():
    scale = ft.DynamicScale(initial=2.0, period=1, minimum=1.0)
    state = scale.init()
    for expected in (1.0, 1.0):
        state = scale.adjusted(state, jnp.array(False))
        assert float(state.scale) == expected
    state = ft.DynamicScale(initial=2.0**127, period=1).init()
    assert float(scale.adjusted(state, jnp.array(True)).scale) == 2.0**127
