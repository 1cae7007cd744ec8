"""The actor-critic example, which really swings the pendulum up, and its compiled update against one by hand."""

import contextlib
import io
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from soak import SOAK, in_soak

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
ENVS, WARMUP = 8, 800
STEPS = 10_000 if SOAK > 1 else 2_000  # Five eighths of the steps are enough; a few show all but that it learns.


@pytest.fixture(scope="module")
def main():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        import actor_critic

        yield actor_critic.main


@pytest.fixture(scope="module")
def run(main):
    """What a run returned and printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output, warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="functrain|actor_critic")
        return {**main(["--steps", str(STEPS)]), "output": output}


@in_soak
def test_it_solves_the_pendulum(run):
    first_episodes = run["replay"]["reward"][: 200 * ENVS].reshape(200, ENVS).sum(axis=0)
    assert first_episodes.mean() < -1000  # It begins at chance.
    assert len(run["returns"]) == 10
    assert np.mean(run["returns"]) >= -200
    printed = re.search(r"^mean return of 10 episodes (-\d+\.\d)$", run["output"].getvalue(), re.MULTILINE)[1]
    assert float(printed) == round(np.mean(run["returns"]), 1)


def test_every_transition_after_the_warm_up_made_one_update_of_three_steps(run):
    state = run["state"]
    assert (state.batches, state.step, state.pending) == (STEPS - WARMUP, 3 * (STEPS - WARMUP), 0)


def test_the_replay_buffer_holds_what_the_pendulum_did_and_no_reset(run):
    replay = {name: column[:STEPS].astype(np.float64) for name, column in run["replay"].items()}
    assert not any(column[STEPS:].any() for column in run["replay"].values())
    assert not replay["terminated"].any()  # Episodes are cut short at 200 steps, and none ends.

    # Gymnasium's equations. All is float32 and at most 16, so rounded by less than 1e-6.
    (cos, sin, velocity), torque = replay["obs"].T, 2 * replay["action"][:, 0]
    angle = np.arctan2(sin, cos)
    cost = angle**2 + 0.1 * velocity**2 + 0.001 * torque**2
    velocity = np.clip(velocity + (15 * sin + 3 * torque) * 0.05, -8, 8)
    angle += velocity * 0.05
    np.testing.assert_allclose(replay["reward"], -cost, atol=1e-5)
    np.testing.assert_allclose(replay["next_obs"], np.stack([np.cos(angle), np.sin(angle), velocity], 1), atol=1e-5)

    before, after = replay["next_obs"].reshape(-1, ENVS, 3)[:-1], replay["obs"].reshape(-1, ENVS, 3)[1:]
    goes_on = (before == after).all(axis=-1)
    is_last = np.arange(1, len(goes_on) + 1) % 200 == 0
    assert goes_on[~is_last].all()
    assert not goes_on[is_last].any()


def test_a_seed_gives_the_same_run_again_and_another_gives_another(main, run):
    steps = WARMUP + 2 * ENVS  # The last actions are those of an actor that has learned.
    again, other = (main(["--steps", str(steps), "--seed", seed])["replay"] for seed in "01")
    assert all((column[:steps] == run["replay"][name][:steps]).all() for name, column in again.items())
    assert (other["obs"][:steps] != again["obs"][:steps]).any(axis=-1).all()


def dense(layers, x):
    for layer in layers[:-1]:
        x = jnp.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def value_of_each(critics, obs, action):
    inputs = jnp.concatenate([obs, action], axis=1)
    return [dense(jax.tree.map(lambda leaf, i=i: leaf[i], critics), inputs)[:, 0] for i in (0, 1)]


def sampled(actor, obs, key):
    out = dense(actor, obs)
    mean, log_std = out[:, :1], jnp.clip(out[:, 1:], -5, 2)
    raw = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    log_normal = -(((raw - mean) / jnp.exp(log_std)) ** 2) / 2 - log_std - jnp.log(2 * jnp.pi) / 2
    log_cosh = jnp.logaddexp(raw, -raw) - jnp.log(2.0)  # The slope of tanh is 1 / cosh².
    return jnp.tanh(raw), (log_normal + 2 * log_cosh)[:, 0]


ACTOR_FROM_OLD_CRITICS, TEMPERATURE_FROM_OLD_ACTOR, TARGET_MOVES_AFTER_EACH_PHASE = MISTAKES = (1, 2, 3)
ADAM = optax.adam(float(np.float32(1e-3)))  # with_lr keeps a rate as float32, with float64 parameters too.


@jax.jit
def update_by_hand(params, opt_states, batch, keys, mistake):
    """SAC as one writes it with jax.grad and optax: the new params and optimizer states, and the three losses."""
    params, opt_states, losses = dict(params), dict(opt_states), []
    old, alpha = dict(params), jnp.exp(params["log_alpha"])

    def step(name, loss):
        value, grads = jax.value_and_grad(loss)(params[name])
        updates, opt_states[name] = ADAM.update(grads, opt_states[name])
        params[name] = optax.apply_updates(params[name], updates)
        losses.append(value)

    def new_unless(made, name):
        return jax.tree.map(lambda before, after: jnp.where(mistake == made, before, after), old[name], params[name])

    action, log_density = sampled(params["actor"], batch["next_obs"], keys[0])
    future = jnp.minimum(*value_of_each(params["target"], batch["next_obs"], action)) - alpha * log_density
    wanted = jnp.where(batch["terminated"] == 1, batch["reward"], batch["reward"] + 0.99 * future)

    def critic_loss(critics):
        first, second = value_of_each(critics, batch["obs"], batch["action"])
        return (jnp.mean((first - wanted) ** 2) + jnp.mean((second - wanted) ** 2)) / 2

    step("critics", critic_loss)
    kept = jnp.where(mistake == TARGET_MOVES_AFTER_EACH_PHASE, 0.995**3, 0.995)
    params["target"] = jax.tree.map(lambda t, c: kept * t + (1 - kept) * c, params["target"], params["critics"])
    critics = new_unless(ACTOR_FROM_OLD_CRITICS, "critics")

    def actor_loss(actor):
        action, log_density = sampled(actor, batch["obs"], keys[1])
        return jnp.mean(alpha * log_density - jnp.minimum(*value_of_each(critics, batch["obs"], action)))

    step("actor", actor_loss)
    _, log_density = sampled(new_unless(TEMPERATURE_FROM_OLD_ACTOR, "actor"), batch["obs"], keys[2])
    step("log_alpha", lambda log_alpha: jnp.mean(-log_alpha * (log_density - 1)))
    return params, opt_states, losses


def test_the_compiled_update_is_sac_written_by_hand(run):
    rng, key = np.random.default_rng(0), jax.random.key(7)
    with jax.enable_x64(True):
        picked = rng.integers(STEPS, size=(3, 64))
        batches = {name: column[picked].astype(np.float64) for name, column in run["replay"].items()}
        batches["terminated"] = (rng.random((3, 64)) < 0.2).astype(np.float64)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), run["state"].params)

        update = run["update"]
        state, one = update(update.init(params, key=key), {name: column[0] for name, column in batches.items()})
        state, more = update.scan(state, {name: column[1:] for name, column in batches.items()})
        losses = [[one[phase]["loss"], *more[phase]["loss"]] for phase in ("critics", "actor", "temperature")]

        def by_hand(mistake=0):
            new, opt_states = params, {name: ADAM.init(params[name]) for name in ("critics", "actor", "log_alpha")}
            losses = []
            for n in range(3):
                batch = {name: column[n] for name, column in batches.items()}
                keys = [jax.random.fold_in(jax.random.fold_in(key, n), phase) for phase in range(3)]
                new, opt_states, three = update_by_hand(new, opt_states, batch, keys, mistake)
                losses.append(three)
            return new, np.transpose(losses)

        def distance(one, other):
            return optax.tree.norm(optax.tree.sub(one, other), ord=jnp.inf)

        # Sums of at most some thousand terms in another order: float64 rounds them by less than 1e-12 of their size.
        expected, expected_losses = by_hand()
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)
        assert distance(state.params, expected) < 1e-12
        for mistake in MISTAKES:
            assert distance(state.params, by_hand(mistake)[0]) > 1e-8
