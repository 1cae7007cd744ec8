"""Every optimizer of optax works in a part: its state keeps its types, and its step compiles once.

The list is read from the installed optax, so that an optimizer of a later release is tested from its first day. One
that needs more than a learning rate is given it in `ARGUMENTS`; one that cannot be tested here is in `EXCLUDED`.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from soak import SOAK
from trees import bits

import functrain as ft
from functrain.optim.declared import declared

EXCLUDED = {
    "dpsgd": "takes gradients with a leading axis of examples: see test_optimizer.py",
    "scale_by_learning_rate": "a building block of nearly every optimizer here",
    "scale_by_madgrad": "a building block of madgrad",
    "scale_by_rprop": "a building block of rprop",
}
ARGUMENTS = {
    "adafactor": {"min_dim_size_to_factor": 4},  # Else parameters as small as these have no factored moments.
    "galore": {"rank": 2},
    "noisy_sgd": {"key": jax.random.key(0)},
    "schedule_free": {"base_optimizer": optax.sgd(0.1)},
}
TAKE_A_RATE = {
    name: function
    for module in (optax, optax.contrib)
    for name, function in sorted(vars(module).items())
    if inspect.isfunction(function) and "learning_rate" in inspect.signature(function).parameters
    if not name.startswith("_")
}
OPTIMIZERS = {name: function for name, function in TAKE_A_RATE.items() if name not in EXCLUDED}
OPTIMIZERS["polyak_sgd"] = lambda learning_rate: optax.polyak_sgd(max_learning_rate=learning_rate)
# What holds a state of its own, or chooses between two branches, around an optimizer.
WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "ema": lambda tx: optax.chain(optax.ema(0.9), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=1)),
}
NAMES = [*OPTIMIZERS, *WRAPPERS]
RATES = {
    "plain": lambda factory, arguments: factory(learning_rate=0.1, **arguments),
    "constant": lambda factory, arguments: ft.with_lr(factory, 0.1, **arguments),
    "schedule": lambda factory, arguments: ft.with_lr(factory, lambda step: 0.1 / (step + 1), **arguments),
}
DTYPES = [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]
DTYPES += [(low, low) for low in (jnp.bfloat16, jnp.float16)] * (SOAK > 1)
DTYPES += [(jnp.float16, jnp.float32), (jnp.bfloat16, jnp.float16)] * (SOAK > 1)
# XLA spends less on the code of these steps, of which types are looked at and no bits.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

pytestmark = pytest.mark.filterwarnings("ignore:.optimistic_adam. is deprecated:DeprecationWarning")


def make(name, rate, params_dtype=jnp.float32, grads_dtype=jnp.float32):
    """An optimizer of a matrix and a vector beside a frozen leaf; its params; and a step on a quadratic loss."""
    tx = RATES[rate](OPTIMIZERS.get(name, optax.adam), ARGUMENTS.get(name, {}))
    tx = WRAPPERS[name](tx) if name in WRAPPERS else tx
    params = {"trained": {"w": jnp.ones((4, 6), params_dtype), "b": jnp.ones(6, params_dtype)}, "frozen": jnp.ones(3)}
    parts = ft.partition(params, {"trained": "trained", "rest": ...})
    optim = ft.Optimizer(parts, {"trained": tx, "rest": ft.FROZEN})

    def loss(params):
        return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32) - 0.5)) for leaf in params["trained"].values())

    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        grads = jax.tree.map(lambda grad: grad.astype(grads_dtype), grads)
        extra = {"obj_fn": loss} if name == "sophia" else {"value": value, "grad": grads, "value_fn": loss}
        return optim.step(params, {"trained": parts.split(grads)["trained"]}, opt_state, **extra)

    return optim, params, step


def types_of(tree):
    # Random keys have no weak_type.
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)), tree)


def test_the_list_is_that_of_optax():
    assert {"adam", "lbfgs", "lion", "muon", "sgd", "sophia"} <= OPTIMIZERS.keys()
    assert EXCLUDED.keys() <= TAKE_A_RATE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES if SOAK > 1 else ["schedule"])
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_compile_once_and_keep_the_types_of_params_and_state(name, rate):
    optim, params, step = make(name, rate)
    opt_state = optim.init(params)
    before = types_of((params, opt_state))
    step = jax.jit(step, compiler_options=QUICKLY)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    assert types_of((params, opt_state)) == before
    assert step._cache_size() == 1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert (params["trained"]["w"] != 1).all()
    assert (params["frozen"] == 1).all()


# The types that a step returns follow from those that it is given, so that one abstract step stands for all.
@pytest.mark.parametrize(("params_dtype", "grads_dtype"), DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_keeps_the_types_of_params_and_state_whatever_the_gradients_are(name, params_dtype, grads_dtype):
    for rate in RATES:
        optim, params, step = make(name, rate, params_dtype, grads_dtype)
        opt_state = jax.eval_shape(optim.init, params)
        assert types_of(jax.eval_shape(step, params, opt_state)) == types_of((params, opt_state)), rate


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_an_update_an_optimizer_steps_to_the_bit_as_under_multi_transform(name):
    optim, params, _ = make(name, "plain")
    tx = optim.transforms["trained"]

    def loss_fn(params, batch):
        return sum(jnp.sum(jnp.square(leaf - batch)) for leaf in jax.tree.leaves(params["trained"]))

    update = ft.make_update(loss_fn, optim)
    state = update.init(params)
    multi = optax.multi_transform({"trained": tx, "rest": optax.set_to_zero()}, optim.parts.labels())
    whole, multi_state = params, multi.init(params)
    # Outside of `jit`, where each operation is its own program, and the same in both.
    for batch in (0.5, 0.25):
        state, _ = update.pure(state, batch)
        value_fn = functools.partial(loss_fn, batch=batch)
        value, grads = jax.value_and_grad(value_fn)(whole)
        mine = optim.parts.masked(grads, "trained")
        known = {"value": value, "grad": mine, "value_fn": value_fn, "obj_fn": value_fn}
        extra = {argument: known[argument] for argument in declared(tx)}
        updates, multi_state = multi.update(grads, multi_state, whole, **extra)
        whole = optax.apply_updates(whole, updates)
    assert bits(state.params) == bits(whole)
    own = optim.optax_state(state.opt_state, "trained")
    assert bits(jax.tree.leaves(own)) == bits(jax.tree.leaves(multi_state.inner_states["trained"].inner_state))
