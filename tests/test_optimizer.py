"""`Optimizer`: one optax transform per part, clipping, sharding, and what it refuses."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import functrain as ft


def params():
    return {
        "body": {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])},
        "head": {"w": jnp.array([2.0, -1.0]), "b": jnp.array([0.25])},
    }


PARTS = ft.partition(params(), {"body": "body", "head": "head"})


def gradients(*names, seed=1):
    """Random split gradients of these parts."""
    rng = np.random.default_rng(seed)
    split = PARTS.split(jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params()))
    return {part: split[part] for part in names}


def bits(tree):
    """The tree with the bytes of every leaf: equal only where equal in every bit."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


def says(*phrases):
    """A pattern for `pytest.raises(match=)`: these very phrases, in this order."""
    return "(?s)" + ".*".join(map(re.escape, phrases))


# The state, and what a step does to it.


def test_the_state_has_an_entry_per_trained_part_in_the_order_of_the_parts_and_none_for_a_frozen_one():
    parts = ft.partition(params(), {"z": "body/w", "frozen": "body/b", "a": ...})
    optim = ft.Optimizer(parts, {"a": optax.sgd(0.1), "frozen": ft.FROZEN, "z": optax.adam(0.1)})
    assert optim.trained == ("z", "a")
    opt_state = optim.init(params())
    assert list(opt_state) == ["z", "a"]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(opt_state)) == [(), (2, 2), (2, 2)]


def test_the_state_of_a_part_is_what_its_transform_makes_of_its_flat_tree():
    optim = ft.Optimizer(PARTS, {"body": optax.adam(0.1), "head": optax.sgd(0.1, momentum=0.9)})
    opt_state, split = optim.init(params()), PARTS.split(params())
    assert bits(opt_state["body"]) == bits(optax.adam(0.1).init(split["body"]))
    assert bits(opt_state["head"]) == bits(optax.sgd(0.1, momentum=0.9).init(split["head"]))


def test_a_step_adds_each_part_the_updates_of_its_own_transform():
    optim = ft.Optimizer(PARTS, {"body": optax.sgd(1.0), "head": optax.sgd(0.5)})
    ones = {
        "body": {"body/w": jnp.ones((2, 2)), "body/b": jnp.ones(2)},
        "head": {"head/w": jnp.ones(2), "head/b": jnp.ones(1)},
    }
    after, _ = optim.step(params(), ones, optim.init(params()))
    expected = {
        "body": {"w": [[0.0, -3.0], [2.0, 3.0]], "b": [-0.5, -1.5]},
        "head": {"w": [1.5, -1.5], "b": [-0.25]},
    }
    assert jax.tree.map(lambda leaf: leaf.tolist(), after) == expected


def test_the_updates_are_what_a_step_adds():
    optim = ft.Optimizer(PARTS, {"body": optax.adamw(0.1), "head": ft.with_lr(optax.sgd, 0.5)}, clip_norm=0.1)
    arguments = gradients("body", "head"), optim.init(params())
    updates, state_of_update = optim.update(*arguments, params())
    after, state_of_step = optim.step(params(), *arguments)
    assert bits(optax.apply_updates(params(), PARTS.merge(updates))) == bits(after)
    assert bits(state_of_update) == bits(state_of_step)


def test_the_updates_are_of_the_given_parts_alone_and_the_state_is_whole():
    optim = ft.Optimizer(PARTS, {"body": optax.adam(0.1), "head": optax.adam(0.1)})
    updates, opt_state = optim.update(gradients("head"), optim.init(params()), params())
    assert list(updates) == ["head"]
    assert list(opt_state) == ["body", "head"]


def test_a_step_changes_none_of_its_arguments():
    optim = ft.Optimizer(PARTS, {"body": optax.adam(0.1), "head": optax.adam(0.1)}, clip_norm=0.1)
    whole, grads, opt_state = params(), gradients("body", "head"), optim.init(params())
    before = bits((whole, grads, opt_state))
    optim.step(whole, grads, opt_state)
    assert bits((whole, grads, opt_state)) == before


# A part whose gradients are not given.

SCHEDULED = ft.with_lr(optax.adamw, lambda step: 0.1 / (1 + step), weight_decay=0.1)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_part_whose_gradients_are_not_given_is_untouched_in_every_bit_and_the_others_are_not(jit, clip_norm):
    optim = ft.Optimizer(PARTS, {"body": SCHEDULED, "head": SCHEDULED}, clip_norm=clip_norm)
    step = jax.jit(optim.step) if jit else optim.step
    before, opt_before = step(params(), gradients("body", "head"), optim.init(params()))
    after, opt_after = step(before, gradients("head", seed=2), opt_before)
    assert bits(after["body"]) == bits(before["body"])
    assert bits(opt_after["body"]) == bits(opt_before["body"])
    for old, new in zip(jax.tree.leaves(before["head"]), jax.tree.leaves(after["head"]), strict=True):
        assert (old != new).all()
    for old, new in zip(jax.tree.leaves(opt_before["head"]), jax.tree.leaves(opt_after["head"]), strict=True):
        assert (old != new).any()


def test_the_step_count_of_adam_is_the_parts_own():
    optim = ft.Optimizer(PARTS, {"body": optax.adam(0.1), "head": optax.adam(0.1)})
    whole, opt_state = params(), optim.init(params())
    for names in (["head"], ["body", "head"], ["head"]):
        whole, opt_state = optim.step(whole, gradients(*names), opt_state)
    assert {part: int(state[0].count) for part, state in opt_state.items()} == {"body": 1, "head": 3}


def test_a_part_that_starts_late_moves_as_if_it_had_just_begun():
    optim = ft.Optimizer(PARTS, {"body": optax.adam(0.1), "head": optax.adam(0.1)})
    whole, opt_state = params(), optim.init(params())
    fresh, _ = optim.step(whole, gradients("body"), opt_state)
    for seed in range(3):
        whole, opt_state = optim.step(whole, gradients("head", seed=seed), opt_state)
    late, _ = optim.step(whole, gradients("body"), opt_state)
    assert bits(late["body"]) == bits(fresh["body"])


def test_a_step_without_gradients_changes_nothing():
    optim = ft.Optimizer(PARTS, {"body": SCHEDULED, "head": SCHEDULED}, clip_norm=1.0)
    opt_state = optim.init(params())
    assert bits(optim.step(params(), {}, opt_state)) == bits((params(), opt_state))


def test_a_frozen_part_is_untouched_in_every_bit():
    optim = ft.Optimizer(PARTS, {"body": ft.FROZEN, "head": optax.adamw(0.1, weight_decay=0.1)})
    whole, opt_state = params(), optim.init(params())
    for seed in range(3):
        whole, opt_state = optim.step(whole, gradients("head", seed=seed), opt_state)
    assert bits(whole["body"]) == bits(params()["body"])
    assert (whole["head"]["w"] != params()["head"]["w"]).all()


# Types.


class Model(NamedTuple):
    body: Any
    head: Any


def mixed():
    return {"wide": jnp.ones(2), "narrow": jnp.ones(2, jnp.bfloat16), "half": jnp.ones(2, jnp.float16)}


@pytest.mark.parametrize(
    "whole", [Model([jnp.ones(2)], (jnp.ones(2),)), nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))], ids=["tuple", "nnx"]
)
def test_params_keep_their_type(whole):
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.sgd(0.1)})
    after, _ = optim.step(whole, optim.parts.split(whole), optim.init(whole))
    assert jax.tree.structure(after) == jax.tree.structure(whole)
    assert all((leaf != 1).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("grads_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tx", [optax.adam(0.1), ft.with_lr(optax.adam, 0.1)], ids=["constant", "with_lr"])
def test_params_and_state_keep_their_dtypes_whatever_the_gradients_are(tx, grads_dtype):
    optim = ft.Optimizer(ft.partition(mixed(), {"all": ...}), {"all": tx})
    opt_state = optim.init(mixed())
    grads = {"all": jax.tree.map(lambda leaf: leaf.astype(grads_dtype), mixed())}
    after, state_after = optim.step(mixed(), grads, opt_state)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, ((mixed(), opt_state), (after, state_after)))
    assert dtypes[0] == dtypes[1]
    assert all((leaf < 1).all() for leaf in jax.tree.leaves(after))


def test_steps_can_be_scanned_as_the_types_of_what_they_carry_stay():
    optim = ft.Optimizer(ft.partition(mixed(), {"all": ...}), {"all": ft.with_lr(optax.adam, 0.1)}, clip_norm=1.0)
    grads = {"all": jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), mixed())}
    carry = mixed(), optim.init(mixed())
    (whole, opt_state), _ = jax.lax.scan(
        lambda carry, grads: (optim.step(carry[0], grads, carry[1]), None), carry, grads
    )
    assert int(opt_state["all"].inner[0].count) == 3
    # Adam's three steps of 0.1 each, in the rounding of the coarsest, bfloat16: 2^-9 a step.
    assert all(np.allclose(np.float32(leaf), 0.7, atol=3 * 2**-9) for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("leaf", [np.ones((), np.float32), 1.0], ids=["numpy", "Python number"])
def test_params_may_hold_whatever_jax_takes_for_a_floating_point_array(leaf):
    whole = {"a": leaf, "b": jnp.ones(2)}
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.sgd(0.5)})
    after, _ = optim.step(whole, {"all": {"a": jnp.ones(()), "b": jnp.ones(2)}}, optim.init(whole))
    assert (float(after["a"]), after["b"].tolist()) == (0.5, [0.5, 0.5])


def test_a_transform_may_keep_a_python_number_in_its_state():
    tx = optax.GradientTransformation(
        lambda params: {"calls": 0}, lambda updates, state, params: (updates, {"calls": 1})
    )
    optim = ft.Optimizer(PARTS, {"body": tx, "head": ft.FROZEN})
    _, opt_state = optim.step(params(), gradients("body"), optim.init(params()))
    assert int(opt_state["body"]["calls"]) == 1


# What a transform is given.


def test_a_transform_sees_flat_trees():
    seen = []

    def update(updates, state, params):
        seen.extend((set(updates), set(params)))
        return updates, state

    optim = ft.Optimizer(PARTS, {"body": optax.GradientTransformation(lambda params: (), update), "head": ft.FROZEN})
    optim.step(params(), gradients("body"), optim.init(params()))
    assert seen == [{"body/w", "body/b"}, {"body/w", "body/b"}]


def no_biases(flat):
    return {path: not path.endswith("/b") for path in flat}


@pytest.mark.parametrize("mask", [no_biases, {"body/w": True, "body/b": False}], ids=["callable", "tree"])
def test_masks_of_optax_are_of_paths(mask):
    # The gradients are zero: what moves is the weight decay.
    optim = ft.Optimizer(PARTS, {"body": optax.adamw(0.5, weight_decay=1.0, mask=mask), "head": ft.FROZEN})
    zeros = {"body": jax.tree.map(jnp.zeros_like, PARTS.split(params())["body"])}
    after, _ = optim.step(params(), zeros, optim.init(params()))
    assert after["body"]["w"].tolist() == [[0.5, -1.0], [1.5, 2.0]]
    assert after["body"]["b"].tolist() == [0.5, -0.5]


def test_extra_arguments_reach_the_transform_that_takes_them_and_others_ignore_them():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    optim = ft.Optimizer(PARTS, {"body": optax.chain(optax.sgd(1.0), plateau), "head": optax.sgd(1.0)})
    ones = jax.tree.map(jnp.ones_like, PARTS.split(params()))
    opt_state, moved = optim.init(params()), []
    for _ in range(3):
        updates, opt_state = optim.update(ones, opt_state, params(), value=1.0)
        moved.append((float(updates["body"]["body/b"][0]), float(updates["head"]["head/b"][0])))
    assert moved == [(-1.0, -1.0), (-0.5, -1.0), (-0.25, -1.0)]


def test_lbfgs_in_one_part_is_lbfgs_alone_on_the_flat_tree():
    optim = ft.Optimizer(PARTS, {"body": optax.lbfgs(), "head": ft.with_lr(optax.sgd, 0.1)})
    whole, opt_state = params(), optim.init(params())
    alone = PARTS.split(whole)["body"]
    state_alone = optax.lbfgs().init(alone)

    def loss(flat):
        return sum(jnp.sum(jnp.square(leaf - 3.0) * (1.0 + jnp.abs(leaf))) for leaf in flat.values())

    @jax.jit
    def step(whole, opt_state):
        value, grads = jax.value_and_grad(loss)(PARTS.split(whole)["body"])
        split = {"body": grads, **gradients("head")}
        return optim.step(whole, split, opt_state, value=value, grad=grads, value_fn=loss)

    @jax.jit
    def step_alone(flat, state):
        value, grads = jax.value_and_grad(loss)(flat)
        updates, state = optax.lbfgs().update(grads, state, flat, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(flat, updates), state

    for _ in range(4):
        whole, opt_state = step(whole, opt_state)
        alone, state_alone = step_alone(alone, state_alone)
    assert bits(PARTS.split(whole)["body"]) == bits(alone)
    assert loss(alone) < 0.2 * loss(PARTS.split(params())["body"])


def test_per_example_gradients_are_taken_by_a_transform_that_reduces_them():
    private = optax.contrib.differentially_private_aggregate(l2_norm_clip=1.0, noise_multiplier=0.0, key=0)
    parts = ft.partition({"w": jnp.zeros(2), "b": jnp.zeros(())}, {"all": ...})
    optim = ft.Optimizer(parts, {"all": optax.chain(private, optax.sgd(1.0))})
    whole = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    grads = {"all": {"w": jnp.array([[3.0, 4.0], [0.5, 0.0]]), "b": jnp.zeros(2)}}
    after, _ = optim.step(whole, grads, optim.init(whole))
    # The mean of (3, 4), clipped to (0.6, 0.8), and of (0.5, 0), which is within the norm: two float32 roundings.
    np.testing.assert_allclose(after["w"], [-0.55, -0.4], rtol=2e-7)
    assert float(after["b"]) == 0.0


def test_the_table_shows_the_transform_of_every_part():
    parts = ft.partition(params(), {"w": "body/w", "b": "body/b", "head": ...})
    optim = ft.Optimizer(parts, {"w": ft.with_lr(optax.adamw, 0.1), "b": ft.FROZEN, "head": optax.sgd(0.1)})
    cells = [line.split()[-1] for line in str(optim).splitlines()[:4]]
    assert cells == ["optimizer", "adamw", "frozen", "chain"]
    assert repr(optim) == "Optimizer(w: adamw, b: frozen, head: chain)"


# What other systems give.


def linears():
    """Two 4x4 linear layers as Burn's tests have them, a loss on inputs U(100, 200), and such inputs."""
    rng = np.random.default_rng(0)

    def layer():
        kernel, bias = rng.uniform(-0.5, 0.5, (4, 4)), rng.uniform(-0.5, 0.5, 4)
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}

    whole = {"layer_a": layer(), "layer_b": layer()}
    batches = jnp.asarray(rng.uniform(100, 200, (20, 2, 4)), jnp.float32)

    def loss_fn(params, batch):
        hidden = batch @ params["layer_a"]["kernel"] + params["layer_a"]["bias"]
        return jnp.mean(jnp.square(hidden @ params["layer_b"]["kernel"] + params["layer_b"]["bias"]))

    return whole, loss_fn, batches


def test_burn_a_clip_by_value_in_one_part_bounds_every_change_there_and_none_elsewhere():
    whole, loss_fn, batches = linears()
    parts = ft.partition(whole, {"a": "layer_a", "b": "layer_b"})
    optim = ft.Optimizer(
        parts, {"a": optax.chain(optax.clip(0.01), ft.with_lr(optax.sgd, 0.01)), "b": ft.with_lr(optax.sgd, 0.01)}
    )
    grads, _ = ft.make_train_step(loss_fn, parts)(whole, batches[0])
    after, _ = optim.step(whole, grads, optim.init(whole))
    change = jax.tree.map(lambda new, old: np.abs(np.float64(new) - np.float64(old)), after, whole)
    # A parameter just above 0.5 is rounded by at most 2^-25, and the product of the two float32 0.01 by far less.
    assert all((leaf <= 1e-4 + 2**-24).all() for leaf in jax.tree.leaves(change["layer_a"]))
    assert all((leaf >= 9e-5).all() for leaf in jax.tree.leaves(change["layer_a"]))
    assert all((leaf > 0.01).all() for leaf in jax.tree.leaves(change["layer_b"]))


@pytest.mark.parametrize("factory", [optax.sgd, optax.adamw], ids=["sgd", "adamw"])
def test_burn_a_part_of_rate_zero_is_equal_to_the_bit_after_an_epoch_and_its_neighbour_is_not(factory):
    whole, loss_fn, batches = linears()
    parts = ft.partition(whole, {"a": "layer_a", "b": "layer_b"})
    optim = ft.Optimizer(parts, {"a": ft.with_lr(factory, 0.0), "b": ft.with_lr(factory, 1e-7)})
    train_step = ft.make_train_step(loss_fn, parts, wrt=optim.trained)
    after, opt_state = whole, optim.init(whole)
    step = jax.jit(lambda params, opt_state, batch: optim.step(params, train_step(params, batch)[0], opt_state))
    for batch in batches:
        after, opt_state = step(after, opt_state, batch)
    assert bits(after["layer_a"]) == bits(whole["layer_a"])
    assert (after["layer_b"]["kernel"] != whole["layer_b"]["kernel"]).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_catalyst_two_adams_step_from_gradients_at_the_same_parameters(jit):
    table = [
        (3.125, 5.5, -2.75, 0.4800000000363636, -0.9990000000036363),
        (3.0134085762, 5.3922024002, -2.5908480003, 0.46001129764981724, -0.9980019965116157),
        (2.9041906857, 5.2848806179, -2.4359718713, 0.44004164872887575, -0.9970074175766306),
    ]
    with jax.enable_x64():
        whole = {"encoder": jnp.float64(0.5), "head": jnp.float64(-1.0)}
        parts = ft.partition(whole, {"encoder": "encoder", "head": "head"})
        optim = ft.Optimizer(parts, {"encoder": optax.adam(0.02), "head": optax.adam(0.001)})

        def loss_fn(params, batch):
            x, target = batch
            return jnp.mean(jnp.square(params["head"] * params["encoder"] * x - target))

        train_step = ft.make_train_step(loss_fn, parts, wrt=optim.trained)
        step = jax.jit(optim.step) if jit else optim.step
        opt_state = optim.init(whole)
        for value, encoder_grad, head_grad, encoder, head in table:
            grads, loss = train_step(whole, (jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])))
            whole, opt_state = step(whole, grads, opt_state)
            # The table gives losses and gradients to ten decimals, parameters to the last digit.
            given = [float(loss.value), float(grads["encoder"]["encoder"]), float(grads["head"]["head"])]
            np.testing.assert_allclose(given, [value, encoder_grad, head_grad], rtol=0, atol=1e-10)
            np.testing.assert_allclose([float(whole["encoder"]), float(whole["head"])], [encoder, head], rtol=1e-15)


# Clipping.


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


# To the bit what optax gives.


class Case(NamedTuple):
    """A tree, its partition, the names of its parts' transforms, and gradients of three steps."""

    whole: Any
    parts: ft.Partition
    kinds: dict[str, str]
    grads: list[Any]


def matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


TRANSFORMS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adamw with a mask": optax.adamw(0.01, weight_decay=0.1, mask=matrices),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01),
    "adagrad": optax.adagrad(0.1),
    "with_lr": ft.with_lr(optax.adamw, 0.01, weight_decay=0.1),
    "schedule": ft.with_lr(optax.adam, optax.linear_schedule(0.1, 0.0, 3)),
    "FROZEN": ft.FROZEN,
}


def containers(children):
    return st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "block_1", "block_10"]), children, min_size=1, max_size=4),
        st.lists(children, min_size=1, max_size=4),
        st.tuples(children, children),
    )


SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (4, 1), (1, 2, 2)])
TREES = containers(st.recursive(SHAPES.map(np.empty), containers, max_leaves=8))


@st.composite
def cases(draw):
    tree = draw(TREES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # Hypothesis' own choices are mostly one part of SGD.

    def random(magnitude):
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 10**magnitude, jnp.float32), tree)

    paths = list(rng.permutation(list(ft.flatten(tree))))
    kinds = rng.permutation(list(TRANSFORMS))[: rng.integers(1, min(4, len(paths)), endpoint=True)]
    rules = {f"part{i}": [str(path) for path in paths[i :: len(kinds)]] for i in range(len(kinds))}
    grads = [random(rng.uniform(-3, 3)) for _ in range(3)]
    return Case(random(0), ft.partition(tree, rules), dict(zip(rules, kinds, strict=True)), grads)


def run(case, jit):
    """Three steps of functrain's optimizer."""
    optim = ft.Optimizer(case.parts, {part: TRANSFORMS[kind] for part, kind in case.kinds.items()})

    def step(whole, grads, opt_state):
        split = case.parts.split(grads)
        return optim.step(whole, {part: split[part] for part in optim.trained}, opt_state)

    whole, opt_state = case.whole, optim.init(case.whole)
    step = jax.jit(step) if jit else step
    for grads in case.grads:
        whole, opt_state = step(whole, grads, opt_state)
    return whole


def run_optax(tx, tree, grads, jit):
    """Three steps of an optax transform."""

    def step(tree, grads, state):
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    step = jax.jit(step) if jit else step
    for grad in grads:
        tree, state = step(tree, grad, state)
    return tree


def optax_transform(kind):
    return optax.set_to_zero() if kind == "FROZEN" else TRANSFORMS[kind]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@settings(deadline=None, max_examples=15)
@given(case=cases())
def test_steps_give_what_multi_transform_gives_to_the_bit(jit, case):
    transforms = {part: optax_transform(kind) for part, kind in case.kinds.items()}
    together = optax.multi_transform(transforms, case.parts.labels())
    assert bits(run(case, jit)) == bits(run_optax(together, case.whole, case.grads, jit))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@settings(deadline=None, max_examples=15)
@given(case=cases())
def test_steps_give_what_each_transform_alone_gives_on_its_part_to_the_bit(jit, case):
    after = case.parts.split(run(case, jit))
    for part, kind in case.kinds.items():
        flat, *grads = (case.parts.split(tree)[part] for tree in (case.whole, *case.grads))
        assert bits(after[part]) == bits(run_optax(optax_transform(kind), flat, grads, jit)), kind


# Sharding: eight devices, as 4 x 2.


def sharded(axis_type=AxisType.Auto):
    """Parameters on a mesh, and the mesh."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    whole = {"body": {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}, "head": jnp.ones((4, 4))}
    specs = {"body": {"w": P("x", "y"), "b": P("y")}, "head": P("x")}
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), whole, specs), mesh


def sharded_optimizer(whole, tx):
    return ft.Optimizer(
        ft.partition(whole, {"body": "body", "head": "head"}), {"body": tx, "head": optax.sgd(0.1, 0.9)}
    )


def shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def placement(tree):
    return jax.tree.map(lambda leaf: (leaf.sharding, leaf.committed), tree)


MATRIX_OPTIMIZERS = {
    "adam": ft.with_lr(optax.adam, 0.1),
    "adafactor": ft.with_lr(optax.adafactor, 0.1, min_dim_size_to_factor=4),
    "muon": ft.with_lr(optax.contrib.muon, 0.1),
}


def test_moments_are_laid_out_as_their_parameters_and_scalars_are_replicated_over_the_mesh():
    whole, mesh = sharded()
    opt_state = sharded_optimizer(whole, ft.with_lr(optax.adam, 0.1)).init(whole)
    adam, replicated = opt_state["body"].inner[0], NamedSharding(mesh, P())
    for moments in (adam.mu, adam.nu):
        assert shardings(moments) == {"body/w": whole["body"]["w"].sharding, "body/b": whole["body"]["b"].sharding}
    assert {adam.count.sharding, opt_state["body"].learning_rate.sharding, opt_state["body"].setting.sharding} == {
        replicated
    }
    assert shardings(opt_state["head"][0].trace) == {"head": whole["head"].sharding}
    assert all(leaf.committed for leaf in jax.tree.leaves(opt_state))


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_the_shardings_of_a_state_are_known_without_it(name):
    whole, _ = sharded()
    optim = sharded_optimizer(whole, MATRIX_OPTIMIZERS[name])
    assert optim.shardings(shardings(whole)) == shardings(optim.init(whole))


# Without `out_shardings` XLA lays out as it likes what is neither a scalar nor shaped like its parameter: the factored
# moments of adafactor.
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adam", "plain jit"),
        ("muon", "plain jit"),
        ("adam", "out_shardings"),
        ("adafactor", "out_shardings"),
        ("muon", "out_shardings"),
    ],
)
def test_a_compiled_step_leaves_everything_where_it_was_and_compiles_once(name, how):
    whole, _ = sharded()
    optim = sharded_optimizer(whole, MATRIX_OPTIMIZERS[name])
    opt_state, grads = optim.init(whole), optim.parts.split(whole)
    before = placement((whole, opt_state))
    out = {"out_shardings": (shardings(whole), optim.shardings(shardings(whole)))} if how == "out_shardings" else {}
    step = jax.jit(optim.step, **out)
    for _ in range(3):
        whole, opt_state = step(whole, grads, opt_state)
        assert placement((whole, opt_state)) == before
    assert step._cache_size() == 1


def test_a_mesh_of_explicit_axes_serves_as_well():
    whole, mesh = sharded(AxisType.Explicit)
    with jax.set_mesh(mesh):
        whole["head"] = jax.device_put(whole["head"], P("x", None))  # How such a mesh writes it.
        optim = sharded_optimizer(whole, ft.with_lr(optax.adam, 0.1))
        opt_state, grads = optim.init(whole), optim.parts.split(whole)
        before = placement((whole, opt_state))
        step = jax.jit(optim.step)
        for _ in range(3):
            whole, opt_state = step(whole, grads, opt_state)
            assert placement((whole, opt_state)) == before
        assert step._cache_size() == 1


@pytest.mark.parametrize("committed", [True, False])
def test_state_is_on_its_parameters_device_and_committed_only_as_they_are(committed):
    whole = jax.device_put(params(), jax.devices()[5]) if committed else params()
    optim = ft.Optimizer(PARTS, {"body": ft.with_lr(optax.adam, 0.1), "head": ft.FROZEN})
    opt_state, grads = optim.init(whole), {"body": PARTS.split(whole)["body"]}
    before = placement((whole, opt_state))
    assert {leaf.committed for leaf in jax.tree.leaves(opt_state)} == {committed}
    assert {leaf.sharding for leaf in jax.tree.leaves(opt_state)} == {whole["body"]["w"].sharding}
    step = jax.jit(optim.step)
    for _ in range(3):
        whole, opt_state = step(whole, grads, opt_state)
        # The output of a jit is committed where an argument is.
        assert placement((whole, opt_state)) == before
    assert step._cache_size() == 1


def test_a_parameter_that_is_not_yet_on_the_mesh_does_not_draw_the_state_off_it():
    on_mesh, mesh = sharded()
    whole = {"a": jnp.ones(3), "b": on_mesh["head"]}  # The first is uncommitted: jit puts it on the mesh.
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": ft.with_lr(optax.adam, 0.1)})
    opt_state = optim.init(whole)
    assert opt_state["all"].learning_rate.sharding.device_set == set(mesh.devices.flat)
    jax.jit(optim.step)(whole, {"all": whole}, opt_state)


# What it refuses. Every message names what is wrong and says what to write instead.

TRAINED = {"body": optax.sgd(0.1), "head": optax.sgd(0.1)}


def small(**transforms):
    """An optimizer of PARTS with these transforms, its state, and gradients of all its trained parts."""
    optim = ft.Optimizer(PARTS, {**TRAINED, **transforms})
    return optim, optim.init(params()), gradients(*optim.trained)


def test_a_part_without_a_transform_is_an_error():
    with pytest.raises(
        ft.OptimizerError, match=says("parts without a transform: 'head'", "give each one, or ft.FROZEN")
    ):
        ft.Optimizer(PARTS, {"body": optax.sgd(0.1)})


def test_a_transform_without_a_part_is_an_error():
    with pytest.raises(
        ft.OptimizerError, match=says("transforms without a part: 'tail'", "the parts are 'body', 'head'")
    ):
        ft.Optimizer(PARTS, {**TRAINED, "tail": optax.sgd(0.1)})


@pytest.mark.parametrize("tx", [0.1, None, optax.adam], ids=["a number", "None", "a factory"])
def test_what_is_not_a_transform_is_an_error(tx):
    with pytest.raises(
        ft.OptimizerError, match=says("part 'body'", "is no optax transform; write e.g. optax.adam(1e-3)")
    ):
        ft.Optimizer(PARTS, {**TRAINED, "body": tx})


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_not_positive_is_an_error(clip_norm):
    with pytest.raises(
        ft.OptimizerError, match=says(f"clip_norm={clip_norm}: give a positive norm, or None not to clip")
    ):
        ft.Optimizer(PARTS, TRAINED, clip_norm=clip_norm)


def test_gradients_of_an_unknown_part_are_an_error():
    optim, opt_state, grads = small()
    with pytest.raises(
        ft.OptimizerError, match=says("gradients of unknown parts: 'tail'; the parts are 'body', 'head'")
    ):
        optim.step(params(), {**grads, "tail": grads["head"]}, opt_state)


def test_gradients_as_a_whole_tree_are_an_error_that_says_how_to_split_them():
    parts = ft.partition(params(), {"matrix": "body/w", "rest": ...})
    optim = ft.Optimizer(parts, {"matrix": optax.sgd(0.1), "rest": optax.sgd(0.1)})
    message = says(
        "unknown parts: 'body', 'head'", "make_train_step(loss_fn, parts, wrt=optim.trained)", "parts.split(grads)"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(params(), params(), optim.init(params()))


def test_gradients_that_are_no_dict_are_an_error_that_says_how_to_split_them():
    whole = Model(jnp.ones(2), jnp.ones(2))
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.sgd(0.1)})
    with pytest.raises(ft.OptimizerError, match=says("must be split", "not Model", "parts.split(grads)")):
        optim.step(whole, whole, optim.init(whole))


# The parts' names are often those of the modules.
def test_a_whole_tree_whose_keys_are_the_parts_is_an_error_that_names_the_paths():
    optim, opt_state, _ = small()
    with pytest.raises(ft.PartitionError, match=says("part 'body' lacks 'body/b', 'body/w' and has 'w', 'b'")):
        optim.step(params(), params(), opt_state)


def test_gradients_of_a_frozen_part_are_an_error_that_names_wrt():
    optim, opt_state, _ = small(head=ft.FROZEN)
    message = says(
        "gradients of frozen parts: 'head'", "do not compute them", "make_train_step(loss_fn, parts, wrt=optim.trained)"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(params(), gradients("body", "head"), opt_state)


def test_a_missing_and_an_extra_path_in_a_parts_gradients_are_an_error_that_names_both():
    optim, opt_state, grads = small()
    grads["head"]["head/c"] = grads["head"].pop("head/w")
    with pytest.raises(ft.PartitionError, match=says("part 'head' lacks 'head/w' and has 'head/c'")):
        optim.step(params(), grads, opt_state)


def test_gradients_of_another_shape_are_an_error():
    optim, opt_state, grads = small()
    grads["head"]["head/w"] = jnp.ones(5)
    with pytest.raises(
        ft.OptimizerError, match=says("gradients of part 'head': 'head/w' has shape (5,), its parameter (2,)")
    ):
        optim.step(params(), grads, opt_state)


def test_per_example_gradients_that_no_transform_reduces_are_an_error():
    optim, opt_state, grads = small()
    per_example = jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), grads)
    with pytest.raises(ft.OptimizerError, match=says("updates of part 'body'", "has shape (3, 2), its parameter (2,)")):
        optim.step(params(), per_example, opt_state)


def test_params_of_other_shapes_than_were_partitioned_are_an_error():
    other = params() | {"head": {"w": jnp.ones(7), "b": jnp.ones(1)}}
    with pytest.raises(ft.OptimizerError, match=says("'head/w' has shape (7,), but (2,) when it was partitioned")):
        ft.Optimizer(PARTS, TRAINED).init(other)


def test_params_of_another_structure_than_was_partitioned_are_an_error():
    with pytest.raises(ft.PartitionError, match=says("lacks 'head/b', 'head/w'")):
        ft.Optimizer(PARTS, TRAINED).init({"body": params()["body"]})


@pytest.mark.parametrize(
    "leaf", [jnp.arange(2), jax.random.key(0), jnp.tanh, True], ids=["integers", "key", "function", "bool"]
)
def test_a_leaf_that_is_not_floating_point_may_only_be_in_a_frozen_part(leaf):
    whole = {"w": jnp.ones(2), "odd": leaf}
    everything = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.sgd(0.5)})
    message = says(
        "part 'all' is trained, but holds 'odd', which is not floating point", '("static": ft.non_float)', "ft.FROZEN"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        everything.init(whole)

    parts = ft.partition(whole, {"static": ft.non_float, "rest": ...})
    optim = ft.Optimizer(parts, {"static": ft.FROZEN, "rest": optax.sgd(0.5)})
    after, _ = optim.step(whole, {"rest": {"w": jnp.ones(2)}}, optim.init(whole))
    assert after["odd"] is leaf
    assert after["w"].tolist() == [0.5, 0.5]


def hiding(tx):
    """A transform around another that passes no extra arguments on."""
    return optax.GradientTransformation(tx.init, lambda updates, state, params=None: tx.update(updates, state, params))


@pytest.mark.parametrize(
    ("part", "head", "phrases"),
    [
        ("tail", optax.sgd(0.1), ["the unknown part 'tail'; the parts are 'body', 'head'"]),
        ("head", ft.FROZEN, ["part 'head', which is frozen: give it a transform, or leave it out of lr"]),
        ("head", optax.adam(0.1), ["part 'head', whose transform has no rate to set", "ft.with_lr(optax.adam, 1e-3)"]),
        (
            "head",
            hiding(ft.with_lr(optax.sgd, 0.1)),
            ["part 'head'", "would be lost", "GradientTransformationExtraArgs"],
        ),
    ],
    ids=["unknown", "frozen", "without with_lr", "hidden"],
)
def test_a_rate_for_a_part_that_cannot_take_it_is_an_error(part, head, phrases):
    optim, opt_state, grads = small(head=head)
    with pytest.raises(ft.OptimizerError, match=says(*phrases)):
        optim.step(params(), grads, opt_state, lr={part: 0.5})


@pytest.mark.parametrize(
    ("part", "head", "phrases"),
    [
        ("tail", optax.sgd(0.1), ["the unknown part 'tail'"]),
        ("head", ft.FROZEN, ["part 'head', which is frozen"]),
        ("head", optax.adam(0.1), ["part 'head', whose transform has no rate to set"]),
        (
            "head",
            SCHEDULED,
            ["the rate of part 'head' follows a schedule", "step(..., lr={'head': ...})", "constant rate"],
        ),
    ],
    ids=["unknown", "frozen", "without with_lr", "schedule"],
)
def test_setting_a_rate_that_cannot_be_set_is_an_error(part, head, phrases):
    optim, opt_state, _ = small(head=head)
    with pytest.raises(ft.OptimizerError, match=says(*phrases)):
        optim.with_learning_rates(opt_state, {part: 0.5})


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(ft.with_lr(optax.sgd, 0.1), ft.with_lr(optax.sgd, 0.1)),
        ft.with_lr(lambda lr: optax.chain(optax.clip(1.0), ft.with_lr(optax.sgd, lr)), 0.1),
    ],
    ids=["side by side", "nested"],
)
def test_two_rates_in_one_part_are_an_error(tx):
    optim = ft.Optimizer(PARTS, {**TRAINED, "head": tx})
    with pytest.raises(ft.OptimizerError, match=says("part 'head' has 2 with_lr", "give each a part of its own")):
        optim.init(params())


@pytest.mark.parametrize("call", ["step", "learning_rates", "with_learning_rates"])
def test_a_state_of_other_parts_is_an_error(call):
    _, opt_state, grads = small()
    optim, _, _ = small(body=ft.FROZEN)
    calls = {
        "step": lambda: optim.step(params(), {"head": grads["head"]}, opt_state),
        "learning_rates": lambda: optim.learning_rates(opt_state),
        "with_learning_rates": lambda: optim.with_learning_rates(opt_state, {}),
    }
    message = says(
        "the optimizer state is of the parts 'body', 'head', the optimizer trains 'head'", "optim.init(params)"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        calls[call]()


def test_a_transform_that_returns_a_state_of_another_structure_is_an_error():
    tx = optax.GradientTransformation(
        lambda params: {"old": jnp.zeros(())}, lambda updates, state, params: (updates, {"new": jnp.zeros(())})
    )
    optim, opt_state, grads = small(head=tx)
    message = says("part 'head'", "lacks 'old' and has 'new'", "restore it like optim.init(params)")
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(params(), grads, opt_state)


def test_every_error_is_a_value_error():
    assert issubclass(ft.OptimizerError, ValueError)


def test_a_state_of_another_transform_is_an_error():
    params = {"w": jnp.ones(2)}
    parts = ft.partition(params, {"all": ...})
    adam, sgd = (ft.Optimizer(parts, {"all": tx}) for tx in (optax.adam(0.1), optax.sgd(0.1)))
    for optim, other in ((adam, sgd), (sgd, adam)):
        with pytest.raises(
            ft.OptimizerError, match=r"the state of part 'all' is not one that its transform makes: .* use"
        ):
            optim.step(params, {"all": {"w": jnp.ones(2)}}, other.init(params))
