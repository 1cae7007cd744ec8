"""States taken over by other optimizers: what fits is carried to the bit, the rest starts anew, and all is told."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import bits, says

import functrain as ft
from functrain.errors import CheckpointError

SGD, MOMENTUM, ADAM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
A, B = "layer_a", "layer_b"


@pytest.fixture(autouse=True)
def no_donation_is_lost():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        yield


def layers():
    """Two linear layers, 4x4."""
    keys = jax.random.split(jax.random.key(0))
    return {
        name: {"w": jax.random.normal(key, (4, 4)), "b": jnp.zeros(4)} for name, key in zip((A, B), keys, strict=True)
    }


def loss_fn(params, batch):
    hidden = batch @ params[A]["w"] + params[A]["b"]
    return jnp.mean((hidden @ params[B]["w"] + params[B]["b"] - 1) ** 2)


def batch_of(number):
    return jax.random.normal(jax.random.key(number), (3, 4))


def update_of(rules=None, loss=loss_fn, params=None, **txs):
    """An update whose parts are the layers, unless rules say otherwise; `{part: transform}`."""
    rules = {part: part for part in txs} if rules is None else rules
    params = layers() if params is None else params
    return ft.make_update(loss, ft.Optimizer(ft.partition(params, rules), txs), audit=False)


def trained(update, steps=3, params=None, state=None):
    state = update.init(layers() if params is None else params) if state is None else state
    for number in range(steps):
        state, _ = update(state, batch_of(number))
    return state


def flat(opt_state):
    return {f"{part}/{path}": leaf for part, state in opt_state.items() for path, leaf in ft.flatten(state).items()}


def exactly(leaves, expected):
    """Whether leaves are those, to the bit."""
    return leaves.keys() == expected.keys() and all(np.array_equal(leaves[name], expected[name]) for name in leaves)


@pytest.fixture
def saved(tmp_path):
    """Saves a state, and gives the checkpoints."""
    made = []

    def save(state):
        checkpoints = ft.Checkpoints(tmp_path / str(len(made)), asynchronous=False)
        made.append(checkpoints)
        checkpoints.save(state)
        return checkpoints

    yield save
    for checkpoints in made:
        checkpoints.close()


# Burn 5.


def test_sgd_on_all_and_adam_on_one_layer_make_the_same_step_after_a_restart(saved):
    update = update_of({A: A, "all": ...}, **{A: ADAM, "all": SGD})
    state = trained(update)
    checkpoints = saved(state)
    state, metrics = update(state, batch_of(3))
    again = update_of({A: A, "all": ...}, **{A: ADAM, "all": SGD})
    restored, metrics_again = again(checkpoints.restore(like=again.abstract(layers())).state, batch_of(3))
    assert bits((restored, metrics_again)) == bits((state, metrics))


def test_a_layer_that_moves_from_adam_to_sgd_leaves_the_adam_state_of_the_other_alone():
    old, new = update_of(**{A: ADAM, B: ADAM}), update_of(**{A: SGD, B: ADAM})
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    before = flat(state.opt_state)
    assert exactly(flat(opt_state), {name: leaf for name, leaf in before.items() if name.startswith(B)})
    assert len(flat(opt_state)) == 5
    assert str(report).splitlines() == [
        "layer_b: carried over from 'layer_b': count (1 leaf), mu (2 leaves), nu (2 leaves)",
        "layer_a: dropped: count (1 leaf), mu (2 leaves), nu (2 leaves)",
    ]


def test_the_only_adam_state_is_gone_with_its_layer(saved):
    old, new = update_of(**{A: ADAM, B: SGD}), update_of(**{A: SGD, B: SGD})
    state = trained(old)
    restored, *_, report = saved(state).restore(like=new.init(layers()), regroup=True)
    assert flat(restored.opt_state) == {}
    assert bits(restored.params) == bits(state.params)
    assert str(report) == "layer_a: dropped: count (1 leaf), mu (2 leaves), nu (2 leaves)"
    new(restored, batch_of(3))


# What is carried over.


def at(state, part, *fields):
    """The leaves of some fields of a part, by what comes behind the field."""
    found = {}
    for path, leaf in ft.flatten(state[part]).items():
        names = path.split("/")
        for field in fields:
            if field in names:
                found["/".join(names[names.index(field) :])] = leaf
    return found


def test_a_backbone_is_unfrozen(saved, capsys):
    old = update_of(**{A: ft.FROZEN, B: ADAM})
    new = update_of(**{A: ft.with_lr(optax.adam, 0.01), B: ADAM})
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert exactly(at(opt_state, B, "count", "mu", "nu"), at(state.opt_state, B, "count", "mu", "nu"))
    assert exactly(ft.flatten(opt_state[A]), ft.flatten(new.optim.init(layers())[A]))
    text = (
        "layer_b: carried over from 'layer_b': count (1 leaf), mu (2 leaves), nu (2 leaves)\n"
        "layer_a: started anew: learning_rate (1 leaf), setting (1 leaf), count (1 leaf), mu (2 leaves), nu (2 leaves)"
    )
    assert str(report) == text
    restored = saved(state).restore(like=new.init(layers()), regroup=True)
    assert str(restored.report) == text
    assert capsys.readouterr().out == ""  # `fit` prints it.


def test_a_part_is_split_in_two_and_both_go_on_as_the_whole_did():
    old, new = update_of({"all": ...}, all=ADAM), update_of(**{A: ADAM, B: ADAM})
    state = trained(old)
    moved, report = new.adopt(old, state)
    for part in (A, B):
        assert int(moved.opt_state[part][0].count) == 3
        for field in ("mu", "nu"):
            whole = getattr(old_field(state), field)
            assert exactly(getattr(moved.opt_state[part][0], field), {p: whole[p] for p in whole if p.startswith(part)})
    assert report.sources == {A: ("all",), B: ("all",)}
    assert (report.anew, report.dropped) == ({}, {})
    whole = trained(old, state=trained(old), steps=2)
    assert bits(trained(new, state=moved, steps=2).params) == bits(whole.params)


def old_field(state):
    return state.opt_state["all"][0]


def test_two_parts_are_merged_and_their_counts_start_anew():
    old, new = update_of(**{A: ADAM, B: ADAM}), update_of({"all": ...}, all=ADAM)
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert int(opt_state["all"][0].count) == 0
    for field in ("mu", "nu"):
        both = {path: leaf for part in (A, B) for path, leaf in getattr(state.opt_state[part][0], field).items()}
        assert exactly(getattr(opt_state["all"][0], field), both)
    assert str(report).splitlines() == [
        "all: carried over from 'layer_a', 'layer_b': mu (4 leaves), nu (4 leaves)",
        "all: started anew: count (1 leaf)",
        "layer_a: dropped: count (1 leaf)",
        "layer_b: dropped: count (1 leaf)",
    ]


def test_a_part_that_takes_in_a_frozen_leaf_keeps_its_moments_and_starts_its_count_anew():
    old = update_of({"w": "**/w", "b": "**/b"}, w=ADAM, b=ft.FROZEN)
    new = update_of({"all": ...}, all=ADAM)
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert report.carried == {"all": {"mu": 2, "nu": 2}}
    assert report.anew == {"all": {"count": 1, "mu": 2, "nu": 2}}
    assert np.array_equal(opt_state["all"][0].mu["layer_a/w"], state.opt_state["w"][0].mu["layer_a/w"])
    assert not opt_state["all"][0].mu["layer_a/b"].any()


def test_momentum_is_replaced_by_adam_for_one_part():
    old, new = update_of(**{A: MOMENTUM, B: MOMENTUM}), update_of(**{A: ADAM, B: MOMENTUM})
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert exactly(ft.flatten(opt_state[A]), ft.flatten(ADAM.init(old.optim.parts.split(layers())[A])))
    assert exactly(ft.flatten(opt_state[B]), ft.flatten(state.opt_state[B]))
    assert str(report).splitlines() == [
        "layer_b: carried over from 'layer_b': trace (2 leaves)",
        "layer_a: started anew: count (1 leaf), mu (2 leaves), nu (2 leaves)",
        "layer_a: dropped: trace (2 leaves)",
    ]


def test_a_part_takes_another_name(saved, capsys):
    old, new = update_of(**{A: ADAM, B: MOMENTUM}), update_of({"x": B, "y": A}, x=MOMENTUM, y=ADAM)
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert exactly(ft.flatten(opt_state["y"]), ft.flatten(state.opt_state[A]))
    assert exactly(ft.flatten(opt_state["x"]), ft.flatten(state.opt_state[B]))
    assert (report.anew, report.dropped) == ({}, {})


def test_moments_are_found_in_another_chain_and_another_dtype():
    old = update_of(**{A: ADAM, B: ADAM})
    new = update_of(**{A: optax.chain(optax.clip(1.0), optax.adamw(0.1)), B: optax.adam(0.1, mu_dtype=jnp.bfloat16)})
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert exactly(at(opt_state, A, "count", "mu", "nu"), at(state.opt_state, A, "count", "mu", "nu"))
    for path, leaf in at(opt_state, B, "mu").items():
        assert leaf.dtype == jnp.bfloat16
        assert np.array_equal(leaf, at(state.opt_state, B, "mu")[path].astype(jnp.bfloat16))
    assert report.anew == {}


def test_moments_of_another_shape_start_anew():
    params, wider = {"w": jnp.ones((2, 3)), "v": jnp.ones(2)}, {"w": jnp.ones((2, 4)), "v": jnp.ones(2)}
    old, new = update_of({"all": ...}, params=params, all=ADAM), update_of({"all": ...}, params=wider, all=ADAM)
    before = jax.tree.map(lambda leaf: leaf + 1, old.optim.init(params))
    opt_state, report = new.optim.adopt(old.optim, before, wider)
    assert report.carried == {"all": {"count": 1, "mu": 1, "nu": 1}}
    assert opt_state["all"][0].mu["v"].tolist() == [1.0, 1.0]
    assert not opt_state["all"][0].mu["w"].any()


def test_where_two_fields_could_be_meant_neither_is_taken():
    twice = optax.chain(optax.trace(0.9), optax.trace(0.5), optax.scale(-0.1))
    once = optax.chain(optax.clip(1.0), optax.clip(1.0), optax.trace(0.9))
    old, new = update_of({"all": ...}, all=twice), update_of({"all": ...}, all=once)
    state = trained(old)
    _, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert (report.carried, report.anew) == ({}, {"all": {"trace": 4}})


def test_nothing_to_carry_over():
    old, new = update_of(**{A: SGD, B: SGD}), update_of({"all": ...}, all=SGD)
    _, report = new.optim.adopt(old.optim, old.optim.init(layers()), layers())
    assert str(report) == "there was nothing to carry over"


# Rates and schedules.


def test_a_part_that_is_as_it_was_is_carried_whole_but_for_its_rate():
    def update_with(rate, other):
        return update_of(**{A: ft.with_lr(optax.adam, rate), B: other})

    old, new = update_with(0.1, MOMENTUM), update_with(0.25, ADAM)
    state = trained(old)
    before = old.optim.with_learning_rates(state.opt_state, {A: 0.003})
    opt_state, report = new.optim.adopt(old.optim, before, state.params)
    assert exactly(ft.flatten(opt_state[A].inner), ft.flatten(before[A].inner))
    assert float(opt_state[A].setting) == float(opt_state[A].learning_rate) == 0.25
    assert report.carried == {A: {"count": 1, "mu": 2, "nu": 2}}
    assert report.anew[A] == {"learning_rate": 1, "setting": 1}


@pytest.mark.parametrize("rules", [{"x": f"{A}/w", "y": ...}, {A: f"{A}/w", B: ...}])
def test_a_rate_is_the_new_optimizers_own_where_a_part_changes(rules):
    old = update_of({"all": ...}, all=ft.with_lr(optax.adam, 0.1))
    new = update_of(rules, **{part: ft.with_lr(optax.adam, 0.25) for part in rules})
    state = trained(old)
    before = old.optim.with_learning_rates(state.opt_state, {"all": 0.003})
    opt_state, report = new.optim.adopt(old.optim, before, state.params)
    assert {part: float(rate) for part, rate in new.optim.learning_rates(opt_state).items()} == dict.fromkeys(
        rules, 0.25
    )
    for part in rules:
        assert float(opt_state[part].setting) == 0.25
        assert report.anew[part] == {"learning_rate": 1, "setting": 1}
        assert int(opt_state[part].inner[0].count) == 3
    assert report.dropped == {"all": {"learning_rate": 1, "setting": 1}}


def test_a_schedule_goes_on_where_it_was_in_both_halves_of_a_part():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    txs = [ft.with_lr(optax.sgd, schedule), optax.chain(optax.scale_by_schedule(schedule), optax.scale(-1.0))]
    for tx, name in zip(txs, ("steps", "count"), strict=True):
        old, new = update_of({"all": ...}, all=tx), update_of(**{A: tx, B: tx})
        state = trained(old)
        moved, _ = new.adopt(old, state)
        for part in (A, B):
            assert [int(leaf) for leaf in at(moved.opt_state, part, name).values()] == [3]
        whole = trained(old, state=trained(old), steps=2)
        assert bits(trained(new, state=moved, steps=2).params) == bits(whole.params)


def test_a_schedule_of_two_parts_merged_starts_anew():
    tx = ft.with_lr(optax.sgd, optax.linear_schedule(1.0, 0.0, 10))
    old, new = update_of(**{A: tx, B: tx}), update_of({"all": ...}, all=tx)
    state = trained(old)
    opt_state, report = new.optim.adopt(old.optim, state.opt_state, state.params)
    assert (int(opt_state["all"].steps), float(opt_state["all"].learning_rate)) == (0, 1.0)
    assert report.anew == {"all": {"learning_rate": 1, "steps": 1}}


# Whole states.


def test_all_of_a_state_but_the_optimizers_is_as_it_was():
    def loss(params, batch, key, model_state):
        return ft.Loss(loss_fn(params, batch) + jax.random.normal(key), model_state={"seen": model_state["seen"] + 1})

    old, new = update_of({"all": ...}, loss, all=ADAM), update_of(loss=loss, **{A: ADAM, B: ADAM})
    state = old.init(layers(), key=jax.random.key(3), model_state={"seen": jnp.zeros((), jnp.int32)})
    state = trained(old, state=state)
    before = bits((state.params, state.model_state, state.key, state.step, state.batches))
    moved, _ = new.adopt(old, state)
    assert bits((moved.params, moved.model_state, moved.key, moved.step, moved.batches)) == before
    assert json.loads(moved.configuration) == json.loads(new.configuration)
    assert jax.tree.structure(moved) == jax.tree.structure(new.init(layers(), key=state.key, model_state={"seen": 0}))
    assert int(new(moved, batch_of(3))[0].step) == 4


def test_a_count_that_goes_to_two_parts_is_two_buffers(saved):
    old, new = update_of({"all": ...}, all=ADAM), update_of(**{A: ADAM, B: ADAM})
    state = trained(old)
    checkpoints = saved(state)
    for moved in (new.adopt(old, state)[0], checkpoints.restore(like=new.init(layers()), regroup=True).state):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((moved.params, moved.opt_state))]
        assert len(set(pointers)) == len(pointers)
        consumed = jax.tree.leaves((moved.params, moved.opt_state))
        trained(new, state=moved, steps=2)
        assert all(leaf.is_deleted() for leaf in consumed)


@pytest.mark.parametrize("tx", [optax.contrib.schedule_free_sgd(0.1), optax.contrib.prodigy(), optax.contrib.cocob()])
def test_an_initial_state_that_holds_the_params_or_one_array_twice_is_taken_apart(saved, tx):
    old, new = update_of(**{A: ADAM, B: ADAM}), update_of(**{A: tx, B: ADAM})
    state = trained(old)
    checkpoints = saved(state)
    begun = new.init(layers())
    restored = checkpoints.restore(like=begun, regroup=True).state
    for moved in (new.adopt(old, state)[0], restored):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((moved.params, moved.opt_state))]
        assert len(set(pointers)) == len(pointers)
        trained(new, state=moved, steps=1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((begun.params, begun.opt_state)))


def test_a_pending_window_must_be_ended_first(saved):
    def pair(**txs):
        rules = {part: part for part in txs}
        optim = ft.Optimizer(ft.partition(layers(), rules), txs)
        return ft.make_update(loss_fn, optim, accumulate=2)

    old, new = pair(**{A: ADAM, B: ADAM}), pair(**{A: ADAM, B: MOMENTUM})
    state = trained(old, steps=3)
    with pytest.raises(ft.UpdateError, match=says("adopt takes in whole windows", "update.flush(state)")):
        new.adopt(old, state)
    with pytest.raises(CheckpointError, match=says("regroup=True: a window is pending", "at the end of a window")):
        saved(state).restore(like=new.init(layers()), regroup=True)
    state, _ = old.flush(state)
    assert int(new.adopt(old, state)[0].step) == 2


# Checkpoints.

COUNT = optax.GradientTransformation(lambda params: jnp.zeros(()), lambda grads, n, params=None: (grads, n + 1))
REGROUPED = {
    "a layer from Adam to SGD": ({A: ADAM, B: ADAM}, {A: SGD, B: ADAM}, None, None),
    "SGD without a state to Adam": ({A: SGD, B: ADAM}, {A: ADAM, B: ADAM}, None, None),
    "unfrozen": ({A: ft.FROZEN, B: ADAM}, {A: ADAM, B: ADAM}, None, None),
    "frozen": ({A: ADAM, B: ADAM}, {A: ft.FROZEN, B: ADAM}, None, None),
    "split": ({"all": ADAM}, {A: ADAM, B: ADAM}, {"all": ...}, None),
    "merged": ({A: ADAM, B: ADAM}, {"all": ADAM}, None, {"all": ...}),
    "merged with one that has no state": ({A: ADAM, B: SGD}, {"all": ADAM}, None, {"all": ...}),
    "other names": ({A: ADAM, B: MOMENTUM}, {"x": MOMENTUM, "y": ADAM}, None, {"x": B, "y": A}),
    "names within names": ({A: ADAM, f"{A}/x": MOMENTUM}, {"x": ADAM, "x/y": MOMENTUM}, {A: A, f"{A}/x": B},
                           {"x": A, "x/y": B}),
    "rates": ({A: ft.with_lr(optax.adam, 0.1), B: ADAM}, {"all": ft.with_lr(optax.adam, 0.2)}, None, {"all": ...}),
    "a state that is one array": ({"all": COUNT}, {"x": COUNT}, {"all": ...}, {"x": ...}),
}  # fmt: skip


@pytest.mark.parametrize("name", REGROUPED)
def test_a_checkpoint_is_regrouped_as_a_state_is_adopted(saved, name):
    before, after, old_rules, new_rules = REGROUPED[name]
    old, new = update_of(old_rules, **before), update_of(new_rules, **after)
    state = trained(old)
    checkpoints = saved(state)
    adopted_state, report = new.adopt(old, state)
    expected, form = bits(adopted_state), jax.tree.structure(adopted_state)
    restored, *_, regrouped = checkpoints.restore(like=new.init(layers()), regroup=True)
    assert str(regrouped) == str(report)
    assert (bits(restored), jax.tree.structure(restored)) == (expected, form)
    assert bits(trained(new, state=restored, steps=2)) == bits(trained(new, state=adopted_state, steps=2))


def test_nothing_is_regrouped_where_nothing_differs(saved):
    update = update_of(**{A: ft.with_lr(optax.adam, 0.1), B: ADAM})
    state = trained(update)
    state = update.init(layers()) if state is None else state
    restored, *_, report = saved(state).restore(like=update.abstract(layers()), regroup=True)
    assert bits(restored) == bits(state)
    assert report is None


def test_the_state_that_a_checkpoint_is_regrouped_like_has_values(saved):
    old, new = update_of(**{A: ADAM, B: ADAM}), update_of(**{A: ADAM, B: MOMENTUM})
    with pytest.raises(
        CheckpointError, match=says("needs the values that new state starts with", "update.init(params")
    ):
        saved(trained(old)).restore(like=new.abstract(layers()), regroup=True)


def test_regrouping_changes_no_parameters(saved):
    old = update_of({"all": ...}, all=ADAM)
    wider = {A: {"w": jnp.zeros((4, 4)), "b": jnp.zeros(5)}}
    new = update_of({"x": ...}, params=wider, x=ADAM)
    with pytest.raises(CheckpointError) as raised:
        saved(trained(old)).restore(like=new.init(wider), regroup=True)
    assert re.search(
        says(
            "but more differs:", "params/layer_a/b: saved as float32[4], now float32[5]",
            "params/layer_b/b: saved as float32[4], now missing", "params/layer_b/w", "update.init",
        ),
        str(raised.value),
    )  # fmt: skip
    assert "opt_state" not in str(raised.value)


def test_without_regroup_the_error_names_it(saved):
    old, new = update_of(**{A: ADAM, B: ADAM}), update_of(**{A: SGD, B: ADAM})
    with pytest.raises(CheckpointError, match=says("regroup=True")):
        saved(trained(old)).restore(like=new.init(layers()))


@pytest.mark.parametrize("name", ["split", "merged", "other names", "unfrozen"])
def test_what_is_regrouped_lies_where_its_parameters_do(saved, name):
    before, after, old_rules, new_rules = REGROUPED[name]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def spread():
        return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P("data"))), layers())

    old, new = update_of(old_rules, **before), update_of(new_rules, **after)
    state = trained(old, params=spread())
    begun = new.init(spread())
    restored = saved(state).restore(like=begun, regroup=True).state
    assert bits(restored) == bits(new.adopt(old, state)[0])
    for path, leaf in ft.flatten(new.init(spread()).opt_state).items():
        assert ft.flatten(restored.opt_state)[path].sharding == leaf.sharding, path
    trained(new, state=restored, steps=1)
