"""Complex parameters train as their real and imaginary parts would."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from soak import some

import functrain as ft

RNG = np.random.default_rng(0)
X, TARGET = (RNG.normal(size=shape) + 1j * RNG.normal(size=shape) for shape in ((16, 3), (16, 2)))
KERNEL, BIAS = RNG.normal(size=(2, 3, 2)), RNG.normal(size=2)
# Each step errs by a few float32 roundings of numbers below 10, of sums of 16 x 3 products.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def complex_params():
    return {"kernel": jnp.asarray(KERNEL[0] + 1j * KERNEL[1], jnp.complex64), "bias": jnp.asarray(BIAS, jnp.float32)}


def real_params():
    re, im = jnp.asarray(KERNEL, jnp.float32)
    return {"re": re, "im": im, "bias": jnp.asarray(BIAS, jnp.float32)}


def complex_loss(params, batch):
    x, target = batch
    error = x @ params["kernel"] + params["bias"] - target
    return {"fit": jnp.mean(jnp.abs(error) ** 2), "size": jnp.sum(jnp.abs(params["kernel"]) ** 2)}


def real_loss(params, batch):
    kernel = params["re"] + 1j * params["im"]
    return complex_loss({"kernel": kernel, "bias": params["bias"]}, batch)


def as_loss(loss_fn):
    return lambda params, batch: ft.Loss(loss_fn(params, batch))


def as_complex(params):
    return {"kernel": params["re"] + 1j * params["im"], "bias": params["bias"]}


BATCH = (jnp.asarray(X, jnp.complex64), jnp.asarray(TARGET, jnp.complex64))
TRANSFORMS = {"sgd": optax.sgd(0.05), "momentum": optax.sgd(0.02, momentum=0.9, nesterov=True)}
OPTIONS = {
    "plain": {},
    "route": {"route": {"all": {"fit": 1.0, "size": 0.1}}},
    "weights": {"loss_weights": {"size": 0.1}},
    "microbatches": {"microbatches": 4},
    "scaled": {"loss_scale": ft.DynamicScale(initial=2.0**10)},
}


def trained(loss_fn, params, tx, clip_norm=None, **options):
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": tx}, clip_norm=clip_norm)
    update = ft.make_update(as_loss(loss_fn), optim, **options)
    state = update.init(params)
    for _ in range(5):
        state, _ = update(state, BATCH)
    return state.params


@pytest.mark.parametrize(("clip_norm", "tx", "options"), some(itertools.product([None, 0.5], TRANSFORMS, OPTIONS), 3))
def test_complex_parameters_train_as_their_two_real_parts(options, tx, clip_norm):
    arguments = TRANSFORMS[tx], clip_norm
    ours = trained(complex_loss, complex_params(), *arguments, **OPTIONS[options])
    theirs = as_complex(trained(real_loss, real_params(), *arguments, **OPTIONS[options]))
    for name, leaf in ours.items():
        assert leaf.dtype == complex_params()[name].dtype
        np.testing.assert_allclose(leaf, theirs[name], **CLOSE)
        assert (leaf != complex_params()[name]).all()


def test_a_complex_parameter_keeps_its_imaginary_part_where_others_are_cast():
    seen = {}

    def loss_fn(params, batch):
        seen.update(jax.tree.map(lambda leaf: leaf.dtype, params))
        return jnp.abs(params["z"] * params["w"] - batch).astype(jnp.float32) ** 2

    params = {"z": jnp.array(1.0 + 1.0j), "w": jnp.ones(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(loss_fn, optim, compute_dtype=jnp.bfloat16)
    state, _ = update(update.init(params), 3.0)
    assert seen == {"z": jnp.complex64, "w": jnp.bfloat16}
    assert state.params["z"].imag != 1.0


@pytest.mark.parametrize("tx", [optax.adam(0.05), optax.adamw(0.05), optax.lamb(0.05), optax.rmsprop(0.05)])
def test_a_complex_parameter_reaches_its_minimum(tx):
    params = {"z": jnp.array(0.0 + 0.0j)}
    parts = ft.partition(params, {"all": ...})
    optim = ft.Optimizer(parts, {"all": tx})
    train_step = ft.make_train_step(lambda params, batch: jnp.abs(params["z"] - batch) ** 2, parts)

    @jax.jit
    def step(params, opt_state):
        grads, _ = train_step(params, 2.0 - 1.0j)
        return optim.step(params, grads, opt_state)

    opt_state = optim.init(params)
    for _ in range(300):
        params, opt_state = step(params, opt_state)
    assert abs(complex(params["z"]) - (2.0 - 1.0j)) < 0.2  # An Adam that still steps by 0.05.


def test_the_gradients_of_each_loss_are_conjugated_too():
    train_step = ft.make_train_step(as_loss(complex_loss), per_loss=True)
    grads, _ = train_step(complex_params(), BATCH)
    for name in ("fit", "size"):
        of_jax = jax.grad(lambda params, name=name: complex_loss(params, BATCH)[name])(complex_params())
        np.testing.assert_allclose(grads[name]["kernel"], jnp.conj(of_jax["kernel"]), **CLOSE)
