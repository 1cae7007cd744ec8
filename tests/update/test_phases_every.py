"""Phases that have their turn every k-th time, and phases that read what those before them returned."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import run_with_rows as run

import functrain as ft

RNG = np.random.default_rng(0)
BATCHES = jnp.asarray(RNG.normal(size=(12, 8, 3)), jnp.float32)


def start():
    keys = jax.random.split(jax.random.key(0))
    return {"critic": jax.random.normal(keys[0], (5,)), "actor": jax.random.normal(keys[1], (3, 2)),
            "temperature": jnp.zeros(())}  # fmt: skip


def value(params, batch):
    return jnp.concatenate([batch, jnp.tanh(batch @ params["actor"])], axis=1) @ params["critic"]


def critic_loss(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch.shape)
    return jnp.mean((value(params, batch + noise) - batch.sum(1)) ** 2)


def actor_loss(params, batch, key):
    entropy = jnp.mean(jnp.tanh(batch @ params["actor"]) ** 2) + jax.random.uniform(key)
    loss = jnp.exp(params["temperature"]) * entropy - jnp.mean(value(params, batch))
    return ft.Loss(loss, metrics={"entropy": entropy})


def temperature_loss(params, batch, before):
    return params["temperature"] * (before["actor"]["entropy"] - 1.0)


ADAM = ft.with_lr(optax.adam, 0.01)


def optim_of(**transforms):
    parts = ft.partition(start(), {part: part for part in start()})
    return ft.Optimizer(parts, {"critic": ADAM, "actor": ADAM, "temperature": ft.FROZEN} | transforms)


def started(*phases, optim=None, **options):
    update = ft.make_update(ft.alternate(*phases), optim or optim_of(), **options)
    return update, update.init(start(), key=jax.random.key(3))


CRITIC = ft.Phase("critic", critic_loss, "critic")
DELAYED = ft.Phase("actor", actor_loss, "actor", same_batch=True, every=2)


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in ft.flatten(tree).items()}


def bits_of(state):
    counters = {"step": int(state.step), "batches": int(state.batches)}
    return bits({"params": state.params, "opt": state.opt_state, **counters})


def names_of(schedule):
    return ["".join(schedule.phases[index].name for index in turn) for turn in schedule.cycle]


def no_loss(params, batch):
    return jnp.zeros(())


def phase(name, **options):
    return ft.Phase(name, no_loss, "critic", **options)


# Whose turn it is.


@pytest.mark.parametrize(
    ("phases", "cycle"),
    [
        ([phase("c"), phase("a", same_batch=True, every=2)], ["c", "ca"]),
        ([phase("c"), phase("a", every=3)], ["c", "c", "c", "a"]),
        ([phase("c", repeat=2), phase("a", same_batch=True, every=2)], ["c", "c", "c", "ca"]),
        ([phase("c"), phase("a", same_batch=True, every=2, repeat=2)], ["c", "caa"]),
        ([phase("c"), phase("a", same_batch=True, every=2), phase("t", same_batch=True, every=3)],
         ["c", "ca", "ct", "ca", "c", "cat"]),
        ([phase("c", every=2), phase("a", same_batch=True, every=2), phase("d")], ["d", "c", "d", "d", "ca", "d"]),
        ([phase("c"), phase("a", every=2, repeat=2)], ["c", "c", "a", "a"]),
    ],
)  # fmt: skip
def test_a_phase_has_its_turn_in_each_so_many_th_cycle_from_that_one_on(phases, cycle):
    assert names_of(ft.alternate(*phases)) == cycle


# TD3.


def td3_by_hand(batches):
    """The critic on each batch, the actor on every second, `it % 2 == 0` with `it` from 1, with jax.grad and optax."""
    params, adam = start(), optax.adam(0.01)
    states = {part: adam.init(params[part]) for part in ("critic", "actor")}
    losses = {"critic": critic_loss, "actor": lambda *given: actor_loss(*given).value}

    @jax.jit
    def both(params, states, batch, key):
        for index, part in enumerate(losses):
            params, states = one(params, states, part, batch, jax.random.fold_in(key, index))
        return params, states

    @jax.jit
    def critic(params, states, batch, key):
        return one(params, states, "critic", batch, jax.random.fold_in(key, 0))

    def one(params, states, part, batch, key):
        grads = jax.grad(lambda leaf: losses[part](params | {part: leaf}, batch, key))(params[part])
        updates, state = adam.update(grads, states[part], params[part])
        return params | {part: optax.apply_updates(params[part], updates)}, states | {part: state}

    for it, batch in enumerate(batches, 1):
        step = both if it % 2 == 0 else critic
        params, states = step(params, states, batch, jax.random.fold_in(jax.random.key(3), it - 1))
    return params


def test_a_delayed_policy_is_the_steps_written_by_hand_and_the_critic_has_one_name():
    update, state = started(CRITIC, DELAYED)
    state, rows = run(update, state, BATCHES[:7])
    assert [sorted(row) for row in rows] == [["critic"], ["actor", "critic"]] * 3 + [["critic"]]
    assert all(jnp.shape(of_phase["loss"]) == () for row in rows for of_phase in row.values())
    assert (int(state.batches), int(state.step)) == (7, 7 + 3)
    # Adam divides a gradient by its own root: a last bit of difference in it is one of the update, 1e-2, a step.
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=7 * 1e-2 * 1e-5),
        state.params, td3_by_hand(BATCHES[:7]),
    )  # fmt: skip


def test_scan_and_pure_leave_the_bits_of_call_after_call():
    update, first = started(CRITIC, DELAYED)
    called, rows = run(update, copy.deepcopy(first), BATCHES[:8])
    scanned, metrics = update.scan(copy.deepcopy(first), BATCHES[:8])
    cycles = BATCHES[:8].reshape(4, 2, *BATCHES.shape[1:])
    pure, _ = jax.jit(lambda state, batches: jax.lax.scan(update.pure, state, batches))(first, cycles)
    assert update.cycle == 2
    assert bits_of(called) == bits_of(scanned) == bits_of(pure)
    losses = {name: [float(row[name]["loss"]) for row in rows if name in row] for name in ("critic", "actor")}
    assert {name: len(each) for name, each in losses.items()} == {"critic": 8, "actor": 4}
    for name, each in losses.items():
        np.testing.assert_allclose(metrics[name]["loss"], each, rtol=1e-6)


def test_a_state_goes_on_in_the_middle_of_a_cycle():
    update, state = started(CRITIC, DELAYED)
    whole, _ = run(update, copy.deepcopy(state), BATCHES[:6])
    state, _ = run(update, state, BATCHES[:3])
    anew, _ = started(CRITIC, DELAYED)
    resumed, rows = run(anew, state, BATCHES[3:6])
    assert [len(row) for row in rows] == [2, 1, 2]
    assert bits_of(resumed) == bits_of(whole)


def test_a_delayed_phase_of_its_own_batches_may_be_of_windows():
    update, state = started(CRITIC, ft.Phase("actor", actor_loss, "actor", every=2), accumulate=2)
    state, rows = run(update, state, BATCHES[:6])
    assert [list(row) for row in rows] == [["critic"]] * 4 + [["actor"]] * 2


def test_fit_has_a_row_of_each_phase_under_its_name_and_goes_on_within_a_cycle(tmp_path):
    def of_x(loss):
        return lambda params, batch, key: loss(params, batch["x"], key)

    def trained(steps, directory):
        phases = [dataclasses.replace(phase, loss_fn=of_x(phase.loss_fn)) for phase in (CRITIC, DELAYED)]
        update, state = started(*phases)
        data = ft.from_arrays({"x": np.asarray(BATCHES).reshape(-1, 3)}, batch_size=8)
        checkpoints = ft.Checkpoints(directory)
        return ft.fit(update, state, data, steps=steps, epochs=1, log=ft.Every(updates=1), checkpoints=checkpoints)

    whole = trained(10, tmp_path / "whole")
    trained(4, tmp_path / "cut")
    assert bits_of(trained(10, tmp_path / "cut").state) == bits_of(whole.state)
    first, second = (row for row in whole.history[:2])
    assert "train/actor/loss" not in first
    assert {"train/critic/loss", "train/actor/loss", "train/actor/entropy"} <= second.keys()


def test_a_cadence_that_is_changed_is_another_schedule_to_a_checkpoint(tmp_path):
    for every, differs in ((2, False), (3, True)):
        update, state = started(CRITIC, ft.Phase("actor", actor_loss, "actor", same_batch=True, every=every))
        checkpoints = ft.Checkpoints(tmp_path)
        if differs:
            with pytest.raises(ft.CheckpointError, match="phases"):
                checkpoints.restore(like=state)
        else:
            state, _ = run(update, state, BATCHES[:2])
            with checkpoints:
                checkpoints.save(state)


# What the phases before have returned.


TEMPERATURE = ft.Phase("temperature", temperature_loss, "temperature", same_batch=True)
ACTOR = ft.Phase("actor", actor_loss, "actor", same_batch=True)


def sac(**options):
    return started(CRITIC, ACTOR, TEMPERATURE, optim=optim_of(temperature=optax.sgd(0.5)), **options)


@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "skip"}, {"microbatches": 2}], ids=["plain", "skip", "microbatches"]
)
def test_a_temperature_learns_from_the_entropy_that_the_actor_had_on_the_same_batch(options):
    update, state = sac(**options)
    before = float(state.params["temperature"])
    for batch in BATCHES[:3]:
        state, metrics = update(state, batch)
        expected = np.float32(before - 0.5 * (metrics["actor"]["entropy"] - 1.0))
        np.testing.assert_allclose(state.params["temperature"], expected, rtol=1e-6)
        before = float(state.params["temperature"])


def test_it_is_so_in_a_scan_and_with_telemetry():
    update, first = sac()
    called, _ = run(update, copy.deepcopy(first), BATCHES[:4])
    scanned, metrics = update.scan(copy.deepcopy(first), BATCHES[:4])
    assert metrics["temperature"]["loss"].shape == (4,)
    measured = first
    for batch in BATCHES[:4]:
        measured, _ = update.measured(measured, batch)
    for other in (scanned, measured):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), called.params, other.params)


def test_it_is_given_the_metrics_of_all_phases_before_on_its_batch_and_no_others():
    seen = []

    def watching(params, batch, before):
        seen.append(jax.tree.map(jnp.shape, before))
        return 0.0 * params["temperature"]

    phases = (
        ft.Phase("first", critic_loss, "critic"), CRITIC, DELAYED,
        ft.Phase("watching", watching, "temperature", same_batch=True, repeat=2),
    )  # fmt: skip
    update, state = started(*phases, optim=optim_of(temperature=optax.sgd(0.5)), nonfinite="skip")
    run(update, state, BATCHES[:4])
    critic, actor = {"critic": {"loss": ()}}, {"actor": {"loss": (), "entropy": ()}}
    assert [each for each in seen if each in (critic, critic | actor)] == seen
    assert critic in seen
    assert critic | actor in seen


def test_a_loss_that_need_not_have_it_is_given_it_where_there_is_any():
    def optional(params, batch, before=None):
        return params["critic"].sum() * (2.0 if before is None else len(before))

    update, state = started(
        ft.Phase("alone", optional, "critic"), ft.Phase("after", optional, "critic", same_batch=True),
        optim=optim_of(critic=optax.sgd(1.0), actor=ft.FROZEN),
    )  # fmt: skip
    state, _ = update(state, BATCHES[0])
    np.testing.assert_allclose(state.params["critic"], start()["critic"] - 3.0, rtol=1e-6)


def test_the_audit_traces_it():
    optim = optim_of(temperature=optax.sgd(0.5))
    audit = ft.audit(ft.alternate(CRITIC, ACTOR, TEMPERATURE), optim.parts, start(), BATCHES[0], optim=optim)
    assert not audit.findings
    assert audit.reached["temperature"] == {"temperature"}


def test_a_phase_that_comes_half_as_often_costs_half_as_much():
    optim = optim_of()
    shares = [
        ft.audit(ft.alternate(CRITIC, each), optim.parts, start(), BATCHES[0], optim=optim).backward
        for each in (ACTOR, DELAYED)
    ]
    always, half = (each["actor"] / each["critic"] for each in shares)
    np.testing.assert_allclose(half, always / 2)


def test_a_train_step_is_given_it_by_its_caller():
    train_step = ft.make_train_step(temperature_loss)
    grads, _ = train_step(start(), BATCHES[0], before={"actor": {"entropy": 3.0}})
    assert float(grads["temperature"]) == 2.0
    with pytest.raises(ft.LossError, match=re.escape("declares 'before': call train_step(..., before=...)")):
        train_step(start(), BATCHES[0])


# Mistakes.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ft.alternate(phase("a", every=0)), "phase 'a': every=0: give a whole number of at least 1"),
        (lambda: ft.alternate(phase("a", every=2), phase=lambda step: "a"), "every=2 and phase= exclude each other"),
        (lambda: started(CRITIC, ft.Phase("actor", actor_loss, "actor"), ft.Phase("t", temperature_loss, "critic")),
         "phase 't': temperature_loss declares before, the metrics of the phases before it on the same batch, but"),
        (lambda: started(CRITIC, DELAYED, accumulate=2), "accumulate=2: phase 'actor' takes the batch of the phase"),
    ],
    ids=["zero", "a function of the step", "a batch of its own", "a window"],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(make, message):
    with pytest.raises(ft.PhaseError, match=re.escape(message)):
        make()


def test_without_phases_nothing_comes_before():
    with pytest.raises(ft.UpdateError, match=re.escape("temperature_loss declares before, the metrics of the phases")):
        ft.make_update(temperature_loss, optim_of())
