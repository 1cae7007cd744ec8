import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import SOAK

import functrain as ft


def two_losses(params, batch):
    """AIToolbox: L0 = 3a + 5b, L1 = 7a + 11b."""
    return ft.Loss({"L0": 3 * params["a"] + 5 * params["b"], "L1": 7 * params["a"] + 11 * params["b"]})


def ab_update(**options):
    params = {"a": jnp.ones((), jnp.float64), "b": jnp.full((), 2.0, jnp.float64)}
    parts = ft.partition(params, {"a": "a", "b": "b"})
    optim = ft.Optimizer(parts, {"a": optax.sgd(0.01), "b": optax.sgd(0.01)})
    update = ft.make_update(two_losses, optim, **options)
    return update, update.init(params)


@pytest.mark.parametrize(
    ("options", "a", "b"),
    [
        ({"route": {"a": "L0", "b": "L1"}}, lambda k: 1 - 0.03 * k, lambda k: 2 - 0.11 * k),
        ({}, lambda k: 1 - 0.1 * k, lambda k: 2 - 0.16 * k),
        ({"loss_weights": {"L1": 0.5}}, lambda k: 1 - 0.065 * k, lambda k: 2 - 0.105 * k),
        ({"route": {"a": {"L0": 2.0, "L1": 1.0}, "b": ["L1"]}}, lambda k: 1 - 0.13 * k, lambda k: 2 - 0.11 * k),
    ],
)
def test_each_part_learns_from_its_own_losses(options, a, b):
    """AIToolbox 1, whose own gradients cross over: a = 0.97, 0.87, 0.77."""
    with jax.enable_x64():
        update, state = ab_update(**options)
        for k in range(1, 4):
            state, _ = update(state, None)
            # A few operations on numbers of size 1 in float64.
            assert float(state.params["a"]) == pytest.approx(a(k), abs=1e-14)
            assert float(state.params["b"]) == pytest.approx(b(k), abs=1e-14)


def test_losses_are_logged_unweighted_each_under_its_own_name():
    """AIToolbox 5, which swaps them; "loss" is what is minimised."""
    with jax.enable_x64():
        for options, total in (({}, 42.0), ({"loss_weights": {"L1": 0.5}}, 27.5)):
            update, state = ab_update(**options)
            _, metrics = update(state, None)
            assert {name: float(value) for name, value in metrics.items()} == {"loss": total, "L0": 13.0, "L1": 29.0}
        update, state = ab_update(route={"a": {"L0": 0.5}, "b": "L1"})
        _, metrics = update(state, None)
        assert {name: float(value) for name, value in metrics.items()} == {"loss": 42.0, "L0": 13.0, "L1": 29.0}


def test_a_weight_may_be_a_schedule_of_the_update_count():
    with jax.enable_x64():
        for options in (
            {"loss_weights": {"L1": lambda step: jnp.where(step < 2, 0.0, 1.0)}},
            {"route": {part: {"L0": 1.0, "L1": lambda step: jnp.where(step < 2, 0.0, 1.0)} for part in "ab"}},
        ):
            update, state = ab_update(**options)
            for _ in range(3):
                state, _ = update(state, None)
            assert float(state.params["a"]) == pytest.approx(1 - 0.03 * 2 - 0.1, abs=1e-14)


def random_linear(seed, parts, losses):
    keys = jax.random.split(jax.random.key(seed), parts * losses).reshape(parts, losses)
    return {
        f"loss{j}": {f"part{i}": jax.random.normal(keys[i, j], (3,), jnp.float64) for i in range(parts)}
        for j in range(losses)
    }


@pytest.mark.slow
@settings(max_examples=12 * SOAK)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16))
def test_no_loss_leaks_into_a_part_that_is_not_given_it(data, n_parts, n_losses, seed):
    """Each part's gradient is that of exactly its weighted losses alone, even where another loss is NaN."""
    with jax.enable_x64():
        matrices = random_linear(seed, n_parts, n_losses)
        params = {f"part{i}": jnp.arange(1.0, 4.0, dtype=jnp.float64) for i in range(n_parts)}
        weights = st.sampled_from([0.25, 0.5, 1.0, 2.0])
        route = {
            part: data.draw(st.dictionaries(st.sampled_from(sorted(matrices)), weights, min_size=1)) for part in params
        }
        losses = sorted({name for of_part in route.values() for name in of_part})

        def value(params, name):
            return sum(jnp.sum(jnp.tanh(matrix * params[part])) for part, matrix in matrices[name].items())

        def loss_fn(params, batch):
            return ft.Loss({name: value(params, name) * batch[name] for name in losses})

        parts = ft.partition(params, {part: part for part in params})
        poisoned = data.draw(st.sampled_from(losses))
        batch = {name: jnp.float64(jnp.nan if name == poisoned else 1.0) for name in losses}
        grads, _ = ft.make_train_step(loss_fn, parts, route=route)(params, batch)
        for part, of_part in route.items():
            alone = jax.grad(lambda p, w=of_part: sum(w[n] * value(p, n) * batch[n] for n in w))(params)[part]
            # The weights are powers of two, so that only the order differs in which at most four terms are added.
            terms = [w * jax.grad(value)(params, name)[part] for name, w in of_part.items()]
            rounding = 3 * 2.0**-52 * float(sum(jnp.abs(term).max() for term in terms))
            np.testing.assert_allclose(grads[part][part], alone, rtol=0, atol=rounding)
            assert bool(jnp.isnan(grads[part][part]).any()) == (poisoned in of_part)


def trunk_and_heads(width=64):
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "trunk": [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[:4]],
        "left": jax.random.normal(keys[4], (width, width)) / width**0.5,
        "right": jax.random.normal(keys[5], (width, width)) / width**0.5,
    }

    def losses(params, x):
        for layer in params["trunk"]:
            x = jnp.tanh(x @ layer)
        return {"left": jnp.mean((x @ params["left"]) ** 2), "right": jnp.mean((x @ params["right"]) ** 2)}

    return params, losses, jnp.ones((32, width))


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_heads_are_not_differentiated_for_each_others_loss_and_the_trunk_once_for_its_own():
    params, losses, batch = trunk_and_heads()
    parts = ft.partition(params, {"trunk": "trunk", "left": "left", "right": "right"})
    matmul = 2 * 32 * 64 * 64

    def of(route, wrt=None):
        step = ft.make_train_step(lambda p, x: ft.Loss(losses(p, x)), parts, route=route, wrt=wrt)
        return flops(lambda p, x: step(p, x)[0], params, batch) / matmul

    heads = {"left": "left", "right": "right"}
    # Six products forward. Backward a head's own gradient is one; no gradient goes into the trunk.
    assert of(heads, wrt=("left", "right")) == pytest.approx(6 + 2, rel=0.05)
    # The trunk learns from the left alone: one product through that head, and 4 + 3 in the trunk.
    assert of({"trunk": "left", **heads}) == pytest.approx(6 + 2 + 1 + 7, rel=0.05)
    # From both with one weighting: another product through the right head, and the trunk is passed once.
    assert of({"trunk": ["left", "right"], **heads}) == pytest.approx(6 + 2 + 2 + 7, rel=0.05)


def test_per_loss_gives_the_gradient_of_each_loss_by_part():
    params, losses, batch = trunk_and_heads(8)
    batch = batch[:, :8]
    parts = ft.partition(params, {"trunk": "trunk", "heads": ...})
    step = ft.make_train_step(lambda p, x: ft.Loss(losses(p, x)), parts, per_loss=True, wrt="trunk")
    grads, loss = step(params, batch)
    assert list(grads) == ["left", "right"]
    for name in grads:
        alone = parts.split(jax.grad(lambda p, n=name: losses(p, batch)[n])(params))
        assert list(grads[name]) == ["trunk"]
        for path, leaf in grads[name]["trunk"].items():
            # The same backward pass, of a linearisation and of a function: float32's last bits.
            np.testing.assert_allclose(leaf, alone["trunk"][path], rtol=1e-5, atol=1e-8)
    assert float(loss.total) == pytest.approx(float(loss.value["left"] + loss.value["right"]))


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"microbatches": 2}, {"loss_scale": ft.DynamicScale()}])
def test_routes_work_with_accumulation_microbatches_and_a_scaled_loss(options):
    params, losses, batch = trunk_and_heads(8)
    batch = jax.random.normal(jax.random.key(1), (8, 8))
    parts = ft.partition(params, {"trunk": "trunk", "left": "left", "right": "right"})
    optim = ft.Optimizer(parts, dict.fromkeys(parts.names, optax.sgd(0.1)))
    route = {"trunk": {"left": 1.0, "right": 0.25}, "left": "left", "right": "right"}
    plain, other = (ft.make_update(lambda p, x: ft.Loss(losses(p, x)), optim, route=route, **o) for o in ({}, options))
    expected, _ = plain(plain.init(params), batch)
    state = other.init(params)
    for _ in range(options.get("accumulate", 1)):
        state, _ = other(state, batch)
    # Means of halves against the mean of all, in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, expected.params)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ({"a": "L0", "b": "L1", "c": "L0"}, "route: 'c' is no part that is differentiated: these are 'a', 'b'"),
        ({"a": "L0"}, "route gives no loss to 'b': add e.g. {'b': \"main\"}, or freeze it"),
        ({"a": "L0", "b": {}}, "route gives no loss to 'b'"),
    ],
)
def test_a_route_that_does_not_fit_the_parts_is_an_error_when_the_update_is_made(route, message):
    with jax.enable_x64(), pytest.raises(ft.LossError, match=re.escape(message)):
        ab_update(route=route)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": {"a": "L0", "b": "L2"}}, "route of part 'b' names 'L2', but the loss function returned 'L0', 'L1'"),
        (
            {"route": {"a": "L0", "b": "L0"}},
            "no part takes the loss 'L1': add it to the route, or report it",
        ),
        ({"loss_weights": {"l0": 1.0}}, "loss_weights names 'l0', but the loss function returned 'L0', 'L1'"),
    ],
)
def test_a_loss_that_is_unknown_or_idle_is_an_error_when_traced(options, message):
    with jax.enable_x64():
        update, state = ab_update(**options)
        with pytest.raises(ft.LossError, match=re.escape(message)):
            update(state, None)


def test_route_weights_and_per_loss_exclude_each_other():
    params = {"a": 1.0, "b": 2.0}
    parts = ft.partition(params, {"a": "a", "b": "b"})
    with pytest.raises(ft.LossError, match="exclude each other: put the weights into the route"):
        ft.make_train_step(two_losses, parts, route={"a": "L0", "b": "L1"}, loss_weights={"L0": 2.0})
    with pytest.raises(ft.LossError, match="route needs a partition"):
        ft.make_train_step(two_losses, route={"a": "L0"})


def test_a_schedule_needs_the_step():
    step = ft.make_train_step(two_losses, loss_weights={"L0": lambda step: 1.0 / (step + 1)})
    with pytest.raises(
        ft.LossError, match=re.escape("weight of the loss 'L0' is a schedule: call train_step(..., step")
    ):
        step({"a": 1.0, "b": 2.0}, None)
    assert step({"a": 1.0, "b": 2.0}, None, step=1)


def changing(params, batch):
    return ft.Loss({"main": jnp.sum(params["a"])} | ({"aux": params["b"]} if batch.shape[0] > 2 else {}))


def test_what_a_train_step_accepts_does_not_depend_on_what_was_traced_before():
    step = jax.jit(ft.make_train_step(changing))
    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    assert [sorted(step(params, jnp.ones(size))[1].values) for size in (4, 2, 4)] == [
        ["aux", "main"],
        ["main"],
        ["aux", "main"],
    ]
