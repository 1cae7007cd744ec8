"""`Optimizer`: one optax transform per part, what a step does to each, and what a transform is given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from optimizers import PARTS, SCHEDULED, Model, bits, gradients, params

import functrain as ft

# The state, and what a step does to it.


def test_the_state_has_an_entry_per_trained_part_in_the_order_of_the_parts_and_none_for_a_frozen_one():
    parts = ft.partition(params(), {"z": "body/w", "frozen": "body/b", "a": ...})
    optim = ft.Optimizer(parts, {"a": optax.sgd(0.1), "frozen": ft.FROZEN, "z": optax.adam(0.1)})
    assert optim.trained == ("z", "a")
    opt_state = optim.init(params())
    assert list(opt_state) == ["z", "a"]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(opt_state)) == [(), (2, 2), (2, 2)]


def test_the_state_of_a_part_is_optaxs_own_with_a_flat_dict_in_the_place_of_every_tree_like_the_models():
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


def test_extra_arguments_reach_the_transform_that_takes_them_and_others_ignore_them():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    optim = ft.Optimizer(PARTS, {"body": optax.chain(optax.sgd(1.0), plateau), "head": optax.sgd(1.0)})
    ones = jax.tree.map(jnp.ones_like, PARTS.split(params()))
    opt_state, moved = optim.init(params()), []
    for _ in range(3):
        updates, opt_state = optim.update(ones, opt_state, params(), value=1.0)
        moved.append((float(updates["body"]["body/b"][0]), float(updates["head"]["head/b"][0])))
    assert moved == [(-1.0, -1.0), (-0.5, -1.0), (-0.25, -1.0)]


@pytest.mark.slow
def test_lbfgs_in_one_part_is_lbfgs_alone_on_its_subtree():
    optim = ft.Optimizer(PARTS, {"body": optax.lbfgs(), "head": ft.FROZEN})
    whole, opt_state = params(), optim.init(params())
    alone, state_alone = whole["body"], optax.lbfgs().init(whole["body"])

    def loss(whole):
        return sum(jnp.sum(jnp.square(leaf - 3.0) * (1.0 + jnp.abs(leaf))) for leaf in jax.tree.leaves(whole["body"]))

    @jax.jit
    def step(whole, opt_state):
        value, grads = jax.value_and_grad(loss)(whole)
        split = {"body": PARTS.split(grads)["body"]}
        return optim.step(whole, split, opt_state, value=value, grad=grads, value_fn=loss)

    @jax.jit
    def step_alone(body, state):
        value, grads = jax.value_and_grad(lambda body: loss({"body": body}))(body)
        extra = {"value": value, "grad": grads, "value_fn": lambda body: loss({"body": body})}
        updates, state = optax.lbfgs().update(grads, state, body, **extra)
        return optax.apply_updates(body, updates), state

    for _ in range(4):
        whole, opt_state = step(whole, opt_state)
        alone, state_alone = step_alone(alone, state_alone)
    assert bits(whole["body"]) == bits(alone)
    assert loss(whole) < 0.2 * loss(params())


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
    cells = [line.split(maxsplit=5)[-1] for line in str(optim).splitlines()[:4]]
    made = "chain(identity, scale(step_size=-0.1))"
    assert cells == ["optimizer", "adamw", "frozen", made]
    assert repr(optim) == f"Optimizer(w: adamw, b: frozen, head: {made})"


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
