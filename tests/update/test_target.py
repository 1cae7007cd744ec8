"""Target networks: a part that follows another one after each step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


def network(scale=1.0):
    return {"layers": [{"w": scale * jnp.arange(6.0).reshape(2, 3)}, {"w": scale * jnp.ones(3)}], "bias": jnp.ones(())}


def q_params(**others):
    return {"critic": {"online": network(), "target": network(0.5)}} | others


RULES = {"q": "critic/online", "q_target": "critic/target"}


def optimizer_of(params, rules=None, **transforms):
    parts = ft.partition(params, rules or RULES)
    by_part = {"q": optax.sgd(0.1), "q_target": ft.FROZEN} | transforms
    return ft.Optimizer(parts, {part: by_part.get(part, ft.FROZEN) for part in parts.names})


def loss_fn(params, batch):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params["critic"]["online"])) * batch


def run(update, state, count):
    for _ in range(count):
        state, _ = update(state, jnp.float32(1.0))
    return state


@pytest.mark.parametrize(("target", "of"), [("q_target", "q"), ("critic/target", "critic/online"), ("**/target", "q")])
def test_the_target_is_optaxs_incremental_update_to_the_bit(target, of):
    params = q_params()
    update = ft.make_update(loss_fn, optimizer_of(params), after=ft.ema(target, of=of, decay=0.995))
    state, expected = update.init(params), params["critic"]["target"]
    polyak = jax.jit(lambda new, old: optax.incremental_update(new, old, 1 - 0.995))
    for _ in range(3):
        state = run(update, state, 1)
        expected = polyak(state.params["critic"]["online"], expected)
        jax.tree.map(np.testing.assert_array_equal, state.params["critic"]["target"], expected)


def test_the_decay_may_be_a_schedule_of_the_step():
    params = q_params()
    after = ft.ema("q_target", of="q", decay=lambda step: jnp.where(step < 3, 1.0, 0.0))
    update = ft.make_update(loss_fn, optimizer_of(params), after=after, accumulate=2)
    state = run(update, update.init(params), 4)
    jax.tree.map(np.testing.assert_array_equal, state.params["critic"]["target"], params["critic"]["target"])
    state = run(update, state, 2)
    jax.tree.map(np.testing.assert_array_equal, state.params["critic"]["target"], state.params["critic"]["online"])


def test_a_phase_may_have_its_own_target():
    params = q_params(actor=jnp.ones(2))
    optim = optimizer_of(params, RULES | {"actor": ...}, actor=optax.sgd(0.1))
    critic = ft.Phase("critic", loss_fn, "q", after=ft.ema("q_target", of="q", decay=0.0))
    actor = ft.Phase("actor", lambda params, batch: jnp.sum(params["actor"]) * batch, "actor")
    update = ft.make_update(ft.alternate(critic, actor), optim)
    state = run(update, update.init(params), 1)
    followed = jax.tree.map(np.asarray, state.params["critic"]["target"])
    jax.tree.map(np.testing.assert_array_equal, followed, state.params["critic"]["online"])
    state = run(update, state, 1)
    jax.tree.map(np.testing.assert_array_equal, state.params["critic"]["target"], followed)


def test_it_can_be_called_in_an_after_of_ones_own():
    polyak = ft.ema("critic/target", of="critic/online", decay=0.0)

    def after(params, model_state, step):
        params = params | {"bound": jnp.clip(params["bound"] + step, 0, 1)}
        return polyak(params, model_state, step)

    params = q_params(bound=jnp.zeros(2))
    update = ft.make_update(loss_fn, optimizer_of(params, RULES | {"rest": ...}), after=after)
    state = run(update, update.init(params), 1)
    jax.tree.map(np.testing.assert_array_equal, *[state.params["critic"][name] for name in ("target", "online")])
    assert state.params["bound"].tolist() == [1.0, 1.0]


def test_leaves_that_are_not_floating_point_are_taken_over_and_16_bits_follow_in_32():
    params = {
        "online": {"w": jnp.full(2, 3.0, jnp.bfloat16), "n": jnp.int32(7)},
        "target": {"w": jnp.ones(2), "n": jnp.int32(0)},
    }
    after = ft.ema("target", of="online", decay=0.999)
    followed, _ = after(params, None, 1)
    assert int(followed["target"]["n"]) == 7
    assert followed["target"]["w"].dtype == jnp.float32
    np.testing.assert_allclose(followed["target"]["w"], 1.002, rtol=1e-6)


def test_two_single_leaves_follow_whatever_they_are_called():
    followed, _ = ft.ema("target", of="online", decay=0.5)({"target": jnp.zeros(2), "online": jnp.ones(2)}, None, 1)
    assert followed["target"].tolist() == [0.5, 0.5]


def made(target="q_target", of="q", *, params=None, rules=None, **transforms):
    params = q_params() if params is None else params
    optim = optimizer_of(params, rules, **transforms)
    return ft.make_update(loss_fn, optim, after=ft.ema(target, of=of, decay=0.9))


def misfit(**changed):
    return {"critic": {"online": network(), "target": network() | changed}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made("q_traget"), "ft.ema('q_traget', of='q'): no leaf matches 'q_traget'"),
        (lambda: made(params=misfit(scale=jnp.ones(2))), "it has 'scale', which is not expected; begin with a copy"),
        (lambda: made(params=misfit(bias=jnp.ones(2))),
         "'critic/target/bias' of shape (2,) can't follow 'critic/online/bias' of shape ()"),
        (lambda: made(params=misfit(bias=jnp.ones((), jnp.bfloat16))), "keep the target in float32"),
        (lambda: made("q", of="q_target"), "of the target is trained by an optimizer as well"),
        (lambda: made(of="q_target"), "can't follow 'critic/target/bias'"),
        (lambda: ft.ema("q_target", of="q", decay=1.5), "decay=1.5): give a number of at least 0 and below 1"),
        (lambda: ft.make_update(loss_fn, optimizer_of(q_params()), after="q_target"),
         "after='q_target': give a function (params, model_state, step) -> (params, model_state)"),
    ],
)  # fmt: skip
def test_a_target_that_can_not_follow_is_an_error_when_the_update_is_made(make, message):
    with pytest.raises(ft.UpdateError, match=re.escape(message)):
        make()
