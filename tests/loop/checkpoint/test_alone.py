"""Parameters of a checkpoint, without an optimizer."""

import shutil

import jax
import jax.numpy as jnp
import optax
import pytest
from states import batch_of, flip, names, simple, squares, updated
from trees import bits, says

import functrain as ft
from functrain.errors import CheckpointError


def test_parameters_come_back_without_an_update(sound):
    _, params, _ = updated(0)
    for options, count in (({}, 2), ({"step": 1}, 1), ({"step": sound / "2"}, 2)):
        loaded = ft.load_params(sound, like=jax.eval_shape(lambda: params), **options)
        assert bits(loaded) == bits(updated(count)[2].params)
        assert jax.tree.structure(loaded) == jax.tree.structure(params)


def test_large_ones_and_small_ones_and_the_model_state(tmp_path):
    params = {"large": jnp.arange(300_000.0), "small": jnp.arange(3.0), "none": jnp.zeros((0, 2)), "key": jnp.int8(3)}
    parts = ft.partition(params, {"frozen": ft.non_float, "all": ...})
    optim = ft.Optimizer(parts, {"frozen": ft.FROZEN, "all": optax.adam(0.1)})

    def loss_fn(params, batch, model_state):
        return ft.Loss(batch * squares(params), model_state={"mean": model_state["mean"] + 1})

    update = ft.make_update(loss_fn, optim)
    state, _ = update(update.init(params, model_state={"mean": jnp.zeros(2)}), 1.0)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    assert bits(ft.load_params(tmp_path, like=params)) == bits(state.params)
    assert bits(ft.load_model_state(tmp_path, like={"mean": jnp.zeros(2)})) == bits(state.model_state)


def test_each_goes_where_it_is_asked_for(sound):
    _, params, _ = updated(0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    like = {**params, "body": {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=sharding)}}
    loaded = ft.load_params(sound, like=like)
    assert loaded["body"]["w"].sharding == sharding
    assert bits(loaded) == bits(updated(2)[2].params)


def test_the_best_by_what_the_run_kept(tmp_path):
    update, params, state = simple()
    kept = {"loss": "min", "accuracy": "max"}
    best = {}
    with ft.Checkpoints(tmp_path, keep_last=1, keep_best=kept) as checkpoints:
        for number, (loss, accuracy) in enumerate([(1.0, 0.1), (2.0, 0.9), (3.0, 0.5)]):
            state, _ = update(state, batch_of(number))
            checkpoints.save(state, metrics={"loss": loss, "accuracy": accuracy})
            best |= {"loss": bits(state.params)} if number == 0 else {}
            best |= {"accuracy": bits(state.params)} if number == 1 else {}
    for name in kept:
        assert bits(ft.load_params(tmp_path, like=params, best=name)) == best[name]
    with pytest.raises(CheckpointError, match=says("kept by ['accuracy', 'loss']; name one")):
        ft.load_params(tmp_path, like=params, best=True)
    with pytest.raises(CheckpointError, match=says("step=1 beside best='loss': give one of them")):
        ft.load_params(tmp_path, like=params, best="loss", step=1)


def test_what_is_not_there_or_not_asked_for_is_told(sound, tmp_path):
    _, params, _ = updated(0)
    with pytest.raises(CheckpointError, match=says(f"there is no checkpoint in {tmp_path}", "give the folder")):
        ft.load_params(tmp_path, like=params)
    other = {"body": {"w": jnp.zeros((4, 4))}, "neck": jnp.zeros(3)}
    told = says("params of the checkpoint", "body/w: saved as float32[4,3], now float32[4,4]", "params/neck")
    with pytest.raises(CheckpointError, match=told):
        ft.load_params(sound, like=other)
    with pytest.raises(CheckpointError, match=says("model_state/x: not saved")):
        ft.load_model_state(sound, like={"x": jnp.zeros(2)})


def test_a_damaged_one_is_not_loaded_and_nothing_is_renamed(sound, tmp_path):
    directory = shutil.copytree(sound, tmp_path / "copy")
    flip(directory / "2" / "facts" / "metadata")
    _, params, _ = updated(0)
    with pytest.warns(UserWarning, match=says("IS DAMAGED", "kept as '2'")) as caught:
        loaded = ft.load_params(directory, like=params)
    assert caught[0].filename == __file__
    assert bits(loaded) == bits(updated(1)[2].params)
    assert names(ft.Checkpoints(directory)) == ["1", "2"]
