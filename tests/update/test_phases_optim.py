"""Phases that update a part with transforms of their own, as Lightning's two optimizers over one layer do."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functrain as ft

BATCHES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 3)), jnp.float32)


def start():
    return {"shared": jnp.full((3, 2), 0.5), "head": jnp.full(2, 0.25)}


def main_loss(params, batch):
    return jnp.mean((batch @ params["shared"] @ params["head"] - 1.0) ** 2)


def aux_loss(params, batch):
    return jnp.mean((batch @ params["shared"] - batch[:, :2]) ** 2)


MAIN = ft.Phase("main", main_loss, ("shared", "head"))
OWN = optax.sgd(0.125, momentum=0.5)


def aux(tx=OWN, **options):
    return ft.Phase("aux", aux_loss, "shared", optim={"shared": tx}, **options)


def optim_of(shared=None, **options):
    parts = ft.partition(start(), {"shared": "shared", "head": "head"})
    shared = ft.with_lr(optax.adam, 0.0625) if shared is None else shared
    return ft.Optimizer(parts, {"shared": shared, "head": ft.with_lr(optax.sgd, 0.25)}, **options)


def started(*phases, optim=None, **options):
    update = ft.make_update(ft.alternate(*(phases or (MAIN, aux()))), optim or optim_of(), **options)
    return update, update.init(start())


def run(update, state, batches, **options):
    for batch in batches:
        state, metrics = update(state, batch, **options)
    return state, metrics


def bits(state):
    fields = {"params": state.params, "opt": state.opt_state, "ema": state.ema, "window": state.window}
    return {path: np.asarray(leaf).tobytes() for path, leaf in ft.flatten(fields).items()}


def by_hand(batches):
    """Adam after the main loss and SGD after the other, each with its own state, over one layer."""
    adam, sgd, params = optax.adam(0.0625), optax.sgd(0.25), start()
    states = {"adam": adam.init(params["shared"]), "sgd": sgd.init(params["head"]), "own": OWN.init(params["shared"])}

    @jax.jit
    def main(params, states, batch):
        grads = jax.grad(main_loss)(params, batch)
        shared, of_adam = adam.update(grads["shared"], states["adam"])
        head, of_sgd = sgd.update(grads["head"], states["sgd"])
        params = optax.apply_updates(params, {"shared": shared, "head": head})
        return params, states | {"adam": of_adam, "sgd": of_sgd}

    @jax.jit
    def aux(params, states, batch):
        grads = jax.grad(lambda shared: aux_loss(params | {"shared": shared}, batch))(params["shared"])
        shared, of_own = OWN.update(grads, states["own"])
        return params | {"shared": optax.apply_updates(params["shared"], shared)}, states | {"own": of_own}

    for number, batch in enumerate(batches):
        params, states = (aux if number % 2 else main)(params, states, batch)
    return params


def test_two_optimizers_over_one_layer_are_the_steps_written_by_hand():
    update, state = started()
    state, _ = run(update, state, BATCHES)
    # Adam divides a gradient by its own root: a last bit of difference in it is one of the update, 0.0625, a step.
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=8 * 0.0625 * 1e-5),
        state.params, by_hand(BATCHES),
    )  # fmt: skip


def test_each_has_a_state_of_its_own_which_the_other_phase_leaves():
    update, state = started()
    assert sorted(state.opt_state) == ["head", "shared", "shared@aux"]
    for batch, changes in zip(BATCHES[:2], ({"shared", "head"}, {"shared@aux"}), strict=True):
        before = copy.deepcopy(state)
        state, _ = update(state, batch)
        differs = jax.tree.map(np.not_equal, before.opt_state, state.opt_state)
        changed = {name for name, leaves in differs.items() if any(map(np.any, jax.tree.leaves(leaves)))}
        assert changed - {"head"} == changes - {"head"}  # Plain SGD has no state but its rate.


@pytest.mark.parametrize(
    "options", [{}, {"same_batch": True}, {"every": 2}], ids=["own batches", "same batch", "every second"]
)
def test_scan_and_pure_leave_the_bits_of_call_after_call(options):
    update, first = started(MAIN, aux(**options), ema=0.5)
    batches = BATCHES[: 2 * update.cycle]
    called, _ = run(update, copy.deepcopy(first), batches)
    scanned, _ = update.scan(copy.deepcopy(first), batches)
    cycles = batches.reshape(2, update.cycle, *batches.shape[1:]) if update.cycle > 1 else batches
    pure, _ = jax.jit(lambda state, batches: jax.lax.scan(update.pure, state, batches))(first, cycles)
    assert bits(called) == bits(scanned) == bits(pure)


def test_a_window_ends_with_the_transform_of_its_phase():
    update, state = started(accumulate=2)
    state, _ = run(update, state, jnp.repeat(BATCHES[:4], 2, axis=0))
    other, expected = started()
    expected, _ = run(other, expected, BATCHES[:4])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, expected.params)


def test_its_rate_is_read_set_and_given_under_its_name():
    update, state = started(MAIN, aux(ft.with_lr(optax.sgd, 0.125)))
    assert {name: float(rate) for name, rate in update.optim.learning_rates(state.opt_state).items()} == {
        "shared": 0.0625, "head": 0.25, "shared@aux": 0.125,
    }  # fmt: skip
    state, _ = update(state, BATCHES[0])
    before = np.asarray(state.params["shared"])
    state, metrics = update.measured(state, BATCHES[1], lr={"shared@aux": 0.0})
    np.testing.assert_array_equal(state.params["shared"], before)
    assert float(metrics["aux"]["parts"]["shared"]["learning_rate"]) == 0.0


def test_a_run_is_saved_logged_and_goes_on_to_the_bit(tmp_path):
    def of_x(loss):
        return lambda params, batch: loss(params, batch["x"])

    def trained(steps, directory):
        phases = [
            ft.Phase("main", of_x(main_loss), ("shared", "head")),
            ft.Phase("aux", of_x(aux_loss), "shared", optim={"shared": ft.with_lr(optax.adam, 0.125)}),
        ]
        update, state = started(*phases)
        data = ft.from_arrays({"x": np.asarray(BATCHES).reshape(-1, 3)}, batch_size=6)
        checkpoints = ft.Checkpoints(directory)
        return ft.fit(update, state, data, steps=steps, epochs=1, log=ft.Every(updates=1), checkpoints=checkpoints)

    whole = trained(8, tmp_path / "whole")
    trained(3, tmp_path / "cut")
    assert bits(trained(8, tmp_path / "cut").state) == bits(whole.state)
    assert whole.history[-1]["train/learning_rate/shared@aux"] == 0.125
    assert "train/aux/parts/shared/grad_norm" in whole.history[-1]


def test_a_checkpoint_with_another_transform_of_a_phase_is_told(tmp_path):
    update, state = started()
    state, _ = run(update, state, BATCHES[:2])
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    _, other = started(MAIN, aux(optax.sgd(0.25, momentum=0.5)))
    with pytest.warns(UserWarning, match="part 'shared@aux': step_size of .* was -0.125, is now -0.25"):
        checkpoints.restore(like=other)
    update, other = started(MAIN, aux(optax.adam(0.25)))
    with pytest.raises(ft.CheckpointError, match="shared@aux"):
        checkpoints.restore(like=other)
    restored = checkpoints.restore(like=other, regroup=True)
    report = str(restored.report)
    assert "shared: carried over from 'shared': count (1 leaf), mu (1 leaf), nu (1 leaf)" in report
    assert "shared@aux: started anew" in report
    run(update, restored.state, BATCHES[:2])


def test_adoption_carries_each_over_to_the_one_of_its_name():
    update, state = started()
    state, _ = run(update, state, BATCHES[:2])
    trace = np.asarray(state.opt_state["shared@aux"][0].trace["shared"])
    other, _ = started(MAIN, aux(optax.sgd(0.25, momentum=0.5)))
    adopted, report = other.adopt(update, state)
    np.testing.assert_array_equal(adopted.opt_state["shared@aux"][0].trace["shared"], trace)
    assert "shared@aux: carried over from 'shared@aux': trace (1 leaf)" in str(report)
    alone = ft.make_update(main_loss, optim_of())
    _, report = alone.adopt(other, adopted)
    assert "shared@aux: dropped: trace (1 leaf)" in str(report)


def test_it_is_in_the_table_and_in_the_audit():
    update, _ = started()
    assert re.search(
        r"shared .* adam; in aux chain\(trace\(decay=0\.5\), scale\(step_size=-0\.125\)\)", str(update.optim)
    )
    schedule, optim = ft.alternate(MAIN, aux()), optim_of()
    audits = [ft.audit(each, optim.parts, start(), BATCHES[0], optim=optim)
              for each in (schedule, ft.alternate(MAIN, ft.Phase("aux", aux_loss, "shared")))]  # fmt: skip
    own, common = (each.state_bytes["shared"] for each in audits)
    assert own == common + 4 * 6  # Its momentum.


def test_a_step_of_ones_own_names_the_other_transforms():
    optim = optim_of(others={"aux": {"shared": OWN}})
    opt_state = optim.init(start())
    grads = {"shared": {"shared": jnp.ones((3, 2))}, "head": {"head": jnp.ones(2)}}
    params, opt_state = optim.step(start(), grads, opt_state, using="aux")
    np.testing.assert_array_equal(params["shared"], start()["shared"] - 0.125)
    np.testing.assert_array_equal(params["head"], start()["head"] - 0.25)
    with pytest.raises(
        ft.OptimizerError, match=re.escape("using='axu': the optimizer has no other transforms of that")
    ):
        optim.step(params, grads, opt_state, using="axu")


# Mistakes.


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((MAIN, ft.Phase("aux", aux_loss, "shared", optim={"head": OWN})),
         "phase 'aux' has a transform of 'head', which it does not update: name it in parts=, or leave it"),
        ((ft.Phase("main", main_loss, "head"), aux()),
         "every phase that updates 'shared' has a transform of its own for it, and that of the optimizer would"),
        ((MAIN, ft.Phase("aux", aux_loss, "shared", optim=OWN)), "give transforms by part, optim={'body': optax"),
    ],
    ids=["another part", "no other use", "no part"],
)  # fmt: skip
def test_transforms_that_do_not_fit_the_phases(phases, message):
    with pytest.raises(ft.PhaseError, match=re.escape(message)):
        started(*phases)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"aux": {"shard": OWN}}, "others has a transform of 'shard' in 'aux', which is frozen or no part: give it"),
        ({"aux": {"shared": 0.1}}, "part 'shared' in 'aux': 0.1 is no optax transform; write e.g. optax.adam(1e-3)"),
        ({"shared": OWN}, "give transforms by name and part, {'aux': {'shared': optax.sgd(0.1)}}"),
    ],
    ids=["no part", "no transform", "no name"],
)  # fmt: skip
def test_others_that_do_not_fit_the_optimizer(others, message):
    with pytest.raises(ft.OptimizerError, match=re.escape(message)):
        optim_of(others=others)


def test_a_part_that_is_called_like_such_a_state_is_an_error():
    params = {"shared": jnp.ones(2), "b": jnp.ones(2)}
    parts = ft.partition(params, {"shared": "shared", "shared@aux": "b"})
    with pytest.raises(ft.OptimizerError, match="would have the name of the part 'shared@aux': rename one of them"):
        ft.Optimizer(parts, dict.fromkeys(parts.names, OWN), others={"aux": {"shared": OWN}})
