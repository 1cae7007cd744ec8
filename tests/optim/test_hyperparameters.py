"""`with_state`: any hyperparameter as state, read, set, and given at a step, without recompiling."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functrain as ft

PARAMS = {"w": jnp.array([4.0, 8.0]), "b1": jnp.array([1.0, 1.0])}  # A parameter named like a hyperparameter.
GRADS = {"part": {"w": jnp.array([1.0, -2.0])}, "other": {"b1": jnp.array([0.5, 0.5])}}
adamw = functools.partial(ft.with_state, optax.adamw, learning_rate=0.5, b1=0.75, b2=0.999)


def optimizer(tx, other=None, params=PARAMS):
    parts = ft.partition(params, {"part": "w", "other": "b1"})
    return ft.Optimizer(parts, {"part": tx, "other": optax.sgd(0.5) if other is None else other})


def run(optim, opt_state=None, steps=3, params=PARAMS, grads=GRADS, **given):
    opt_state = optim.init(params) if opt_state is None else opt_state
    for _ in range(steps):
        params, opt_state = optim.step(params, grads, opt_state, **given)
    return params, opt_state


def numbers(optim, opt_state, part="part"):
    return {name: float(f"{value:.6g}") for name, value in optim.hyperparameters(opt_state)[part].items()}


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in ft.flatten(tree).items()}


def says(*texts):
    return ".*".join(map(re.escape, texts))


# What is state.


def test_floats_and_schedules_are_state_and_all_else_is_a_constant():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = ft.with_state(
        optax.adamw, learning_rate=schedule, b1=np.float32(0.5), weight_decay=jnp.bfloat16(0.25), nesterov=True,
        mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 0, tree), mu_dtype=None,
    )  # fmt: skip
    optim = optimizer(tx)
    assert numbers(optim, optim.init(PARAMS)) == {"learning_rate": 1.0, "b1": 0.5, "weight_decay": 0.25}


def test_a_partial_keeps_a_float_constant():
    optim = optimizer(ft.with_state(functools.partial(optax.adam, b2=0.5), learning_rate=0.5))
    assert numbers(optim, optim.init(PARAMS)) == {"learning_rate": 0.5}


@pytest.mark.parametrize("name", ["momentum", "nesterov", "weight_decay", "norm"])
def test_hyperparameters_as_state_step_like_constants(name):
    def decayed(learning_rate, decay):
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate))

    def normed(learning_rate, norm):
        return optax.chain(optax.clip_by_global_norm(norm), optax.sgd(learning_rate))

    factory, given = {
        "momentum": (functools.partial(optax.sgd), {"momentum": 0.75}),
        "nesterov": (functools.partial(optax.sgd, nesterov=True), {"momentum": 0.75}),
        "weight_decay": (decayed, {"decay": 0.25}),
        "norm": (normed, {"norm": 0.5}),
    }[name]
    one, _ = run(optimizer(ft.with_state(factory, learning_rate=0.5, **given)))
    other, _ = run(optimizer(factory(learning_rate=0.5, **given)))
    assert bits(one) == bits(other)


def test_a_schedule_of_any_hyperparameter_counts_the_steps_of_its_part():
    tx = ft.with_state(optax.sgd, learning_rate=1.0, momentum=optax.linear_schedule(0.0, 1.0, 4))
    optim = optimizer(tx)
    _, opt_state = run(optim, steps=2)
    _, opt_state = run(optim, opt_state, steps=1, grads={"other": GRADS["other"]})
    assert numbers(optim, opt_state) == {"learning_rate": 1.0, "momentum": 0.25}


def test_a_schedule_of_the_run_is_at_the_step_that_is_given():
    tx = ft.with_state(optax.sgd, learning_rate=1.0, momentum=optax.linear_schedule(0.0, 1.0, 4), clock="run")
    optim = optimizer(tx)
    assert numbers(optim, run(optim, steps=1, step=3)[1])["momentum"] == 0.75
    with pytest.raises(ft.OptimizerError, match=says("with_state(sgd", "was not told the step of the run")):
        run(optim)


# Reading, setting, giving.


def test_one_is_set_for_one_step_alone():
    optim = optimizer(adamw())
    _, opt_state = run(optim, steps=1, set={"part": {"b1": 0.25, "learning_rate": 0.125}})
    assert numbers(optim, opt_state) == {"learning_rate": 0.125, "b1": 0.25, "b2": 0.999}
    _, opt_state = run(optim, opt_state, steps=1)
    assert numbers(optim, opt_state) == {"learning_rate": 0.5, "b1": 0.75, "b2": 0.999}


def test_one_is_set_for_good_and_steps_like_a_constant_of_that_value():
    optim = optimizer(ft.with_state(optax.sgd, learning_rate=0.5, momentum=0.75))
    opt_state = optim.with_hyperparameters(optim.init(PARAMS), {"part": {"momentum": 0.25}})
    one, opt_state = run(optim, opt_state)
    other, _ = run(optimizer(optax.sgd(0.5, momentum=0.25)))
    assert bits(one) == bits(other)
    assert numbers(optim, opt_state) == {"learning_rate": 0.5, "momentum": 0.25}


def test_the_rate_is_one_of_them():
    optim = optimizer(adamw(), ft.with_lr(optax.sgd, 0.5))
    opt_state = optim.with_learning_rates(optim.init(PARAMS), {"part": 0.25})
    opt_state = optim.with_hyperparameters(opt_state, {"other": {"learning_rate": 0.125}})
    assert {part: float(rate) for part, rate in optim.learning_rates(opt_state).items()} == {
        "part": 0.25, "other": 0.125,
    }  # fmt: skip
    _, opt_state = run(optim, opt_state, steps=1, lr={"part": 0.0625})
    assert numbers(optim, opt_state)["learning_rate"] == 0.0625


def test_two_transforms_of_a_part_may_hold_different_ones():
    tx = optax.chain(ft.with_state(optax.clip_by_global_norm, max_norm=1.0), ft.with_lr(optax.sgd, 1.0, momentum=None))
    optim = optimizer(tx)
    assert numbers(optim, optim.init(PARAMS)) == {"max_norm": 1.0, "learning_rate": 1.0}
    after, _ = run(optim, steps=1, set={"part": {"max_norm": 0.5}})
    np.testing.assert_allclose(jnp.linalg.norm(after["w"] - PARAMS["w"]), 0.5, rtol=1e-6)


def test_no_value_recompiles():
    optim = optimizer(adamw())
    step = jax.jit(lambda params, opt_state, given: optim.step(params, GRADS, opt_state, set=given))
    params, opt_state = PARAMS, optim.init(PARAMS)
    for value in (0.25, 0.5, 0.75):
        opt_state = optim.with_hyperparameters(opt_state, {"part": {"b2": value}})
        params, opt_state = step(params, opt_state, {"part": {"b1": value}})
    assert step._cache_size() == 1


# 16 bits.


def test_b2_is_0_999_for_bfloat16_and_the_moments_keep_their_dtype():
    params, grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (jax.tree.map(jnp.zeros_like, PARAMS), GRADS))
    optim = optimizer(adamw(learning_rate=0.01), params=params)
    before = optim.init(params)
    after, opt_state = run(optim, steps=20, params=params, grads=grads)
    assert numbers(optim, opt_state)["b2"] == 0.999
    assert jax.tree.map(jnp.result_type, opt_state) == jax.tree.map(jnp.result_type, before)
    assert after["w"].dtype == jnp.bfloat16
    # Adam's steps with a constant gradient are those of the rate, 20 of 0.01, in 8 bits.
    np.testing.assert_allclose(np.float32(after["w"]), [-0.2, 0.2], rtol=0.1)


def test_a_state_scans_without_an_optimizer_around_it():
    tx, params = adamw(), {"w": jnp.ones(2, jnp.bfloat16)}

    def step(carry, _):
        updates, state = tx.update(params, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    jax.lax.scan(step, (params, tx.init(params)), None, length=2)


# Other forms of the state.


def test_a_new_optimizer_has_its_own_hyperparameters_and_the_moments_of_the_old_one():
    old, new = optimizer(ft.with_lr(optax.adamw, 0.5)), optimizer(adamw())
    _, opt_state = run(old)
    adopted, report = new.adopt(old, opt_state, PARAMS)
    assert numbers(new, adopted) == {"learning_rate": 0.5, "b1": 0.75, "b2": 0.999}
    np.testing.assert_array_equal(
        optax.tree.get(adopted["part"].inner, "mu")["w"], optax.tree.get(opt_state["part"].inner, "mu")["w"]
    )
    assert "part: started anew: hyperparameters (3 leaves), settings (3 leaves)" in str(report)


def test_it_prints_its_constants_and_schedules():
    tx = ft.with_state(optax.adamw, learning_rate=optax.cosine_decay_schedule(1.0, 4), b1=0.5, nesterov=True)
    assert "adamw(learning_rate=cosine_decay_schedule, nesterov=True)" in str(optimizer(tx))


# Mistakes.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"part": {"rate": 0.5}}, says("set for part 'part': it has no 'rate' to set; what is state of it is 'b1',",
                                       "ft.with_state(optax.adamw, rate=...)")),
        ({"part": {"learn_rate": 0.5}}, says("did you mean 'learning_rate'?")),
        ({"other": {"momentum": 0.5}}, says("part 'other': it has no 'momentum' to set; nothing of it is state; make",
                                            "ft.with_state(optax.adamw, momentum=...)")),
        ({"part": {"b1": jnp.ones(2)}}, says("set for 'b1' of part 'part' is an array of shape (2,): give a finite")),
        ({"prat": {"b1": 0.5}}, says("set for the unknown part 'prat'", "did you mean 'part'?")),
        ({"part": 0.5}, says("set={'part': 0.5}: give hyperparameters by part and name")),
    ],
    ids=["unknown", "misspelt", "none", "no number", "no part", "no name"],
)  # fmt: skip
def test_what_can_not_be_set_is_an_error_that_says_what_can(given, message):
    optim = optimizer(adamw())
    opt_state = optim.init(PARAMS)
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(PARAMS, GRADS, opt_state, set=given)
    with pytest.raises(ft.OptimizerError, match=message):
        optim.with_hyperparameters(opt_state, given)


def test_a_schedule_can_not_be_set_for_good():
    optim = optimizer(adamw(b1=optax.linear_schedule(0.5, 0.75, 4)))
    with pytest.raises(
        ft.OptimizerError, match=says("'b1' of part 'part' follows a schedule", "step(..., set={'part': {'b1': ...}})")
    ):
        optim.with_hyperparameters(optim.init(PARAMS), {"part": {"b1": 0.5}})


def test_a_rate_in_lr_and_in_set_is_an_error():
    with pytest.raises(ft.OptimizerError, match=says("part 'part' has its rate in lr= and in set=: leave one out")):
        run(optimizer(adamw()), lr={"part": 0.5}, set={"part": {"learning_rate": 0.5}})


def test_two_of_one_name_in_a_part_are_an_error():
    clip = ft.with_state(optax.clip_by_global_norm, max_norm=1.0)
    with pytest.raises(ft.OptimizerError, match=says("part 'part' has 'max_norm' twice, in two with_state")):
        optimizer(optax.chain(clip, clip, optax.sgd(0.5))).init(PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ft.with_state(optax.adam(0.5)), says("give the function that makes the transform")),
        (lambda: ft.with_state(optax.sgd, learning_rate=1), says("'learning_rate', none is state", "=1.0")),
        (lambda: ft.with_state(optax.sgd, learning_rate=float("inf")), says("learning_rate=...): it is inf: give a")),
        (lambda: ft.with_state(optax.sgd, learning_rate=1.0, clock="run"), says("'learning_rate' has no schedule")),
        (lambda: ft.with_state(optax.sgd, learning_rate=1.0, clock="me"), says("clock='me'): write 'part' or 'run'")),
    ],
    ids=["a transform", "an integer", "no number", "no schedule", "no clock"],
)  # fmt: skip
def test_what_makes_no_state_is_an_error(make, message):
    with pytest.raises(ft.OptimizerError, match=message):
        make()


def test_a_transform_that_hands_nothing_on_loses_what_is_set():
    inner = adamw()
    plain = optax.GradientTransformation(inner.init, lambda updates, state, params=None: inner.update(updates, state))
    with pytest.raises(ft.OptimizerError, match=says("around its with_state takes no extra arguments, so that 'b1'")):
        run(optimizer(plain), set={"part": {"b1": 0.5}})


def test_an_argument_that_the_factory_does_not_take_is_an_error_where_it_is_given():
    with pytest.raises(ft.OptimizerError, match=r"with_state\(adamw, ...\): it takes no 'b_1'; .*did you mean 'b1'"):
        ft.with_state(optax.adamw, learning_rate=0.1, b_1=0.9)
    with pytest.raises(ft.OptimizerError, match=r"with_lr\(adam, ...\): it takes no 'momentum'; its arguments are"):
        ft.with_lr(optax.adam, 0.1, momentum=0.9)
