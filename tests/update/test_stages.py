"""Parts that join a run on the way: until then nothing computes, changes or consumes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import batches_of, leaves_of, linear_params, loss_fn, run

import functrain as ft
from functrain.update.anatomy import taken_apart

JOINS = 2
RATE = optax.linear_schedule(0.1, 0.0, 10)
PARTS = ft.partition(linear_params(), {"body": "body", "head": "head"})


def optimizer(clock="part", **options):
    transforms = {"body": ft.with_lr(optax.adam, RATE, clock=clock), "head": ft.with_lr(optax.sgd, RATE, momentum=0.9)}
    return ft.Optimizer(PARTS, transforms | options.pop("transforms", {}), **options)


def staged(loss=loss_fn, joins=JOINS, clock="part", **options):
    optim = optimizer(clock, frozen_until={"body": joins})
    return ft.make_update(loss, optim, **options)


def frozen(**options):
    return ft.make_update(loss_fn, optimizer(transforms={"body": ft.FROZEN}), **options)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def products(update, state):
    """The matrix products of the program that comes next."""
    return update.lower(state, batches_of(1)[0]).as_text().count("dot_general")


# What it is.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_training_with_a_frozen_part_and_then_adopting_the_state(accumulate):
    update, without = staged(accumulate=accumulate), frozen(accumulate=accumulate)
    batches = batches_of(5 * accumulate)
    split = JOINS * accumulate
    state, _ = run(update, update.init(linear_params()), batches)
    unfrozen = ft.make_update(loss_fn, optimizer(), accumulate=accumulate)
    by_hand, _ = run(without, without.init(linear_params()), batches[:split])
    by_hand, _ = unfrozen.adopt(without, by_hand)
    by_hand, _ = run(unfrozen, by_hand, batches[split:])
    assert leaves_of(state) == leaves_of(by_hand)


def test_until_it_joins_its_gradient_is_in_no_program():
    update, without, whole = staged(), frozen(), ft.make_update(loss_fn, optimizer())
    state = update.init(linear_params())
    joined = dataclasses.replace(state, step=np.array(JOINS))
    assert products(update, state) == products(without, without.init(linear_params())) < products(update, joined)
    assert products(update, joined) == products(whole, whole.init(linear_params()))


def test_until_it_joins_its_parameters_and_state_are_neither_changed_nor_consumed():
    update = staged(ema=0.5)
    before = update.init(linear_params())
    params = before.params
    mine = jax.tree.leaves([params["body"], before.opt_state["body"], before.ema["body"]])
    state, _ = run(update, before, batches_of(JOINS))
    now = jax.tree.leaves([state.params["body"], state.opt_state["body"], state.ema["body"]])
    assert all(one is other and not one.is_deleted() for one, other in zip(mine, now, strict=True))
    assert params["head"]["w"].is_deleted()
    state, _ = run(update, state, batches_of(1))
    assert params["body"]["w"].is_deleted()
    assert (int(state.ema["body"].steps), int(state.ema["head"].steps)) == (1, JOINS + 1)


def test_metrics_are_of_the_parts_that_have_joined():
    update, found = staged(nonfinite="skip"), []
    state = update.init(linear_params())
    for batch in batches_of(JOINS + 1):
        state, metrics = update.measured(state, batch)
        found.append((sorted(metrics["parts"]), sorted(metrics["nonfinite"])))
    assert found == [(["head"], ["head"])] * JOINS + [(["body", "head"], ["body", "head"])]


@pytest.mark.parametrize(("clock", "rates"), [("part", [0.1, 0.09]), ("run", [0.08, 0.07])])
def test_its_schedule_begins_when_it_joins_or_is_where_the_run_is(clock, rates):
    update = staged(clock=clock)
    state, found = update.init(linear_params()), []
    for batch in batches_of(JOINS + 2):
        state, _ = update(state, batch)
        found.append(float(update.optim.learning_rates(state.opt_state)["body"]))
    assert found == pytest.approx([0.1] * JOINS + rates, rel=1e-6)


def test_parts_may_join_one_after_the_other():
    three = linear_params() | {"stem": {"w": jnp.ones((4, 4))}}
    parts = ft.partition(three, {name: name for name in three})
    optim = ft.Optimizer(parts, dict.fromkeys(three, optax.sgd(0.1)), frozen_until={"stem": 3, "body": 1})
    update = ft.make_update(lambda params, batch: loss_fn(params, batch @ params["stem"]["w"]), optim)
    state, changed = update.init(three), []
    for batch in batches_of(4):
        before = {part: bits(state.params[part]) for part in three}
        state, _ = update(state, batch)
        changed.append("".join(part[0] for part in three if bits(state.params[part]) != before[part]))
    assert changed == ["h", "bh", "bh", "bhs"]


# Windows, scans, and what is pure.


def test_a_window_belongs_to_the_stage_in_which_it_begins():
    update = staged(joins=1, accumulate=2)
    state, _ = run(update, update.init(linear_params()), batches_of(1))
    assert [*state.window.grads] == ["head"]
    state, _ = run(update, state, batches_of(2))
    assert (int(state.step), [*state.window.grads]) == (1, ["body", "head"])


def test_a_scan_is_of_one_stage():
    update, batches = staged(), batches_of(5)
    one_by_one, _ = run(update, update.init(linear_params()), batches)
    state, metrics = update.scan(update.init(linear_params()), batches[:JOINS], measured=True)
    assert [*metrics["parts"]] == ["head"]
    state, metrics = update.scan(state, batches[JOINS:], measured=True)
    assert [*metrics["parts"]] == ["body", "head"]
    assert leaves_of(state) == leaves_of(one_by_one)
    with pytest.raises(ft.UpdateError) as raised:
        update.scan(update.init(linear_params()), batches)
    assert str(raised.value) == (
        "scan would take 5 steps after step 0, and 'body' joins at step 2: call update(state, batch) up to there, and"
        " scan from there on"
    )


def test_pure_takes_a_step_that_is_known_and_refuses_one_that_is_traced():
    update, batch = staged(), batches_of(1)[0]
    state = update.init(linear_params())
    for step in (0, JOINS):
        after, _ = update.pure(dataclasses.replace(state, step=np.array(step)), batch)
        assert (bits(after.params["body"]) != bits(state.params["body"])) == (step == JOINS)
    with pytest.raises(ft.UpdateError) as raised:
        jax.eval_shape(update.pure, state, batch)
    assert str(raised.value) == (
        "pure can't tell which parts have joined (frozen_until={'body': 2}) at a step that is traced: use update(...)"
        " or update.scan(...), which read it on the host"
    )


def test_a_window_that_began_in_another_stage_is_told():
    update, earlier = staged(accumulate=2), staged(joins=1, accumulate=2)
    state, _ = run(update, update.init(linear_params()), batches_of(3))
    with pytest.raises(ft.UpdateError) as raised:
        earlier(state, batches_of(1)[0])
    assert str(raised.value) == (
        "the window that is pending has gradients of 'head', and this batch those of 'body', 'head': go on with the"
        " frozen_until= with which it was begun, or end it first, with update.flush(state)"
    )
    assert int(earlier.flush(state)[0].step) == 2


def test_the_programs_of_all_stages_to_come_are_compiled_before():
    update, batch = staged(), batches_of(1)[0]
    state = update.init(linear_params())
    update.compile(state, batch, scan=batches_of(2), measured=False, until=JOINS)
    assert [(call.kind, call.stage) for call, _ in update._programs.kept] == [("scan", 0), ("whole", 0)]
    update.compile(state, batch, scan=batches_of(2), measured=False)
    assert [(call.kind, call.stage) for call, _ in update._programs.kept][2:] == [("scan", 1), ("whole", 1)]


def test_an_update_that_is_taken_apart_has_the_gradients_of_its_stage():
    update, batch = staged(), batches_of(1)[0]
    state = update.init(linear_params())
    for step, parts in ((0, {"head"}), (JOINS, {"body", "head"})):
        outputs = taken_apart(update, dataclasses.replace(state, step=np.array(step)), batch).outputs
        assert {output.part for output in outputs if output.kind == "gradient"} == parts


# Phases and routes.


def phases(**options):
    both = ft.Phase("both", loss_fn, ("body", "head"), repeat=2)
    return ft.alternate(both, ft.Phase("head", loss_fn, "head", same_batch=options.pop("same_batch", False)), **options)


def test_a_phase_trains_those_of_its_parts_that_have_joined():
    update = staged(phases())
    state, _ = run(update, update.init(linear_params()), batches_of(2))
    assert bits(state.params["body"]) == bits(linear_params()["body"])
    assert int(optax.tree.get(state.opt_state["body"], "count")) == 0
    state, _ = run(update, state, batches_of(3))
    assert int(optax.tree.get(state.opt_state["body"], "count")) == 2


def test_a_turn_of_several_steps_belongs_to_the_stage_in_which_it_begins():
    update = staged(phases(same_batch=True))
    state, _ = run(update, update.init(linear_params()), batches_of(2))
    assert (int(state.step), bits(state.params["body"])) == (3, bits(linear_params()["body"]))


@pytest.mark.parametrize("held", [True, False])
def test_a_loss_that_only_a_later_part_takes_is_no_loss_without_a_part(held):
    def losses(params, batch):
        hidden = batch @ params["body"]["w"]
        return ft.Loss({"main": jnp.mean(hidden @ params["head"]["w"]), "aux": jnp.mean(hidden**2)})

    update = staged(losses, route={"body": "aux", "head": "main"})
    state = update.init(linear_params())
    state = state if held else dataclasses.replace(state, step=np.array(JOINS))
    state, metrics = update(state, batches_of(1)[0])
    assert sorted(metrics) == ["aux", "loss", "main"]
    assert (bits(state.params["body"]) == bits(linear_params()["body"])) == held


def critic_first():
    d, g = ft.Phase("D", loss_fn, "head"), ft.Phase("G", loss_fn, "body")
    return ft.alternate(d, g), ft.alternate(d, g, phase=lambda step: "D" if step % 2 == 0 else "G")


def test_a_phase_without_a_part_is_told_when_it_is_made_or_asked_for():
    in_turns, asked = critic_first()
    with pytest.raises(ft.PhaseError) as raised:
        staged(in_turns)
    assert str(raised.value) == (
        "phase 'G' would have no part to train in its first turns: frozen_until has 'body'; leave one out, or say whose"
        " turn it is, ft.alternate(..., phase=lambda step: ...)"
    )
    update = staged(asked)
    state, _ = update(update.init(linear_params()), batches_of(1)[0])
    with pytest.raises(ft.PhaseError) as raised:
        update(state, batches_of(1)[0])
    assert str(raised.value) == (
        "phase= gives phase 'G' a turn before step 2, where the first of its parts joins, 'body': have it return"
        " another phase until then, or lower frozen_until="
    )


def test_the_programs_of_a_turn_without_parts_are_not_compiled():
    update = staged(critic_first()[1])
    update.compile(update.init(linear_params()), batches_of(1)[0], measured=False)
    kept = {(call.turns[0], call.stage) for call, _ in update._programs.kept}
    assert kept == {((0,), 0), ((0,), 1), ((1,), 1)}


# The audit.


def test_a_part_that_joins_later_and_that_no_loss_reaches_is_told_at_the_first_step():
    update = staged(lambda params, batch: jnp.sum(params["head"]["w"]))
    with pytest.raises(ft.AuditError, match="no loss reaches the trained part 'body'"):
        update(update.init(linear_params()), batches_of(1)[0])
    unchecked = staged(lambda params, batch: jnp.sum(params["head"]["w"]), audit=False)
    unchecked(unchecked.init(linear_params()), batches_of(1)[0])


def test_the_audit_says_when_a_part_joins():
    found = ft.audit(loss_fn, PARTS, linear_params(), batches_of(1)[0], optim=optimizer(frozen_until={"body": 2}))
    assert found.joins == {"body": 2}
    assert str(found).splitlines()[1].endswith("%, joins at step 2")
