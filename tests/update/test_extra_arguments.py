"""Transforms that ask for the loss, its gradient, or a function of the two: what they ask for, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from soak import SOAK
from trees import bits, says

import functrain as ft
from functrain.optim.declared import declared

X, Y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32), jnp.arange(8) % 2


def params():
    return {"body": {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)}, "head": {"b": jnp.array([0.5, -0.5])}}


def loss_fn(params, batch):
    x, y = batch
    logits = jnp.tanh(x @ params["body"]["w"]) + params["head"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


PARTS = ft.partition(params(), {"body": "body", "head": "head"})


def asking(*names, seen):
    """A transform that declares these arguments, and keeps what it is given."""

    def update(updates, state, params, **extra):
        seen.append((extra, params))
        return updates, state

    declaration = ", ".join(("updates", "state", "params", "*", *names))
    given = ", ".join(f"{name}={name}" for name in names)
    scope = {"inner": update}
    exec(f"def update({declaration}): return inner(updates, state, params, {given})", scope)
    return optax.GradientTransformationExtraArgs(lambda params: (), scope["update"])


def pure_step(tx, loss=loss_fn, batch=(X, Y), model_state=None, **options):
    """One step of an update outside of `jit`, so that what a transform was given can be looked at."""
    optim = ft.Optimizer(PARTS, {"body": tx, "head": optax.adam(0.1)})
    update = ft.make_update(loss, optim, audit=False, **options)
    return update.pure(update.init(params(), key=jax.random.key(0), model_state=model_state), batch)


# What is given.


@pytest.mark.parametrize("name", ["value", "grad", "value_fn", "grad_fn", "obj_fn"])
def test_a_transform_is_given_what_it_declares_and_nothing_else(name):
    seen = []
    pure_step(asking(name, seen=seen))
    ((extra, own),) = seen
    assert list(extra) == [name]
    value, grads = jax.value_and_grad(loss_fn)(params(), (X, Y))
    masked = PARTS.masked(grads, "body")
    found = extra[name](own) if name.endswith("_fn") else extra[name]
    expected = masked if "grad" in name else value
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (optax.adam(0.1), set()),
        (optax.lbfgs(), {"value", "grad", "value_fn"}),
        (optax.chain(optax.clip(1.0), optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))), {"grad_fn"}),
        (optax.masked(optax.polyak_sgd(), lambda tree: jax.tree.map(lambda _: True, tree)), {"value"}),
        (optax.MultiSteps(optax.lbfgs(), 2).gradient_transformation(), {"value", "grad", "value_fn"}),
        (ft.with_lr(optax.contrib.sophia, 0.1), {"obj_fn"}),
        (optax.partition({"a": optax.contrib.momo(0.1)}, lambda tree: jax.tree.map(lambda _: "a", tree)), {"value"}),
    ],
    ids=["adam", "lbfgs", "sam in a chain", "masked", "MultiSteps", "with_lr", "partition"],
)
def test_what_a_transform_is_made_of_declares_for_it(tx, names):
    assert declared(tx) == names


def test_a_transform_that_takes_anything_and_says_nothing_is_given_what_there_is():
    seen = []

    def update(updates, state, params, **extra):
        seen.append(extra)
        return updates, state

    pure_step(optax.GradientTransformationExtraArgs(lambda params: (), update))
    assert seen[0].keys() == {"value", "value_fn", "step"}


def noisy(params, batch, key, model_state):
    x, y = batch
    noise = jax.random.normal(key, x.shape)
    logits = (x + noise) @ params["body"]["w"] + params["head"]["b"] + model_state
    value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return ft.Loss(
        {"main": value, "aux": jnp.sum(params["body"]["w"] ** 2)}, weight=jnp.sum(y), model_state=model_state + 1
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"microbatches": 4},
        {"loss_weights": {"aux": 0.25}},
        {"route": {"body": {"main": 1.0, "aux": lambda step: 0.5 / (step + 1)}, "head": "main"}},
        {"route": {"body": ["main", "aux"], "head": "main"}, "microbatches": 2},
    ],
    ids=["plain", "microbatches", "weights", "route", "route of microbatches"],
)
def test_the_function_is_the_loss_that_the_part_learns_from_with_its_key_its_state_and_its_weights(options):
    seen = []
    pure_step(asking("value", "value_fn", "grad", "grad_fn", seen=seen), noisy, model_state=jnp.zeros(2), **options)
    ((extra, own),) = seen
    # The same sums, once forwards alone and once with a backward pass.
    np.testing.assert_allclose(extra["value_fn"](own), extra["value"], rtol=1e-6)
    np.testing.assert_allclose(extra["grad_fn"](own, 0)["body"]["w"], extra["grad"]["body"]["w"], rtol=1e-5, atol=1e-6)


def test_parts_that_are_the_keys_of_the_model_are_told_from_arguments_by_part():
    seen, whole = [], {"a": jnp.float32(2.0), "b": jnp.float32(3.0)}
    parts = ft.partition(whole, {"a": "a", "b": "b"})
    optim = ft.Optimizer(parts, {"a": asking("value", "value_fn", seen=seen), "b": optax.sgd(0.1)})
    losses = lambda params, batch: ft.Loss({"one": params["a"] ** 2, "two": params["b"] * params["a"]})  # noqa: E731
    update = ft.make_update(losses, optim, route={"a": "one", "b": "two"}, audit=False)
    update.pure(update.init(whole), None)
    ((extra, own),) = seen
    assert own == {"a": 2.0, "b": optax.MaskedNode()}
    assert (float(extra["value"]), float(extra["value_fn"](own))) == (4.0, 4.0)


def test_the_gradient_is_the_one_before_clipping():
    seen = []
    optim = ft.Optimizer(PARTS, {"body": asking("grad", seen=seen), "head": ft.FROZEN}, clip_norm=1e-3)
    grads = {"body": PARTS.split(params())["body"]}
    updates, _ = optim.update(grads, optim.init(params()), params())
    assert bits(seen[0][0]["grad"]["body"]["w"]) == bits(grads["body"]["body/w"])
    assert abs(updates["body"]["body/w"]).max() < 1e-3


# What a window cannot give.


def window(update, state):
    for _ in range(2):
        state, _ = update(state, (X, Y))


def scan(update, state):
    update.scan(state, jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), (X, Y)))


@pytest.mark.parametrize("run", [window, scan])
@pytest.mark.parametrize("tx", [optax.lbfgs(), optax.contrib.sophia(0.1)], ids=["lbfgs", "sophia"])
def test_a_loss_function_over_accumulated_batches_is_an_error_before_the_first_step(tx, run):
    optim = ft.Optimizer(PARTS, {"body": tx, "head": optax.adam(0.1)})
    update = ft.make_update(loss_fn, optim, accumulate=2)
    message = says("accumulate=2: a transform calls value_fn or grad_fn", "write microbatches=2")
    with pytest.raises(ft.UpdateError, match=message):
        run(update, update.init(params()))


# Whole optimizers.


def by_hand(tx, extra, steps=3):
    """Steps of `optax.multi_transform`, with the extra arguments of the batch that a part's author writes."""
    multi = optax.multi_transform({"body": tx, "head": optax.adam(0.1)}, PARTS.labels())
    whole, state = params(), multi.init(params())
    for _ in range(steps):
        grads = jax.grad(loss_fn)(whole, (X, Y))
        updates, state = multi.update(grads, state, whole, **extra(whole))
        whole = optax.apply_updates(whole, updates)
    return whole


def in_the_update(tx, steps=3, **options):
    optim = ft.Optimizer(PARTS, {"body": tx, "head": optax.adam(0.1)})
    update = ft.make_update(loss_fn, optim, **options)
    state = update.init(params())
    for _ in range(steps):
        state, _ = update.pure(state, (X, Y))
    return state.params


def in_a_loop(tx, steps=3):
    optim = ft.Optimizer(PARTS, {"body": tx, "head": optax.adam(0.1)})
    train_step = ft.make_train_step(loss_fn, PARTS)
    whole, opt_state = params(), optim.init(params())
    for _ in range(steps):
        grads, loss = train_step(whole, (X, Y))
        value_fn = lambda whole: loss_fn(whole, (X, Y))  # noqa: E731
        whole, opt_state = optim.step(whole, grads, opt_state, value=loss.value, value_fn=value_fn)
    return whole


def of_body(function, whole):
    """A function of whole params as one of masked ones, as its author must write it under `multi_transform`."""
    return lambda masked: function({"body": masked["body"], "head": whole["head"]}, (X, Y))


def sam(**options):
    return optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), **options)


WHOLE = {
    "sam": (sam(), lambda whole: {}),
    "sam, opaque": (
        sam(opaque_mode=True),
        lambda whole: {"grad_fn": lambda masked, _: jax.grad(of_body(loss_fn, whole))(masked)},
    ),
    "sophia": (optax.contrib.sophia(0.1), lambda whole: {"obj_fn": of_body(loss_fn, whole)}),
    "schedule_free": (optax.contrib.schedule_free_sgd(0.1), lambda whole: {}),
    "polyak_sgd": (optax.polyak_sgd(), lambda whole: {"value": loss_fn(whole, (X, Y))}),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("run", [in_the_update, in_a_loop])
def test_an_optimizer_that_asks_for_more_steps_to_the_bit_as_in_optax(run, name):
    tx, extra = WHOLE[name]
    after = run(tx)
    assert bits(after) == bits(by_hand(tx, extra))
    assert (after["body"]["w"] != params()["body"]["w"]).all()


@pytest.mark.parametrize("options", [{}] + [{"microbatches": 3}] * (SOAK > 1))
def test_lbfgs_with_its_line_search_beside_an_adam_reaches_the_optimum_of_scikit_learn(options):
    digits = load_digits()
    x, y = digits.data[:600] / 16.0, digits.target[:600]  # A multiple of 3.
    known = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, y)

    def objective(kernel, bias, x, y):
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ kernel + bias, y)
        return losses.mean() + 0.5 * jnp.sum(kernel**2) / 600

    def loss(params, batch):
        value = objective(**params["logistic"], **batch)
        return ft.Loss(value + (params["other"] - 2.0) ** 2, weight=len(batch["y"]))

    with jax.enable_x64():
        start = {"logistic": {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}, "other": jnp.zeros(())}
        optim = ft.Optimizer(
            ft.partition(start, {"logistic": "logistic", "other": "other"}),
            {"logistic": optax.lbfgs(), "other": ft.with_lr(optax.adam, 0.1)},
        )
        update = ft.make_update(loss, optim, **options)
        batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
        state = update.init(start)
        for _ in range(250):
            state, _ = update(state, batch)
        reached = float(objective(**state.params["logistic"], **batch))
        optimum = float(objective(jnp.asarray(known.coef_.T), jnp.asarray(known.intercept_), **batch))
        other = float(state.params["other"])
    assert abs(reached - optimum) < 1e-6
    assert abs(other - 2.0) < 0.1
