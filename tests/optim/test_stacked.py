"""Matrices that a transform treats alike are stacked: the same updates and the same state, by a smaller program."""

import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from soak import some

import functrain as ft
from functrain.optim.describe import makeup
from functrain.tree.arrays import shortest


def whole(layers=3):
    """Parameters like those of a small transformer: matrices of three shapes, vectors, and a matrix by itself."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * layers + 1))
    return {
        "layers": [
            {
                "up": {"kernel": jax.random.normal(next(keys), (8, 16)), "bias": jnp.ones(16)},
                "down": {"kernel": jax.random.normal(next(keys), (16, 8)), "bias": jnp.ones(8)},
            }
            for _ in range(layers)
        ],
        "embed": jax.random.normal(next(keys), (24, 8)),
    }


def gradients(params, step=0):
    return jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step), params)


def of_kernels(params):
    """A tree of whether a leaf is an `up` kernel, for masks."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: "up" in jax.tree_util.keystr(keys), params)


TRANSFORMS = {
    "muon": optax.contrib.muon(0.1, weight_decay=0.1),
    "with_lr(muon)": ft.with_lr(optax.contrib.muon, optax.linear_schedule(0.1, 0.01, 3)),
    "with_state(muon)": ft.with_state(optax.contrib.muon, learning_rate=0.1, beta=0.9),
    "muon of reshaped": optax.contrib.muon(
        0.1, muon_weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda leaf: optax.contrib.MuonDimensionNumbers(1, 0) if leaf.ndim == 2 else None, tree)
    ),
    "adamw": optax.adamw(0.1),
    "masked": optax.adamw(0.1, mask=of_kernels),
    "labels": optax.multi_transform({True: optax.contrib.muon(0.1), False: optax.sgd(0.1, 0.9)}, of_kernels),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "noise": optax.chain(optax.add_noise(0.1, 0.1, 0), optax.contrib.muon(0.1)),
}  # fmt: skip


def stepped(tx, params, times=3):
    """Updates and state after some steps."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(times):
        updates, state = update(gradients(params, step), state, params)
    return updates, state


def assert_close(one, other):
    """Rounding in other orders: Muon's products of float32 are of numbers up to 1, several deep."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def products(tx, params):
    state = tx.init(params)
    return str(jax.make_jaxpr(tx.update)(params, state, params)).count("dot_general")


@pytest.mark.parametrize("name", some(TRANSFORMS, 2))
def test_updates_and_states_are_those_of_the_transform(name):
    params = whole()
    assert_close(stepped(ft.stacked(TRANSFORMS[name]), params), stepped(TRANSFORMS[name], params))


def test_it_may_stand_within_others():
    params = whole()

    def clipped(rate, wrap=lambda tx: tx):
        return optax.chain(optax.clip_by_global_norm(1.0), wrap(optax.contrib.muon(rate)))

    assert_close(stepped(ft.with_lr(clipped, 0.1, wrap=ft.stacked), params), stepped(ft.with_lr(clipped, 0.1), params))


def test_matrices_of_one_shape_are_computed_once():
    params, muon = whole(layers=5), optax.contrib.muon(0.1)
    assert products(muon, params) == 11 * products(muon, {"w": jnp.ones((8, 16))})
    assert products(ft.stacked(muon), params) == 3 * products(muon, {"w": jnp.ones((8, 16))})


def test_leaves_that_a_mask_or_their_dtype_tells_apart_are_not_stacked_with_each_other():
    one = products(optax.contrib.muon(0.1), {"w": jnp.ones((4, 4))})
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 4)), "d": jnp.ones((4, 4), jnp.bfloat16)}
    mask = {"a": True, "b": False, "c": False, "d": False}
    assert products(ft.stacked(optax.contrib.muon(0.1)), params) == 2 * one
    assert products(ft.stacked(optax.contrib.muon(0.1, weight_decay=0.1, weight_decay_mask=mask)), params) == 3 * one


def test_a_rate_is_read_set_and_given_as_without_it():
    params = whole()
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": ft.stacked(ft.with_lr(optax.contrib.muon, 0.1))})
    grads = optim.parts.split(gradients(params))
    opt_state = optim.init(params)
    quick, after = optim.update(grads, opt_state, params, lr={"all": 0.2})
    slow, _ = optim.update(grads, optim.with_learning_rates(opt_state, {"all": 0.1}), params)
    assert float(optim.learning_rates(after)["all"]) == pytest.approx(0.2)
    np.testing.assert_allclose(quick["all"]["embed"], 2 * slow["all"]["embed"], rtol=1e-5)
    assert "stacked(muon)" in str(optim)


MIXING = {
    "a norm of all": optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(0.1)),
    "a branch of all": optax.MultiSteps(optax.contrib.muon(0.1), 2),
    "an estimate of all": optax.contrib.prodigy(),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_leaves_is_refused(name):
    params, tx = whole(), ft.stacked(MIXING[name])
    message = (
        r"ft.stacked: the update of '\S+' is computed of .* other leaves too .*put what mixes leaves outside, optax.c"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        tx.update(params, tx.init(params), params)


def test_what_is_no_transform_and_axes_without_a_mesh_are_refused():
    with pytest.raises(ft.OptimizerError, match=r"give an optax transform, ft.stacked\(optax.contrib.muon\(0.02\)\)"):
        ft.stacked(optax.contrib.muon)
    with pytest.raises(ft.OptimizerError, match=r"no mesh to spread over: ft.stacked\(tx, layout, 'data'\)"):
        ft.stacked(optax.contrib.muon(0.1), over="data")
    layout = ft.layout(whole(), jax.make_mesh((8,), ("data",)), {...: P()})
    with pytest.raises(ft.LayoutError, match=r"names the axis 'model', which the mesh has not: its axes are 'data'"):
        ft.stacked(optax.contrib.muon(0.1), layout, over="model")
    tx = ft.stacked(optax.contrib.muon(0.1), layout)
    with pytest.raises(ft.OptimizerError, match="'other' is no leaf of its layout: give the layout of the params"):
        tx.update({"other": jnp.ones((2, 2))}, tx.init({"other": jnp.ones((2, 2))}), {"other": jnp.ones((2, 2))})


# Over eight devices.

LAYOUTS = {
    "data parallel": {"rules": {...: P()}},
    "zero": {"rules": {...: P()}, "zero": "data"},
    "fsdp": {"rules": {...: ft.largest("data")}},
    "fsdp and tensor": {"rules": {"**/kernel": P("data", "model"), ...: P()}},
    "over one axis": {"rules": {...: P()}, "over": "data"},
}


def laid_out(name, axis_type, tx, stacks=True):
    """An optimizer over the mesh, with params and gradients in their places."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    params, options = whole(), dict(LAYOUTS[name])
    over = options.pop("over", None)
    layout = ft.layout(params, mesh, options.pop("rules"), batch=P("data"), **options)
    tx = ft.stacked(tx, layout, over) if stacks else tx
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": tx}, layout=layout)
    return optim, layout.put(params), mesh


@pytest.mark.parametrize(("axis_type", "name"), some(itertools.product([AxisType.Auto, AxisType.Explicit], LAYOUTS), 2))
def test_over_devices_updates_are_the_same_and_everything_stays_where_it_was(name, axis_type):
    tx = ft.with_lr(optax.contrib.muon, 0.1)
    optim, params, mesh = laid_out(name, axis_type, tx)
    expected, _ = stepped(tx, whole(), times=2)
    with jax.set_mesh(mesh):
        opt_state, step = optim.init(params), jax.jit(optim.update)
        before = jax.tree.map(lambda leaf: shortest(leaf.sharding), opt_state)
        for number in range(2):
            grads = optim.parts.split(gradients(params, number))
            updates, opt_state = step(grads, opt_state, params)
        assert jax.tree.map(lambda leaf: shortest(leaf.sharding), opt_state) == before
    assert_close([*updates["all"].values()], jax.tree.leaves(jax.device_put(expected, jax.devices()[0])))


def collectives(compiled):
    return Counter(re.findall(r" (all-\w+(?:-[a-z]+)?|collective-\w+|reduce-scatter)\(", compiled.as_text()))


def test_each_device_computes_its_share_of_the_matrices():
    flops = {}
    for stacks in (True, False):
        optim, params, _ = laid_out("data parallel", AxisType.Auto, optax.contrib.muon(0.1), stacks=stacks)
        grads, opt_state = optim.parts.split(params), optim.init(params)
        compiled = jax.jit(optim.update).lower(grads, opt_state, params).compile()
        flops[stacks] = compiled.cost_analysis()["flops"]
        # Two stacks, of updates and of momenta, brought back to every device: four transfers for six matrices.
        assert collectives(compiled) == ({"all-gather": 4} if stacks else {})
    # Of 3, 3 and 1 matrices a device has 1, 1 and 1: 3 in the place of 7, and what it does number by number.
    assert flops[True] < 0.55 * flops[False]


def test_a_state_of_the_transform_goes_on_stacked_and_back():
    params = whole()
    parts = ft.partition(params, {"all": ...})
    plain, stacked = (ft.Optimizer(parts, {"all": tx})
                      for tx in (TRANSFORMS["muon"], ft.stacked(TRANSFORMS["muon"])))  # fmt: skip
    assert makeup(plain.transforms["all"]) == makeup(stacked.transforms["all"])
    grads = parts.split(gradients(params))
    _, state = plain.update(grads, plain.init(params), params)
    updates, after = stacked.update(grads, state, params)
    expected, last = plain.update(grads, state, params)
    assert_close((updates, plain.update(grads, after, params)), (expected, plain.update(grads, last, params)))
    _, report = stacked.adopt(plain, state, params)
    assert "anew" not in str(report)
