"""Gradients of several parts that are clipped together, by their joint norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import PARTS, bits, gradients, params

import functrain as ft


def norm(updates):
    """The global norm in float64."""
    return float(np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(updates))))


# A sum of n float32 squares errs by n rounding errors at most, its root by half of that; then come the root itself, the
# quotient, and the product: (n / 2 + 3) rounding errors of 2^-24 each.
WITHIN = (9 / 2 + 3) * 2**-24


def test_parts_that_are_clipped_together_have_a_joint_norm():
    optim = ft.Optimizer(PARTS, {"body": optax.sgd(1.0), "head": optax.sgd(1.0)}, clip_norm=1.0)
    grads = jax.tree.map(lambda leaf: 100 * leaf, gradients("body", "head"))
    updates, _ = optim.update(grads, optim.init(params()), params())
    assert norm(updates) == pytest.approx(1.0, rel=WITHIN)
    assert norm(updates["body"]) < 0.99
    # They are scaled alike: the direction is that of the gradients.
    ratios = jax.tree.map(lambda update, grad: update / grad, updates, grads)
    np.testing.assert_allclose(
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(ratios)]), -1 / norm(grads), rtol=1e-6
    )


def test_parts_that_are_clipped_each_in_its_own_chain_have_the_norm_each():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    optim = ft.Optimizer(PARTS, {"body": tx, "head": tx})
    grads = jax.tree.map(lambda leaf: 100 * leaf, gradients("body", "head"))
    updates, _ = optim.update(grads, optim.init(params()), params())
    assert norm(updates) == pytest.approx(np.sqrt(2), rel=WITHIN)


def test_the_norm_is_of_the_given_gradients_alone():
    optim = ft.Optimizer(PARTS, {"body": optax.sgd(1.0), "head": optax.sgd(1.0)}, clip_norm=1.0)
    grads = jax.tree.map(lambda leaf: 100 * leaf, gradients("head"))
    updates, _ = optim.update(grads, optim.init(params()), params())
    assert norm(updates) == pytest.approx(1.0, rel=WITHIN)


def test_small_gradients_are_left_as_they_are_to_the_bit():
    optim = ft.Optimizer(PARTS, {"body": optax.identity(), "head": optax.identity()}, clip_norm=100.0)
    grads = gradients("body", "head")
    updates, _ = optim.update(grads, optim.init(params()), params())
    assert bits(updates) == bits(grads)


def test_gradients_of_zero_stay_zero():
    optim = ft.Optimizer(PARTS, {"body": optax.identity(), "head": optax.identity()}, clip_norm=1.0)
    zeros = jax.tree.map(jnp.zeros_like, gradients("body", "head"))
    updates, _ = optim.update(zeros, optim.init(params()), params())
    assert bits(updates) == bits(zeros)


def clipped(grad, clip_norm):
    whole = {"w": jnp.zeros(grad.shape, grad.dtype)}
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.identity()}, clip_norm=clip_norm)
    return optim.update({"all": {"w": grad}}, optim.init(whole), whole)[0]["all"]["w"]


def test_the_norm_of_float16_gradients_does_not_overflow():
    # Each square is 9e8, where float16 ends at 65504; the norm is 60000.
    updates = clipped(jnp.full(4, 30000, jnp.float16), 1.0)
    assert updates.dtype == jnp.float16
    assert updates.tolist() == [0.5] * 4


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16():
    # Of eleven ones it is 3.3166, in bfloat16 3.3125: the quotient would be 0.3027 in the place of 0.3008.
    updates = clipped(jnp.ones(11, jnp.bfloat16), 1.0)
    assert updates.dtype == jnp.bfloat16
    assert set(updates.tolist()) == {float(jnp.bfloat16(1 / np.sqrt(11)))}


def test_the_norm_of_float64_gradients_is_computed_in_float64():
    with jax.enable_x64():
        updates = clipped(jnp.array([3.0, 4.0], jnp.float64), 1.0)
        assert updates.dtype == jnp.float64
        np.testing.assert_allclose(updates, [0.6, 0.8], rtol=1e-15)


def test_gradients_that_are_nan_stay_nan():
    assert jnp.isnan(clipped(jnp.array([1.0, jnp.nan]), 1.0)).all()
