"""`with_lr`: a learning rate that is read, set, and given at a step, without recompiling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import functrain as ft

GRAD = {"part": {"w": jnp.array([1.0, -2.0])}}


def params():
    return {"w": jnp.array([4.0, 8.0]), "frozen": jnp.ones(3)}


def optimizer(tx):
    """One trained part and a frozen one."""
    return ft.Optimizer(ft.partition(params(), {"part": "w", "rest": ...}), {"part": tx, "rest": ft.FROZEN})


def rate_of(optim, opt_state):
    return float(optim.learning_rates(opt_state)["part"])


def change(optim, opt_state, **given):
    """What a step adds to the parameters, in rates: -1 times the gradient under plain SGD at rate 1; and the state."""
    updates, opt_state = optim.update(GRAD, opt_state, params(), **given)
    return (updates["part"]["w"] / -GRAD["part"]["w"]).tolist(), opt_state


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


# Reading, setting, giving.


def test_the_rate_can_be_read_before_the_first_step():
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    assert rate_of(optim, optim.init(params())) == 0.5


def test_the_rate_can_be_set_for_good():
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    opt_state = optim.with_learning_rates(optim.init(params()), {"part": 0.25})
    assert rate_of(optim, opt_state) == 0.25
    for _ in range(2):
        taken, opt_state = change(optim, opt_state)
        assert taken == [0.25, 0.25]
    assert rate_of(optim, opt_state) == 0.25


def test_setting_a_rate_leaves_the_given_state_as_it_was():
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    opt_state = optim.init(params())
    optim.with_learning_rates(opt_state, {"part": 0.25})
    assert rate_of(optim, opt_state) == 0.5


def test_a_rate_given_at_a_step_is_of_that_step_alone():
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    opt_state = optim.init(params())
    taken, opt_state = change(optim, opt_state, lr={"part": 0.125})
    assert taken == [0.125, 0.125]
    assert rate_of(optim, opt_state) == 0.125
    taken, opt_state = change(optim, opt_state)
    assert taken == [0.5, 0.5]
    assert rate_of(optim, opt_state) == 0.5


def test_burn_the_rate_is_an_argument_of_each_step():
    optim = optimizer(ft.with_lr(optax.sgd, 0.0))
    whole, opt_state = params(), optim.init(params())
    for rate in (1.0, 0.5, 0.25):
        whole, opt_state = optim.step(whole, GRAD, opt_state, lr={"part": rate})
    assert whole["w"].tolist() == [4.0 - 1.75, 8.0 + 3.5]


def test_a_rate_may_be_given_to_a_part_that_makes_no_step_now():
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    opt_state = optim.init(params())
    updates, after = optim.update({}, opt_state, params(), lr={"part": 0.125})
    assert updates == {}
    assert bits(after) == bits(opt_state)


def test_a_part_without_with_lr_has_no_rate_to_read():
    optim = optimizer(optax.sgd(0.5))
    assert optim.learning_rates(optim.init(params())) == {}


def test_rates_are_read_and_set_by_part():
    whole = {"body": jnp.ones(2), "head": jnp.ones(2), "bias": jnp.ones(2)}
    parts = ft.partition(whole, {"body": "body", "head": "head", "bias": "bias"})
    transforms = {"body": ft.with_lr(optax.adam, 0.5), "head": ft.with_lr(optax.sgd, 0.25), "bias": optax.sgd(0.1)}
    optim = ft.Optimizer(parts, transforms)
    opt_state = optim.with_learning_rates(optim.init(whole), {"head": 2.0})
    assert {part: float(rate) for part, rate in optim.learning_rates(opt_state).items()} == {"body": 0.5, "head": 2.0}


# Schedules.


def test_a_schedule_counts_the_steps_of_its_own_part():
    whole = {"a": jnp.ones(2), "b": jnp.ones(2)}
    parts = ft.partition(whole, {"a": "a", "b": "b"})
    rates = optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.5})
    optim = ft.Optimizer(parts, {"a": ft.with_lr(optax.sgd, rates), "b": ft.with_lr(optax.sgd, rates)})
    opt_state, grads = optim.init(whole), parts.split(whole)
    used = []
    for given in (["a"], ["a", "b"], ["a"], ["b"]):
        _, opt_state = optim.update({part: grads[part] for part in given}, opt_state, whole)
        used.append({part: float(rate) for part, rate in optim.learning_rates(opt_state).items()})
    assert used == [{"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 1.0}, {"a": 0.25, "b": 1.0}, {"a": 0.25, "b": 0.5}]


def test_a_given_rate_beats_a_schedule_for_that_step_alone_and_the_schedule_still_counts():
    optim = optimizer(ft.with_lr(optax.sgd, lambda step: 1.0 / (1 + step)))
    opt_state = optim.init(params())
    assert rate_of(optim, opt_state) == 1.0
    used = []
    for given in ({}, {"lr": {"part": 0.125}}, {}, {}):
        taken, opt_state = change(optim, opt_state, **given)
        assert taken[0] == rate_of(optim, opt_state)
        used.append(rate_of(optim, opt_state))
    assert used == [1.0, 0.125, np.float32(1 / 3), 0.25]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_schedule_gives_to_the_bit_what_it_gives_in_optax(jit):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 2, 5)
    compare(ft.with_lr(optax.adamw, schedule), optax.adamw(schedule), jit)


# To the bit what optax gives with the constant.


def compare(one, other, jit):
    """Runs both for five steps on random parameters and gradients, and asserts the same bits."""
    rng = np.random.default_rng(0)
    flat = {"w": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "b": jnp.asarray(rng.normal(size=6), jnp.float32)}
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), flat) for _ in range(5)]

    def run(tx):
        def step(flat, grads, state):
            updates, state = tx.update(grads, state, flat)
            return optax.apply_updates(flat, updates), state

        step = jax.jit(step) if jit else step
        after, state = flat, tx.init(flat)
        for grad in grads:
            after, state = step(after, grad, state)
        return after

    assert bits(run(one)) == bits(run(other))
    assert bits(run(one)) != bits(flat)


FACTORIES = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, weight_decay=0.01),
    "nadam": optax.nadam,
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "lamb": optax.lamb,
    "radam": optax.radam,
    "muon": optax.contrib.muon,
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", FACTORIES)
def test_a_rate_as_state_gives_to_the_bit_what_the_constant_gives(name, jit):
    compare(ft.with_lr(FACTORIES[name], 0.0137), FACTORIES[name](0.0137), jit)


# Adafactor multiplies by the rate and then by each parameter's scale: under jit XLA reorders the two where the rate is
# a constant that it knows, which moves the last bit.
def test_adafactor_with_a_rate_as_state_gives_eagerly_to_the_bit_what_the_constant_gives():
    compare(ft.with_lr(optax.adafactor, 0.0137), optax.adafactor(0.0137), jit=False)


def test_a_rate_that_is_set_gives_to_the_bit_what_that_constant_gives():
    optim, constant = optimizer(ft.with_lr(optax.adam, 0.5)), optimizer(optax.adam(0.0137))
    opt_state = optim.with_learning_rates(optim.init(params()), {"part": 0.0137})
    one, _ = optim.step(params(), GRAD, opt_state)
    other, _ = constant.step(params(), GRAD, constant.init(params()))
    assert bits(one) == bits(other)


# The forms that a factory and a rate may have.


def keyword_only(*, learning_rate, momentum=None):
    return optax.sgd(learning_rate, momentum=momentum)


@pytest.mark.parametrize(
    "tx",
    [
        ft.with_lr(optax.sgd, 0.5, momentum=0.0),
        ft.with_lr(keyword_only, 0.5, momentum=0.0),
        ft.with_lr(functools.partial(optax.sgd, momentum=0.0), 0.5),
        ft.with_lr(lambda lr: optax.sgd(lr, momentum=0.0), 0.5),
        ft.with_lr(lambda lr, decay: optax.sgd(lr, momentum=decay), 0.5, decay=0.0),
        ft.with_lr(lambda momentum, learning_rate: optax.sgd(learning_rate, momentum), 0.5, momentum=0.0),
        ft.with_lr(lambda lr: optax.chain(optax.trace(0.0), optax.scale_by_learning_rate(lr)), 0.5),
    ],
    ids=["optax", "keyword only", "partial", "lambda", "lambda with arguments", "rate not first", "chain"],
)
def test_a_factory_may_be_any_function_of_a_rate(tx):
    optim = optimizer(tx)
    assert change(optim, optim.init(params()))[0] == [0.5, 0.5]
    assert change(optim, optim.init(params()), lr={"part": 0.25})[0] == [0.25, 0.25]


RATES = [
    0.25,
    np.float64(0.25),
    np.float32(0.25),
    np.array(0.25),
    jnp.float32(0.25),
    jnp.asarray(0.25),
    jnp.bfloat16(0.25),
]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{type(rate).__name__} {getattr(rate, 'dtype', '')}")
def test_a_rate_may_be_a_python_number_or_a_scalar_array_of_any_kind(rate):
    optim = optimizer(ft.with_lr(optax.sgd, rate))
    opt_state = optim.init(params())
    assert change(optim, opt_state)[0] == [0.25, 0.25]

    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    set_state = optim.with_learning_rates(optim.init(params()), {"part": rate})
    assert change(optim, set_state)[0] == [0.25, 0.25]
    assert change(optim, optim.init(params()), lr={"part": rate})[0] == [0.25, 0.25]
    assert types_of(set_state) == types_of(opt_state)


def test_a_rate_of_zero_is_a_rate():
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    assert change(optim, optim.init(params()), lr={"part": 0})[0] == [0.0, 0.0]


@pytest.mark.parametrize("rate", [jnp.ones(2), lambda step: 0.1], ids=["vector", "schedule"])
def test_a_rate_that_is_no_number_is_an_error_that_names_the_part(rate):
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    opt_state = optim.init(params())
    with pytest.raises(ft.OptimizerError, match="'part'"):
        optim.step(params(), GRAD, opt_state, lr={"part": rate})
    with pytest.raises(ft.OptimizerError, match="'part'"):
        optim.with_learning_rates(opt_state, {"part": rate})


# At any depth.

INSIDE = {
    "chain": lambda tx: optax.chain(optax.clip(10.0), optax.chain(optax.identity(), tx)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(10.0)), ("sgd", tx)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "frozen": False}),
    "partition": lambda tx: optax.partition({"label": tx}, {"w": "label", "frozen": "label"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step < 10),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_a_rate_is_read_at_any_depth(inside):
    optim = optimizer(INSIDE[inside](ft.with_lr(optax.sgd, 0.5)))
    opt_state = optim.init(params())
    assert rate_of(optim, opt_state) == 0.5
    assert change(optim, opt_state)[0] == [0.5, 0.5]


@pytest.mark.parametrize("inside", INSIDE)
def test_a_rate_is_set_at_any_depth(inside):
    optim = optimizer(INSIDE[inside](ft.with_lr(optax.sgd, 0.5)))
    opt_state = optim.with_learning_rates(optim.init(params()), {"part": 0.25})
    assert rate_of(optim, opt_state) == 0.25
    assert change(optim, opt_state)[0] == [0.25, 0.25]


@pytest.mark.parametrize("inside", INSIDE)
def test_a_rate_is_given_at_any_depth(inside):
    optim = optimizer(INSIDE[inside](ft.with_lr(optax.sgd, 0.5)))
    taken, opt_state = change(optim, optim.init(params()), lr={"part": 0.25})
    assert taken == [0.25, 0.25]
    assert change(optim, opt_state)[0] == [0.5, 0.5]


def test_a_rate_is_set_through_a_transform_that_takes_no_extra_arguments():
    rate = ft.with_lr(optax.sgd, 0.5)
    plain = optax.GradientTransformation(rate.init, lambda updates, state, params=None: rate.update(updates, state))
    optim = optimizer(plain)
    opt_state = optim.with_learning_rates(optim.init(params()), {"part": 0.25})
    assert change(optim, opt_state)[0] == [0.25, 0.25]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_rate_at_any_depth_works_in_any_dtype(inside, dtype):
    whole = {"w": jnp.ones(2, dtype), "frozen": jnp.ones(3)}
    optim = optimizer(INSIDE[inside](ft.with_lr(optax.sgd, 0.5)))
    after, _ = optim.step(whole, {"part": {"w": jnp.ones(2, dtype)}}, optim.init(whole))
    assert after["w"].tolist() == [0.5, 0.5]


# Never another compilation.


def compiled(optim):
    return jax.jit(lambda params, grads, opt_state, lr=None: optim.step(params, grads, opt_state, lr=lr))


def test_a_rate_that_is_set_never_recompiles():
    optim = optimizer(ft.with_lr(optax.adam, 0.5))
    step, whole, opt_state = compiled(optim), params(), optim.init(params())
    for rate in RATES:
        whole, opt_state = step(whole, GRAD, optim.with_learning_rates(opt_state, {"part": rate}))
    assert step._cache_size() == 1


def test_a_rate_that_is_given_never_recompiles_for_another_value():
    optim = optimizer(ft.with_lr(optax.adam, 0.5))
    step, whole, opt_state = compiled(optim), params(), optim.init(params())
    for rate in (0.1, 0.2, 0.3):
        whole, opt_state = step(whole, GRAD, opt_state, {"part": rate})
    assert step._cache_size() == 1


def test_a_schedule_never_recompiles():
    optim = optimizer(ft.with_lr(optax.adam, lambda step: 1.0 / (1 + step)))
    step, whole, opt_state = compiled(optim), params(), optim.init(params())
    for _ in range(3):
        whole, opt_state = step(whole, GRAD, opt_state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("where", ["one device", "mesh"])
def test_a_rate_that_is_set_on_committed_state_stays_where_it_is_and_does_not_recompile(where):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = {"one device": jax.devices()[3], "mesh": NamedSharding(mesh, P("x"))}[where]
    replicated = {"one device": place, "mesh": NamedSharding(mesh, P())}[where]
    whole = {"w": jax.device_put(params()["w"], place), "frozen": jax.device_put(params()["frozen"], replicated)}
    optim = optimizer(ft.with_lr(optax.adam, 0.5))
    step, opt_state = compiled(optim), optim.init(whole)
    placed = [(leaf.sharding, leaf.committed) for leaf in jax.tree.leaves(opt_state)]
    for rate in (0.25, jnp.float32(0.125)):
        opt_state = optim.with_learning_rates(opt_state, {"part": rate})
        assert [(leaf.sharding, leaf.committed) for leaf in jax.tree.leaves(opt_state)] == placed
        whole, opt_state = step(whole, GRAD, opt_state)
    assert step._cache_size() == 1


def test_a_rate_can_be_set_inside_a_compiled_function():
    optim = optimizer(ft.with_lr(optax.sgd, 0.5))
    halved = jax.jit(lambda state: optim.with_learning_rates(state, {"part": optim.learning_rates(state)["part"] / 2}))
    assert rate_of(optim, halved(halved(optim.init(params())))) == 0.125


# What is held, and in which dtype.


def types_of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("rate", [1e-3, lambda step: 1e-3 * step], ids=["constant", "schedule"])
def test_the_rate_is_a_float32_scalar_whatever_the_parameters_are(dtype, rate):
    with jax.enable_x64():
        whole = {"w": jnp.ones(2, dtype), "frozen": jnp.ones(3)}
        optim = optimizer(ft.with_lr(optax.adam, rate))
        opt_state = optim.init(whole)
        before = types_of(opt_state)
        _, opt_state = optim.step(whole, {"part": {"w": jnp.ones(2, dtype)}}, opt_state)
        held = optim.learning_rates(opt_state)["part"]
        assert (held.shape, held.dtype) == ((), jnp.float32)
        assert types_of(opt_state) == before


def test_nothing_but_the_rate_is_state():
    optim = optimizer(ft.with_lr(optax.adam, 1e-3))
    state = optim.init(params())["part"]
    assert len(jax.tree.leaves(state)) - len(jax.tree.leaves(optax.adam(1e-3).init({"w": params()["w"]}))) == 2
    assert (float(state.learning_rate), float(state.setting), state.steps) == (np.float32(1e-3), np.float32(1e-3), None)


def test_adam_on_bfloat16_parameters_moves_by_the_rate_where_inject_hyperparams_gives_nan():
    flat = {"w": jnp.ones(2, jnp.bfloat16)}
    injected = optax.inject_hyperparams(optax.adam)(0.5)
    updates, _ = injected.update(flat, injected.init(flat), flat)
    assert jnp.isnan(updates["w"]).all()  # As b2 became 1.0.
    ours = ft.with_lr(optax.adam, 0.5)
    updates, _ = ours.update(flat, ours.init(flat), flat)
    assert optax.apply_updates(flat, updates)["w"].tolist() == [0.5, 0.5]


def test_moments_have_the_dtype_of_their_parameters():
    flat = {"w": jnp.ones(2, jnp.bfloat16)}
    moments, *_ = ft.with_lr(optax.adam, 1e-3).init(flat).inner
    assert (moments.mu["w"].dtype, moments.nu["w"].dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_with_lr_is_an_optax_transform_by_itself():
    tx = optax.chain(optax.clip_by_global_norm(1.0), ft.with_lr(optax.sgd, 0.5))
    flat = {"w": jnp.array([3.0, 4.0])}
    updates, _ = tx.update(flat, tx.init(flat), flat, learning_rate=1.0)
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


def test_the_table_of_an_optimizer_names_what_a_partial_is_of():
    parts = ft.partition({"w": jnp.ones(2)}, {"all": ...})
    adam = functools.partial(optax.adam, b1=0.5)
    assert ft.Optimizer(parts, {"all": ft.with_lr(adam, 0.1)}).described == {"all": "adam(b1=0.5)"}
