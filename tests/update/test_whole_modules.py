"""Modules of Equinox as they are: what is no array is no part of the state, and there when it is needed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import leaves_of

import functrain as ft

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)


def model_of():
    return eqx.nn.Sequential([eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])


def loss_fn(model, batch, key):
    keys = jax.random.split(key, len(batch["x"]))
    return jnp.mean((jax.vmap(lambda x, key: model(x, key=key))(batch["x"], keys) - 1) ** 2)


def update_of(model, loss_fn=loss_fn, **options):
    parts = ft.partition(model, {"static": [ft.non_float, "**/p"], "first": "layers/0/layers/0", "rest": ...})
    transforms = {"static": ft.FROZEN, "first": optax.sgd(0.1), "rest": optax.adam(1e-2)}
    return ft.make_update(loss_fn, ft.Optimizer(parts, transforms), **options)


def trained(update, model, count=3):
    state = update.init(model, key=jax.random.key(1))
    for _ in range(count):
        state, _ = update(state, {"x": X})
    return state


def test_it_trains_as_its_arrays_do_that_are_put_together_by_hand():
    model = model_of()
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def by_hand(arrays, batch, key):
        return loss_fn(eqx.combine(arrays, static), batch, key)

    parts = ft.partition(arrays, {"first": "layers/0/layers/0", "rest": ...})
    update = ft.make_update(by_hand, ft.Optimizer(parts, {"first": optax.sgd(0.1), "rest": optax.adam(1e-2)}))
    whole, separate = trained(update_of(model), model), trained(update, arrays)
    for path, leaf in ft.flatten(separate.params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(ft.flatten(whole.params)[path]).tobytes(), path
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(whole.params))


def test_the_whole_module_is_there_when_it_is_asked_for():
    model = model_of()
    seen = []

    def after(params, model_state, step):
        seen.append(params.layers[0].activation)
        return params, model_state

    def kept(grads, *, params):
        seen.append(params.layers[0].activation)
        return grads

    update = update_of(model, ema=0.9, after=after, gradients=kept)
    state = trained(update, model)
    for module in (update.params(state), update.ema(state)):
        assert jax.tree.structure(module) == jax.tree.structure(model)
        assert module(jnp.ones(3), key=jax.random.key(0)).shape == (1,)
    assert {*seen} == {model.layers[0].activation}


def test_without_one_the_params_are_those_of_the_state():
    params = {"w": jnp.ones(2)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(lambda params, batch: jnp.sum(params["w"] * batch), optim)
    state = update.init(params)
    assert update.params(state) is state.params
    assert update.optim is optim


def test_a_run_evaluates_it_goes_on_with_it_and_its_parameters_are_loaded(tmp_path):
    def correct(model, batch):
        model = eqx.nn.inference_mode(model)
        return {"loss": jnp.mean((jax.vmap(model)(batch["x"]) - 1) ** 2, axis=1)}

    def run(folder, *ends):
        for end in ends:
            update = update_of(model_of(), ema=0.9)
            result = ft.fit(update, update.init(model_of(), key=jax.random.key(1)), ft.from_arrays({"x": X}, 2),
                            epochs=end, checkpoints=ft.Checkpoints(tmp_path / folder),
                            evaluation=[ft.Evaluation(correct, [{"x": X}]),
                                        ft.Evaluation(correct, [{"x": X}], name="ema", params="ema")])  # fmt: skip
        return update, result

    (update, once), (_, twice) = run("once", 2), run("twice", 1, 2)
    assert leaves_of(once.state) == leaves_of(twice.state)
    assert once.results.keys() == {"valid/loss", "ema/loss"}
    by_hand = correct(update.params(once.state), {"x": X})["loss"].mean()
    by_hand = correct(update.params(once.state), {"x": X})["loss"].mean()
    assert once.results["valid/loss"] == pytest.approx(float(by_hand))
    loaded = ft.load_params(tmp_path / "once", like=model_of())
    assert eqx.tree_equal(loaded, update.params(once.state))
    assert eqx.tree_equal(once.ema, update.ema(once.state))
