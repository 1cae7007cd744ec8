"""Gradients of several parts that are clipped together, by their joint norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import PARTS, bits, gradients, params
from trees import says

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


def clipped_gradients(grads, **options):
    optim = ft.Optimizer(PARTS, {"body": optax.identity(), "head": optax.identity()}, **options)
    return optim.update(grads, optim.init(params()), params())[0]


def test_parts_may_have_norms_of_their_own_and_others_are_left_as_they_are():
    grads = jax.tree.map(lambda leaf: 100 * leaf, gradients("body", "head"))
    updates = clipped_gradients(grads, clip_norm={"body": 1.0, "head": 0.1})
    assert norm(updates["body"]) == pytest.approx(1.0, rel=WITHIN)
    assert norm(updates["head"]) == pytest.approx(0.1, rel=WITHIN)
    updates = clipped_gradients(grads, clip_norm={"head": 0.1})
    assert bits(updates["body"]) == bits(grads["body"])
    assert norm(updates["head"]) == pytest.approx(0.1, rel=WITHIN)
    # A part whose gradients are not given has none to clip.
    assert bits(clipped_gradients({"body": grads["body"]}, clip_norm={"head": 0.1})["body"]) == bits(grads["body"])


@pytest.mark.parametrize("clip_norm", [1.0, {"body": 1.0, "head": 1.0}], ids=["one", "by part"])
def test_each_part_is_clipped_as_optax_clips_it_in_its_chain(clip_norm):
    grads = jax.tree.map(lambda leaf: 100 * leaf, gradients("body", "head"))
    updates = clipped_gradients(grads, clip_norm=clip_norm, clip_by="part")
    clip = optax.clip_by_global_norm(1.0)
    for part, flat in grads.items():
        theirs, _ = clip.update(flat, clip.init(flat))
        jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, rtol=1e-6), updates[part], theirs)


@pytest.mark.parametrize("clip_norm", [1.0, {"body": 1.0}], ids=["one", "by part"])
def test_each_tensor_is_clipped_on_its_own_as_burn_does(clip_norm):
    grads = jax.tree.map(lambda leaf: 100 * leaf, gradients("body", "head"))
    updates = clipped_gradients(grads, clip_norm=clip_norm, clip_by="tensor")
    for part, flat in updates.items():
        for path, leaf in flat.items():
            expected = 1.0 if part == "body" or clip_norm == 1.0 else norm(grads[part][path])
            assert norm(leaf) == pytest.approx(expected, rel=WITHIN), path


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        ({"clip_norm": 1.0, "clip_by": "leaf"}, ["clip_by='leaf': write 'all', 'part' or 'tensor'"]),
        ({"clip_by": "part"}, ["clip_by='part' clips to no norm: add clip_norm=1.0"]),
        ({"clip_norm": {"body": 1.0}, "clip_by": "all"}, ["write clip_norm=1.0, or clip_by='part'"]),
        ({"clip_norm": {"tail": 1.0}}, ["clip_norm for 'tail', which is frozen or unknown", "are 'body', 'head'"]),
        ({"clip_norm": {"body": -1.0}}, ["clip_norm of part 'body' is -1.0: give a positive norm"]),
    ],
)
def test_a_norm_that_clips_nothing_is_an_error(options, phrases):
    with pytest.raises(ft.OptimizerError, match=says(*phrases)):
        ft.Optimizer(PARTS, {"body": optax.identity(), "head": optax.identity()}, **options)


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
