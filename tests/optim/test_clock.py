"""`with_lr(..., clock=)`: whose steps a schedule counts, a part's own or those of the run."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import functrain as ft


def schedule(step):
    """A rate that tells the step, and is exact: 1, 1 / 2, 1 / 4, ..."""
    return jnp.exp2(-jnp.asarray(step, jnp.float32))


def params():
    return {"body": jnp.zeros(2), "head": jnp.zeros(2)}


PARTS = ft.partition(params(), {"body": "body", "head": "head"})
GRADS = {part: {part: jnp.ones(2)} for part in PARTS.names}


def sgd(clock, **options):
    return ft.with_lr(optax.sgd, schedule, clock=clock, **options)


def optimizer(body, head=None):
    return ft.Optimizer(PARTS, {"body": body, "head": head or sgd("part")})


def loss_fn(params, batch):
    return jnp.sum(params["body"] * batch) + jnp.sum(params["head"] * batch)


def rates(optim, state):
    """The steps that the rates of a state were asked for."""
    return {part: int(-jnp.log2(rate)) for part, rate in optim.learning_rates(state.opt_state).items()}


def trained(optim, count, schedule=loss_fn):
    """The steps that the rates were asked for, update by update."""
    update, found = ft.make_update(schedule, optim), []
    state = update.init(params())
    for _ in range(count):
        state, _ = update(state, jnp.ones(2))
        found.append(rates(optim, state))
    return found


def test_each_clock_counts_its_steps_where_phases_take_turns():
    phases = ft.alternate(ft.Phase("body", loss_fn, "body"), ft.Phase("head", loss_fn, "head"))
    found = trained(optimizer(sgd("run"), sgd("part")), 4, phases)
    assert [each["body"] for each in found] == [0, 0, 2, 2]
    assert [each["head"] for each in found] == [0, 0, 0, 1]


def test_a_part_that_another_optimizer_unfreezes_goes_on_with_the_schedule_of_the_run():
    """As in a second `fit`: the run's step is in the state."""
    first = ft.Optimizer(PARTS, {"body": ft.FROZEN, "head": sgd("run")})
    second = optimizer(sgd("run"), sgd("run"))
    update, unfrozen = ft.make_update(loss_fn, first), ft.make_update(loss_fn, second)
    state = update.init(params())
    for _ in range(3):
        state, _ = update(state, jnp.ones(2))
    state, _ = unfrozen.adopt(update, state)
    state, _ = unfrozen(state, jnp.ones(2))
    assert rates(second, state) == {"body": 3, "head": 3}
    assert state.params["body"].tolist() == [-(2.0**-3)] * 2


@pytest.mark.parametrize("of", ["scan", "accumulate", "pure"])
def test_the_step_of_the_run_is_that_of_each_window(of):
    optim = optimizer(sgd("run"))
    update = ft.make_update(loss_fn, optim, accumulate=2 if of == "accumulate" else 1)
    state = update.init(params())
    if of == "scan":
        state, metrics = update.scan(state, jnp.ones((3, 2)), measured=True)
        assert metrics["parts"]["body"]["learning_rate"].tolist() == [1.0, 0.5, 0.25]
    elif of == "pure":
        pure = jax.jit(update.pure)
        for _ in range(3):
            state, _ = pure(state, jnp.ones(2))
    else:
        for _ in range(6):
            state, _ = update(state, jnp.ones(2))
    assert rates(optim, state) == {"body": 2, "head": 2}


def test_a_skipped_step_is_one_of_the_run_and_none_of_the_part():
    optim = optimizer(sgd("run"))
    update = ft.make_update(loss_fn, optim, nonfinite="skip")
    state = update.init(params())
    for batch in (jnp.ones(2), jnp.full(2, jnp.nan), jnp.ones(2)):
        state, _ = update(state, batch)
    assert rates(optim, state) == {"body": 2, "head": 1}


def test_in_a_loop_of_ones_own_the_step_is_an_argument():
    optim = optimizer(sgd("run"))
    step = jax.jit(optim.step)
    _, opt_state = step(params(), GRADS, optim.init(params()), step=5)
    assert optim.learning_rates(opt_state) == {"body": 2.0**-5, "head": 1.0}


def test_a_rate_that_is_given_beats_either_clock_and_needs_no_step():
    optim = optimizer(sgd("run"))
    _, opt_state = optim.step(params(), GRADS, optim.init(params()), lr={"body": 0.75})
    assert optim.learning_rates(opt_state) == {"body": 0.75, "head": 1.0}


def test_it_is_found_within_a_chain_and_within_a_factory_that_makes_one():
    chained = optax.chain(optax.clip(1.0), sgd("run"))
    made = ft.with_lr(lambda rate: optax.chain(optax.clip(1.0), optax.sgd(rate)), schedule, clock="run")
    assert trained(optimizer(chained, made), 2) == [{"body": 0, "head": 0}, {"body": 1, "head": 1}]


def test_a_transform_that_declares_the_step_is_given_it():
    def update(updates, state, params=None, *, step):
        return jax.tree.map(lambda each: each * step, updates), state

    counting = optax.GradientTransformationExtraArgs(lambda params: (), update)
    update = ft.make_update(loss_fn, optimizer(counting))
    state = update.init(params())
    for _ in range(3):
        state, _ = update(state, jnp.ones(2))
    assert state.params["body"].tolist() == [0 + 1 + 2] * 2


def test_the_clock_says_nothing_of_the_form_of_the_state():
    of_part, of_run = (optimizer(sgd(clock)).init(params()) for clock in ("part", "run"))
    assert jax.tree.structure(of_part) == jax.tree.structure(of_run)


def test_it_is_printed():
    assert "sgd(learning_rate=schedule, clock=run, momentum=0.9)" in str(optimizer(sgd("run", momentum=0.9)))
    assert "clock" not in str(optimizer(sgd("part")))


def test_a_run_that_goes_on_with_another_clock_is_told(tmp_path):
    folder = functools.partial(ft.Checkpoints, tmp_path)
    for clock, step in (("part", 1), ("run", 2)):
        optim = optimizer(sgd(clock))
        update = ft.make_update(loss_fn, optim)
        state, _ = update(update.init(params()), jnp.ones(2))
        with folder() as checkpoints:
            if clock == "part":
                checkpoints.save(state)
            else:
                with pytest.warns(match="part 'body': clock of sgd was part, is now run"):
                    restored = checkpoints.restore(like=state)
                state, _ = update(restored.state, jnp.ones(2))
        assert int(state.step) == step


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: sgd("steps"), "with_lr(..., clock='steps'): write 'part' or 'run'"),
        (
            lambda: ft.with_lr(optax.sgd, 0.1, clock="run"),
            "with_lr(..., 0.1, clock='run'): a constant rate has no clock: leave clock= out",
        ),
        (
            lambda: optimizer(sgd("run")).step(params(), GRADS, optimizer(sgd("run")).init(params())),
            "with_lr(sgd, ..., clock='run') was not told the step of the run: optim.step(..., step=step), the number of"
            " finished steps, which transforms around it hand on; or write clock='part'",
        ),
    ],
)
def test_what_a_clock_refuses(wrong, message):
    with pytest.raises(ft.OptimizerError) as raised:
        wrong()
    assert str(raised.value) == message
