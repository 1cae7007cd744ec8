"""Alternating phases: whose turn it is, what each updates, and that nothing else is computed or changed."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import run_with_rows as run
from soak import some

import functrain as ft
from functrain.update.phases import period


def gan_params():
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = {"discriminator": [(3, 8), (8, 1)], "generator": [(2, 8), (8, 3)]}
    drawn = iter(keys)
    return {part: [jax.random.normal(next(drawn), shape) for shape in of] for part, of in shapes.items()}


def mlp(weights, x):
    return jnp.tanh(x @ weights[0]) @ weights[1]


def generated(params, key, count):
    return mlp(params["generator"], jax.random.normal(key, (count, 2)))


def d_loss(params, batch, key):
    real, fake = mlp(params["discriminator"], batch), mlp(params["discriminator"], generated(params, key, len(batch)))
    return ft.Loss(
        fake.mean() - real.mean() + 0.1 * jnp.mean(real**2), weight=len(batch), metrics={"real": real.mean()}
    )


def g_loss(params, batch, key):
    return -mlp(params["discriminator"], generated(params, key, len(batch))).mean()


def optimizer_of(params, **transforms):
    adam = ft.with_lr(optax.adam, 1e-2, b1=0.5, b2=0.9)
    parts = ft.partition(params, {"discriminator": "discriminator", "generator": "generator"})
    return ft.Optimizer(parts, {"discriminator": adam, "generator": adam} | transforms)


def gan(d_repeat=3, **of_g):
    d = ft.Phase("D", d_loss, parts="discriminator", repeat=d_repeat)
    return ft.alternate(d, ft.Phase("G", g_loss, parts="generator", **of_g))


def batches_of(count, size=4):
    return jax.random.normal(jax.random.key(2), (count, size, 3))


def started(schedule=None, params=None, **options):
    params = gan_params() if params is None else params
    update = ft.make_update(gan() if schedule is None else schedule, optimizer_of(params), **options)
    return update, update.init(params, key=jax.random.key(3))


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def changed(before, after):
    return {part for part in before if any(map(np.any, jax.tree.map(np.not_equal, before[part], after[part])))}


# The systems that functrain agrees with.


def squared(params, batch):
    x, y = batch
    return jnp.mean((params["w"] * x - y) ** 2)


def absolute(params, batch):
    x, y = batch
    return jnp.mean(jnp.abs(params["w"] * x - y))


def nemo_batches():
    return [(jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0])), (jnp.array([3.0, 1.0]), jnp.array([6.0, 2.0]))] * 2


def test_alternating_losses_share_the_optimizer_of_their_part_as_in_nemo():
    with jax.enable_x64(True):
        params = {"w": jnp.zeros(())}
        optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.01, momentum=0.9)})
        turns = ft.alternate(ft.Phase("squared", squared, "all"), ft.Phase("absolute", absolute, "all"))
        update = ft.make_update(turns, optim)
        state, found = update.init(params), []
        for batch in nemo_batches():
            state, _ = update(state, batch)
            found.append(float(state.params["w"]))
    # Four additions of numbers below 1 in float64.
    np.testing.assert_allclose(found, [0.1, 0.21, 0.3985, 0.58815], rtol=0, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_the_generator_has_every_fourth_batch_as_in_nemo(count):
    update, state = started()
    state, rows = run(update, state, batches_of(count))
    counts = {part: int(optax.tree.get(state.opt_state[part], "count")) for part in state.opt_state}
    assert counts == {"discriminator": count - count // 4, "generator": count // 4}
    assert [list(row) for row in rows] == [["G"] if i % 4 == 3 else ["D"] for i in range(count)]


def test_the_phase_follows_from_the_step_across_a_resume():
    update, state = started()
    batches = batches_of(8)
    whole, _ = run(update, state, batches)
    update, state = started()
    state, _ = run(update, state, batches[:3])
    anew, _ = started()
    resumed, rows = run(anew, pickled(state), batches[3:])
    assert list(rows[0]) == ["G"]
    assert_equal(resumed.params, whole.params)


def pickled(state):
    """The state after a way through bytes, on which a typed key goes as its data."""
    data = pickle.dumps(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    read = pickle.loads(data)
    return dataclasses.replace(read, key=jax.random.wrap_key_data(read.key))


# What a phase computes.


def by_hand(params, batches, *, same_batch=False):
    """D, D, D, G written out with jax.grad and optax."""
    adam = optax.adam(1e-2, b1=0.5, b2=0.9)
    states = {part: adam.init(params[part]) for part in params}
    losses = {"discriminator": d_loss, "generator": g_loss}

    def one(params, states, part, batch, key):
        def loss(weights):
            value = losses[part](params | {part: weights}, batch, key)
            return value.value if isinstance(value, ft.Loss) else value

        updates, state = adam.update(jax.grad(loss)(params[part]), states[part], params[part])
        return params | {part: optax.apply_updates(params[part], updates)}, states | {part: state}

    one = jax.jit(one, static_argnums=2)
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(3), i)
        turn = ["generator"] if i % 4 == 3 and not same_batch else ["discriminator"]
        if same_batch and i % 3 == 2:
            turn = ["discriminator", "generator"]
        for part in turn:
            phase = ("discriminator", "generator").index(part)
            params, states = one(params, states, part, batch, jax.random.fold_in(key, phase))
    return params


@pytest.mark.slow
@pytest.mark.parametrize("same_batch", [False, True])
def test_phases_are_the_steps_written_by_hand(same_batch):
    update, state = started(gan(same_batch=same_batch))
    state, _ = run(update, state, batches_of(12))
    expected = by_hand(gan_params(), batches_of(12), same_batch=same_batch)
    # Adam divides a gradient by its own root: a last bit of difference in it is one of the update, 1e-2, a step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=12 * 1e-2 * 1e-5), state.params, expected)


def test_a_phase_leaves_every_bit_of_the_other_parts():
    update, state = started()
    for batch in batches_of(8):
        before = copy.deepcopy(state)
        state, metrics = update(state, batch)
        (name,) = metrics
        part, other = ("generator", "discriminator") if name == "G" else ("discriminator", "generator")
        assert changed(before.params, state.params) == {part}
        assert_equal(before.opt_state[other], state.opt_state[other])


def test_same_batch_follows_in_the_same_call_and_sees_what_the_phase_before_left():
    seen = []

    def follower(params, batch):
        jax.debug.callback(lambda *arrays: seen.append(arrays), params["discriminator"][0], batch)
        return sum(jnp.mean(leaf**2) for leaf in params["generator"])

    update, state = started(
        ft.alternate(ft.Phase("D", d_loss, "discriminator"), ft.Phase("G", follower, "generator", same_batch=True))
    )
    batch = batches_of(1)[0]
    state, metrics = update(state, batch)
    assert set(metrics) == {"D", "G"}
    assert (int(state.step), int(state.batches)) == (2, 1)
    np.testing.assert_array_equal(seen[0][0], state.params["discriminator"][0])
    np.testing.assert_array_equal(seen[0][1], batch)


def test_every_phase_and_repeat_has_a_key_of_its_own():
    def draw(params, batch, key):
        return ft.Loss(sum(map(jnp.sum, params["discriminator"])), metrics={"drawn": jax.random.uniform(key)})

    def draw_g(params, batch, key):
        return ft.Loss(sum(map(jnp.sum, params["generator"])), metrics={"drawn": jax.random.uniform(key)})

    phases = ft.alternate(
        ft.Phase("D", draw, "discriminator", repeat=2), ft.Phase("G", draw_g, "generator", same_batch=True, repeat=2)
    )
    update, state = started(phases)
    state, rows = run(update, state, batches_of(4))
    drawn = [float(x) for row in rows for of in row.values() for x in np.ravel(of["drawn"])]
    assert len(set(drawn)) == len(drawn) == 8
    assert rows[1]["G"]["drawn"].shape == (2,)
    first = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 1), 1)
    expected = [jax.random.uniform(first), jax.random.uniform(jax.random.fold_in(first, 1))]
    np.testing.assert_array_equal(rows[1]["G"]["drawn"], expected)


@pytest.mark.slow
def test_a_phase_compiles_the_backward_pass_of_its_own_parts_alone():
    def wide(key, *shape):
        return jax.random.normal(key, shape) / 16

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "discriminator": [wide(keys[0], 3, 256), wide(keys[1], 256, 1)],
        "generator": [wide(keys[2], 2, 256), wide(keys[3], 256, 3)],
    }
    update, state = started(params=params)
    batch = batches_of(1, 64)[0]

    def grad_of_d(params, batch, key):
        return jax.value_and_grad(lambda d: d_loss(params | {"discriminator": d}, batch, key).value)(
            params["discriminator"]
        )

    def grad_of_both(params, batch, key):
        return jax.value_and_grad(lambda p: d_loss(p, batch, key).value)(params)

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    alone, both = (flops(fn, params, batch, jax.random.key(0)) for fn in (grad_of_d, grad_of_both))
    adam = flops(optax.adam(1e-2).update, params["discriminator"], optax.adam(1e-2).init(params["discriminator"]))
    compiled = update.lower(state, batch).compile().cost_analysis()["flops"]
    assert both > 1.2 * alone
    # The sum of parameters and updates, two folded keys, counters: a few operations a parameter and a few hundred.
    assert alone < compiled < alone + adam + 5 * 1024 + 1500


# Together with the rest of an update.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "options"),
    some([(1, {}), (2, {}), (1, {"same_batch": True}), (2, {"repeat": 2}), (1, {"same_batch": True, "repeat": 2})], 2),
)
def test_scan_and_pure_leave_the_bits_of_call_after_call(accumulate, options):
    update, state = started(gan(**options), accumulate=accumulate)
    batches = batches_of(4 * update.cycle)
    called, rows = run(update, copy.deepcopy(state), batches)
    scanned, metrics = update.scan(copy.deepcopy(state), batches)
    cycles = batches.reshape(4, update.cycle, *batches.shape[1:]) if update.cycle > 1 else batches
    pure, _ = jax.jit(lambda state, batches: jax.lax.scan(update.pure, state, batches))(state, cycles)
    for other in (scanned, pure):
        for field in ("params", "opt_state", "step", "batches"):
            assert_equal(getattr(called, field), getattr(other, field))
    ended = rows[accumulate - 1 :: accumulate]
    for name in ("D", "G"):
        losses = np.concatenate([np.ravel(row[name]["loss"]) for row in ended if name in row])
        np.testing.assert_allclose(metrics[name]["loss"], losses, rtol=1e-6)


@pytest.mark.slow
def test_scan_begins_where_the_state_stands_in_the_cycle():
    update, state = started()
    batches = batches_of(10)
    called, _ = run(update, copy.deepcopy(state), batches)
    state, _ = run(update, state, batches[:2])
    state, metrics = update.scan(state, batches[2:])
    assert {name: of["loss"].shape for name, of in metrics.items()} == {"D": (6,), "G": (2,)}
    assert_equal(called.params, state.params)


@pytest.mark.slow
def test_a_window_belongs_to_one_phase():
    update, state = started(gan(1), accumulate=3)
    before = copy.deepcopy(state)
    state, rows = run(update, state, batches_of(3))
    assert changed(before.params, state.params) == {"discriminator"}
    before = copy.deepcopy(state)
    state, more = run(update, state, batches_of(2))
    assert changed(before.params, state.params) == set()
    assert state.window.grads.keys() == {"generator"}
    state, flushed = update.flush(state)
    assert changed(before.params, state.params) == {"generator"}
    assert [list(row) for row in [*rows, *more, flushed]] == [["D"]] * 3 + [["G"]] * 3
    expected = np.mean([float(row["G"]["loss"]) for row in more])
    np.testing.assert_allclose(flushed["G"]["loss"], expected, rtol=1e-6)


def test_measured_reports_the_parts_of_the_phase():
    update, state = started(gan(1))
    state, metrics = update.measured(state, batches_of(1)[0])
    assert metrics["D"]["parts"].keys() == {"discriminator"}
    state, metrics = update.measured(state, batches_of(1)[0])
    assert metrics["G"]["parts"].keys() == {"generator"}
    assert float(metrics["G"]["parts"]["generator"]["grad_norm"]) > 0


def test_after_runs_after_every_step_and_a_phases_own_after_its_steps_alone():
    def halved(params, model_state, step):
        return params, model_state | {"steps": model_state["steps"].at[step].add(1)}

    def counted(params, model_state, step):
        return params, model_state | {"of_g": model_state["of_g"] + step}

    schedule = ft.alternate(
        ft.Phase("D", d_loss, "discriminator", repeat=2),
        ft.Phase("G", g_loss, "generator", same_batch=True, after=counted),
    )
    params = gan_params()
    update = ft.make_update(schedule, optimizer_of(params), after=halved)
    none = {"steps": jnp.zeros(8, jnp.int32), "of_g": jnp.zeros((), jnp.int32)}
    state = update.init(params, key=jax.random.key(3), model_state=none)
    state, _ = run(update, state, batches_of(4))
    assert state.model_state["steps"].tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert int(state.model_state["of_g"]) == 3 + 6


def test_a_phase_that_returns_no_model_state_leaves_it():
    def counting(params, batch, key, model_state):
        loss = d_loss(params, batch, key)
        return ft.Loss(loss.value, model_state=model_state + 1)

    params = gan_params()
    schedule = ft.alternate(ft.Phase("D", counting, "discriminator", repeat=2), ft.Phase("G", g_loss, "generator"))
    update = ft.make_update(schedule, optimizer_of(params))
    state = update.init(params, key=jax.random.key(3), model_state=jnp.zeros((), jnp.int32))
    state, _ = run(update, state, batches_of(7))
    assert int(state.model_state) == 5


@pytest.mark.slow
def test_a_function_of_the_step_says_whose_turn_it_is():
    schedule = ft.alternate(
        ft.Phase("D", d_loss, "discriminator"),
        ft.Phase("G", g_loss, "generator"),
        phase=lambda step: "D" if step < 3 or step % 2 else "G",
    )
    update, state = started(schedule)
    called, rows = run(update, copy.deepcopy(state), batches_of(8))
    assert "".join(name for row in rows for name in row) == "DDDDGDGD"
    scanned, metrics = update.scan(copy.deepcopy(state), batches_of(8))
    assert {name: of["loss"].shape for name, of in metrics.items()} == {"D": (6,), "G": (2,)}
    assert_equal(called.params, scanned.params)
    with pytest.raises(ft.UpdateError, match=r"pure can't ask phase= .*: use update\(\.\.\.\) or update\.scan"):
        update.pure(state, batches_of(1)[0])


def test_a_warm_up_whose_follower_takes_the_same_batch():
    schedule = ft.alternate(
        ft.Phase("warm", d_loss, "discriminator"),
        ft.Phase("D", d_loss, "discriminator"),
        ft.Phase("G", g_loss, "generator", same_batch=True),
        phase=lambda step: "warm" if step < 2 else "D",
    )
    update, state = started(schedule)
    state, rows = run(update, state, batches_of(4))
    assert [list(row) for row in rows] == [["warm"], ["warm"], ["D", "G"], ["D", "G"]]
    assert int(state.step) == 6


def test_each_turn_is_compiled_once():
    traces = []

    def traced(params, batch, key):
        traces.append("D")
        return d_loss(params, batch, key)

    update, state = started(
        ft.alternate(ft.Phase("D", traced, "discriminator", repeat=3), ft.Phase("G", g_loss, "generator"))
    )
    state, _ = run(update, state, batches_of(12))
    assert len(update._programs.kept) == 2
    assert traces == ["D"]


def test_routes_and_weights_belong_to_a_phase():
    def two(params, batch):
        d, g = (sum(map(jnp.sum, params[part])) for part in ("discriminator", "generator"))
        return ft.Loss({"a": d + 2 * g, "b": 3 * d + 5 * g})

    params = gan_params()
    parts = ft.partition(params, {"discriminator": "discriminator", "generator": "generator"})
    optim = ft.Optimizer(parts, dict.fromkeys(parts.names, optax.sgd(1.0)))
    both = ("discriminator", "generator")
    schedule = ft.alternate(
        ft.Phase("routed", two, both, route={"discriminator": "b", "generator": {"a": 10.0}}),
        ft.Phase("weighted", two, both, loss_weights={"b": 100.0}),
    )
    update = ft.make_update(schedule, optim)
    state = update.init(params)
    for expected in ((-3.0, -20.0), (-301.0, -502.0)):
        before = jax.tree.map(np.asarray, state.params)
        state, _ = update(state, batches_of(1)[0])
        moved = [float((state.params[part][0] - before[part][0])[0, 0]) for part in both]
        np.testing.assert_allclose(moved, expected, rtol=1e-5)
    with pytest.raises(ft.UpdateError, match=r"route= and loss_weights= belong to one: ft\.Phase"):
        ft.make_update(schedule, optim, route={"discriminator": "a"})


def test_a_phase_consumes_its_own_networks_and_leaves_the_others_where_they_are():
    update, start = started(gan(d_repeat=1))
    own, other = ((start.params[part], start.opt_state[part]) for part in ("discriminator", "generator"))
    state, _ = update(start, batches_of(1)[0])
    # The rate last used is written and never read: no program is given it.
    kept = [path for path, leaf in ft.flatten(own).items() if not leaf.is_deleted()]
    assert [path.rpartition("/")[2] for path in kept] == ["learning_rate"]
    now = state.params["generator"], state.opt_state["generator"]
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (other, now)), strict=True))


def test_a_phase_whose_after_may_change_every_parameter_consumes_them_all():
    def after(params, model_state, step):
        return jax.tree.map(lambda leaf: leaf * 0.5, params), model_state

    schedule = ft.alternate(
        ft.Phase("D", d_loss, parts="discriminator", after=after), ft.Phase("G", g_loss, parts="generator")
    )
    update, start = started(schedule)
    consumed, before = start.params, jax.tree.map(jnp.copy, start.params["generator"])
    other = start.opt_state["generator"]
    state, _ = update(start, batches_of(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(consumed))
    for new, old in zip(state.params["generator"], before, strict=True):
        np.testing.assert_array_equal(new, old * 0.5)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(other))


@pytest.mark.slow
def test_phases_keep_the_layout_of_their_parameters():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = gan_params()
    laid_out = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, jax.NamedSharding(mesh, jax.P(None, "data") if leaf.shape[1] == 8 else jax.P())
        ),
        params,
    )
    update, state = started(params=laid_out, accumulate=2)
    before = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state))
    state, _ = run(update, state, batches_of(16))
    assert jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state)) == before
    assert len(update._programs.kept) == 4
    assert all(program.jitted._cache_size() == 1 for program in update._programs.kept.values())


def test_a_skipped_phase_is_counted_and_leaves_everything():
    update, state = started(gan(1), nonfinite="skip")
    state, _ = update(state, batches_of(1)[0])
    before = copy.deepcopy(state)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, batches_of(1)[0])
    update_d, state_d = started(gan(1), nonfinite="skip")
    state_d, metrics = update_d(state_d, broken)
    assert int(metrics["D"]["skipped"]) == 1
    assert bool(metrics["D"]["nonfinite"]["discriminator"])
    assert_equal(state_d.params, gan_params())
    assert int(state_d.step) == 1
    assert_equal(before.opt_state["generator"], started()[1].opt_state["generator"])


# Errors.


def phase(**changes):
    return ft.Phase(**({"name": "D", "loss_fn": d_loss, "parts": "discriminator"} | changes))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), r"takes phases, alternate\(ft\.Phase\(name, loss_fn, parts\)"),
        ((d_loss,), r"takes phases, alternate\(ft\.Phase"),
        ((phase(), phase()), r"phase 'D': give each phase a name of its own"),
        ((phase(name=""),), r"phase '': give each phase a name"),
        ((phase(loss_fn=3),), r"phase 'D': 3 is no loss function: give loss_fn\(params, batch\)"),
        ((phase(parts=()),), r"phase 'D' updates no part: name one"),
        ((phase(repeat=0),), r"phase 'D': repeat=0: give a whole number of at least 1"),
        ((phase(repeat=1.5),), r"phase 'D': repeat=1\.5: give a whole number"),
        ((phase(same_batch=True),), r"phase 'D' is the first, and has no batch before it: write same_batch=False"),
    ],
)
def test_phases_that_do_not_fit_each_other(phases, message):
    with pytest.raises(ft.PhaseError, match=message):
        ft.alternate(*phases)


def test_repeats_and_a_function_of_the_step_exclude_each_other():
    with pytest.raises(ft.PhaseError, match="repeat=2 and phase= exclude each other"):
        ft.alternate(phase(repeat=2), phase=lambda step: "D")


@pytest.mark.parametrize(
    ("parts", "transforms", "message"),
    [
        ("discriminatr", {}, r"phase 'D': unknown part 'discriminatr'; the parts are 'discriminator', 'generator'"),
        ("discriminator", {"discriminator": ft.FROZEN}, r"phase 'D' updates 'discriminator', which is frozen: give it"),
        ("discriminator", {}, r"no phase updates 'generator': name it in the parts of one, or freeze it"),
    ],
)
def test_phases_that_do_not_fit_the_optimizer(parts, transforms, message):
    with pytest.raises(ft.PhaseError, match=message):
        ft.make_update(ft.alternate(phase(parts=parts)), optimizer_of(gan_params(), **transforms))


def test_a_window_has_no_batch_to_share():
    with pytest.raises(ft.PhaseError, match=r"accumulate=2: phase 'G' takes the batch .* use microbatches=2"):
        started(gan(same_batch=True), accumulate=2)


@pytest.mark.parametrize("returned", ["E", None, 0, "G"])
def test_a_function_of_the_step_that_names_no_phase(returned):
    update, state = started(
        ft.alternate(phase(), ft.Phase("G", g_loss, "generator", same_batch=True), phase=lambda step: returned)
    )
    with pytest.raises(ft.PhaseError, match=rf"phase= returned {returned!r} for step 0: .* of 'D'"):
        update(state, batches_of(1)[0])


def test_a_state_of_another_schedule():
    update, state = started()
    state, _ = run(update, state, batches_of(1))
    other, _ = started(gan(1, same_batch=True))
    with pytest.raises(ft.PhaseError, match="step 1 is inside of a turn of several phases"):
        other(state, batches_of(1)[0])


def test_scan_takes_whole_cycles():
    update, state = started(accumulate=2)
    with pytest.raises(ft.UpdateError, match=r"a multiple of 8 of them \(accumulate=2, and 4 turns in a cycle\), not"):
        update.scan(state, batches_of(12))


def test_the_period_of_turns():
    turns = ((0,), (0,), (1,))
    assert period(turns * 5) == turns
    assert period(turns * 2 + turns[:1]) == turns * 2 + turns[:1]
