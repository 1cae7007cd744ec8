"""Soft actor-critic with a learned temperature (Haarnoja et al., 2018), which swings up Gymnasium's pendulum.

Twin critics, an actor and a temperature learn in three phases from each batch; one compiled call makes eight updates.
"""

import argparse

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

ENVS, BATCH, CAPACITY, WARMUP, DISCOUNT, POLYAK = 8, 128, 100_000, 800, 0.99, 0.005
OBS, ACTION, TORQUE = 3, 1, 2.0  # The pendulum's sizes, and its largest action.
SHAPES = {"obs": (OBS,), "next_obs": (OBS,), "action": (ACTION,), "reward": (), "terminated": ()}


def mlp_init(key, *sizes):
    layers = zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True)
    return [{"kernel": jax.random.normal(k, (i, o)) * i**-0.5, "bias": jnp.zeros(o)} for k, i, o in layers]


def mlp(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def twin_values(critics, obs, action):
    return jax.vmap(mlp, in_axes=(0, None))(critics, jnp.concatenate([obs, action], axis=-1))[..., 0]


@jax.jit
def policy(actor, obs, key=None):
    """Actions in (-1, 1) and their log-densities; without a key, of no noise."""
    mean, log_std = jnp.split(mlp(actor, obs), 2, axis=-1)
    log_std = jnp.clip(log_std, -5, 2)
    noise = jnp.zeros_like(mean) if key is None else jax.random.normal(key, mean.shape)
    raw = mean + jnp.exp(log_std) * noise
    log_slope = 2 * (jnp.log(2) - raw - jax.nn.softplus(-2 * raw))  # log(1 - tanh(raw)²), which would round to log(0).
    return jnp.tanh(raw), jnp.sum(jax.scipy.stats.norm.logpdf(noise) - log_std - log_slope, axis=-1)


# A phase differentiates its own parts and no others, so that none of these losses needs a stop_gradient.
def critic_loss(params, batch, key):
    action, log_density = policy(params["actor"], batch["next_obs"], key)
    value = twin_values(params["target"], batch["next_obs"], action).min(0) - jnp.exp(params["log_alpha"]) * log_density
    wanted = batch["reward"] + DISCOUNT * (1 - batch["terminated"]) * value
    return jnp.mean((twin_values(params["critics"], batch["obs"], batch["action"]) - wanted) ** 2)


def actor_loss(params, batch, key):
    action, log_density = policy(params["actor"], batch["obs"], key)
    value = twin_values(params["critics"], batch["obs"], action).min(0)
    return jnp.mean(jnp.exp(params["log_alpha"]) * log_density - value)


def temperature_loss(params, batch, key):
    entropy = -policy(params["actor"], batch["obs"], key)[1].mean()
    return params["log_alpha"] * (entropy + ACTION)  # Towards an entropy of -1 for each dimension of an action.


def move_target(params, model_state, step):
    return params | {"target": optax.incremental_update(params["critics"], params["target"], POLYAK)}, model_state


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16_000, help="of all environments together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    actor_key, critics_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 4)
    actor = mlp_init(actor_key, OBS, 64, 64, 2 * ACTION)
    critics = jax.vmap(lambda key: mlp_init(key, OBS + ACTION, 64, 64, 1))(jax.random.split(critics_key))
    params = {"actor": actor, "critics": critics, "target": jax.tree.map(jnp.copy, critics), "log_alpha": jnp.zeros(())}
    parts = ft.partition(params, {"actor": "actor", "critics": "critics", "target": "target", "temperature": ...})
    adam = ft.with_lr(optax.adam, 1e-3)
    optim = ft.Optimizer(parts, {"actor": adam, "critics": adam, "target": ft.FROZEN, "temperature": adam})
    phases = ft.alternate(
        ft.Phase("critics", critic_loss, parts="critics", after=move_target),  # After one phase: once an update.
        ft.Phase("actor", actor_loss, parts="actor", same_batch=True),
        ft.Phase("temperature", temperature_loss, parts="temperature", same_batch=True),
    )
    update = ft.make_update(phases, optim)
    state = update.init(params, key=update_key)
    print(f"{optim}\n")

    envs = gym.make_vec("Pendulum-v1", ENVS, vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.DISABLED})
    obs, _ = envs.reset(seed=args.seed)
    replay = {name: np.zeros((CAPACITY, *shape), np.float32) for name, shape in SHAPES.items()}
    returns, rng = np.zeros(ENVS), np.random.default_rng(args.seed)
    for seen in range(ENVS, args.steps + 1, ENVS):
        action = np.asarray(policy(state.params["actor"], obs, jax.random.fold_in(act_key, seen))[0])
        next_obs, reward, terminated, truncated, _ = envs.step(TORQUE * action)
        new = {"obs": obs, "next_obs": next_obs, "action": action, "reward": reward, "terminated": terminated}
        for name, rows in new.items():
            replay[name][np.arange(seen - ENVS, seen) % CAPACITY] = rows
        if seen > WARMUP:
            picked = rng.integers(min(seen, CAPACITY), size=(ENVS, BATCH))
            state, metrics = update.scan(state, {name: column[picked] for name, column in replay.items()})
        obs, returns = next_obs, returns + reward
        if (ended := terminated | truncated).any():
            print(f"{seen:6,}  return {returns[ended].mean():7.1f}  critic loss {metrics['critics']['loss'][-1]:.3f}")
            obs, _ = envs.reset(options={"reset_mask": ended})  # By hand: no transition leads into the next episode.
            returns[ended] = 0

    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("Pendulum-v1", 10))
    obs, _ = envs.reset(seed=1000)
    while envs.episode_count < 10:
        obs, *_ = envs.step(TORQUE * np.asarray(policy(state.params["actor"], obs)[0]))
    print(f"\nmean return of 10 episodes {np.mean(envs.return_queue):.1f}")
    return {"returns": list(envs.return_queue), "replay": replay, "state": state, "update": update}


if __name__ == "__main__":
    main()
