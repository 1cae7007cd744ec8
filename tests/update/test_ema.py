"""Averages of the parameters: which leaves have one, when it moves, and that it is optax's."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import batches_of, leaves_of, linear_params, optimizer_of, run

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


def two_leaves(dtype=jnp.float32):
    params = linear_params(dtype)
    return {"body": params["body"] | {"b": jnp.ones(3, dtype)}, "head": params["head"]}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch @ params["body"]["w"] + params["body"]["b"])
    return jnp.mean((hidden @ params["head"]["w"] - 1) ** 2).astype(jnp.float32)


def update_of(ema, loss=loss_fn, params=None, **options):
    transforms = options.pop("transforms", {})
    return ft.make_update(
        loss, optimizer_of(two_leaves() if params is None else params, **transforms), ema=ema, **options
    )


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_that_of_optax_to_the_bit(decay):
    update = update_of(decay)
    state, parts = update.init(two_leaves()), update.optim.parts
    tx = jax.jit(optax.ema(decay).update)
    theirs = {part: optax.ema(decay).init(flat) for part, flat in parts.split(state.params).items()}
    for batch in batches_of(5):
        state, _ = update(state, batch)
        for part, flat in parts.split(state.params).items():
            debiased, theirs[part] = tx(flat, theirs[part])
            assert_equal(state.ema[part].mean, theirs[part].ema)
            assert_equal(parts.split(update.ema(state))[part], debiased)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_16_bits_is_that_of_the_same_numbers_in_32(dtype):
    update = update_of(0.999, params=two_leaves(dtype))
    state, tx = update.init(two_leaves(dtype)), optax.ema(0.999)
    theirs = tx.init(linear_params()["body"]["w"])
    for batch in batches_of(5).astype(dtype):
        state, _ = update(state, batch)
        debiased, theirs = tx.update(state.params["body"]["w"].astype(jnp.float32), theirs)
    # Five float32 sums of two products, of which one or the other is rounded.
    np.testing.assert_allclose(state.ema["body"].mean["body/w"], theirs.ema, rtol=5 * 2**-23)
    assert_equal(update.ema(state)["body"]["w"], debiased.astype(dtype))


def test_before_the_first_step_the_average_is_the_parameters():
    update = update_of(0.9)
    state = update.init(two_leaves())
    assert_equal(update.ema(state), two_leaves())


def test_a_part_or_a_selector_says_which_leaves_and_only_those_are_kept():
    update = update_of({"head": 0.9, "**/b": 0.5})
    state, _ = run(update, update.init(two_leaves()), batches_of(2))
    assert {part: list(average.mean) for part, average in state.ema.items()} == {"head": ["head/w"], "body": ["body/b"]}
    averaged = update.ema(state)
    assert averaged["body"]["w"] is state.params["body"]["w"]
    assert not np.array_equal(averaged["body"]["b"], state.params["body"]["b"])
    rest = update_of({"head": 0.9, ...: 0.5})
    assert rest.options.averages.decays == {"head": {"head/w": 0.9}, "body": {"body/b": 0.5, "body/w": 0.5}}


@pytest.mark.parametrize("ema", [0.9, {"head": 0.9}])
def test_an_average_changes_nothing_else(ema):
    update, plain = update_of(ema), update_of(None)
    state, metrics = run(update, update.init(two_leaves()), batches_of(4))
    expected, expected_metrics = run(plain, plain.init(two_leaves()), batches_of(4))
    assert_equal((state.params, state.opt_state, metrics), (expected.params, expected.opt_state, expected_metrics))
    assert expected.ema is None


def test_it_moves_at_the_end_of_a_window_and_after_what_is_done_after_a_step():
    def projected(params, model_state, step):
        return jax.tree.map(lambda leaf: leaf * 0 + step, params), model_state

    update = update_of(0.5, accumulate=2, after=projected)
    state, _ = run(update, update.init(two_leaves()), batches_of(3))
    assert int(state.ema["body"].steps) == 1
    np.testing.assert_array_equal(update.ema(state)["body"]["w"], np.ones((4, 3)))
    state, _ = update.flush(state)
    assert int(state.ema["body"].steps) == 2
    np.testing.assert_array_equal(state.ema["head"].mean["head/w"], np.full((3, 1), 0.5 * (0.5 * 1) + 0.5 * 2))


def test_a_step_that_is_skipped_leaves_it():
    update = update_of(0.9, nonfinite="skip")
    state, _ = run(update, update.init(two_leaves()), batches_of(2))
    before = jax.tree.map(np.asarray, state.ema)
    state, metrics = update(state, jnp.full((6, 4), jnp.nan))
    assert int(metrics["skipped"]) == 1
    assert_equal(state.ema, before)


def phased(**options):
    phases = [ft.Phase(part, loss_fn, part, **more) for part, more in (("body", {"repeat": 2}), ("head", options))]
    return update_of(0.9, ft.alternate(*phases))


@pytest.mark.parametrize("same_batch", [False, True])
def test_a_phase_moves_the_averages_of_its_own_parts_alone(same_batch):
    update = phased(same_batch=same_batch)
    state = update.init(two_leaves())
    before = state.ema["head"]
    state, _ = update(state, batches_of(1)[0])
    assert (int(state.ema["body"].steps), int(state.ema["head"].steps)) == (1, 0)
    assert state.ema["head"].mean["head/w"] is before.mean["head/w"]
    state, _ = run(update, state, batches_of(2))
    assert (int(state.ema["body"].steps), int(state.ema["head"].steps)) == ((3, 1) if same_batch else (2, 1))


@pytest.mark.parametrize("update", [update_of(0.9), update_of({"body": 0.9}, accumulate=2), phased()])
def test_scan_and_pure_move_it_as_call_after_call_does(update):
    batches = batches_of(2 * update.cycle)
    state, _ = run(update, update.init(two_leaves()), batches)
    scanned, _ = update.scan(update.init(two_leaves()), batches)
    assert leaves_of(scanned) == leaves_of(state)
    cycles = batches if update.cycle == 1 else batches.reshape(2, update.cycle, *batches.shape[1:])
    pure, _ = jax.jit(lambda state, batches: jax.lax.scan(update.pure, state, batches))(
        update.init(two_leaves()), cycles
    )
    assert leaves_of(pure) == leaves_of(state)


def test_it_is_donated_and_laid_out_as_its_leaves_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {"w": jax.NamedSharding(mesh, jax.P(None, "data")), "v": jax.NamedSharding(mesh, jax.P())}
    params = {name: jax.device_put(jnp.ones((2, 8)), place) for name, place in places.items()}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    update = ft.make_update(lambda params, batch: jnp.sum(params["w"] * params["v"] * batch), optim, ema=0.9)
    state = update.init(params)
    abstract = update.abstract(params)
    for _ in range(2):
        assert {name: leaf.sharding for name, leaf in state.ema["all"].mean.items()} == places
        assert state.ema["all"].steps.sharding == places["v"]
        assert jax.tree.map(lambda leaf: leaf.sharding, abstract.ema) == jax.tree.map(lambda x: x.sharding, state.ema)
        assert {name: leaf.sharding for name, leaf in update.ema(state).items()} == places
        before = state.ema
        state, _ = update(state, 1.0)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_telemetry_says_how_far_a_part_is_from_its_average():
    update = update_of({"body": 0.9})
    state, metrics = update.measured(update.init(two_leaves()), batches_of(1)[0])
    assert float(metrics["parts"]["body"]["ema_distance"]) == pytest.approx(0, abs=1e-6)  # Debiased, of one step.
    state, metrics = update.measured(state, batches_of(1)[0])
    apart = jax.tree.map(jnp.subtract, state.params["body"], update.ema(state)["body"])
    assert float(metrics["parts"]["body"]["ema_distance"]) == pytest.approx(float(optax.global_norm(apart)), rel=1e-5)
    assert "ema_distance" not in metrics["parts"]["head"]


def test_a_frozen_leaf_that_a_selector_takes_has_no_average():
    update = update_of({"**/w": 0.9}, transforms={"head": ft.FROZEN})
    assert list(update.init(two_leaves()).ema) == ["body"]


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        ({"bdoy": 0.9}, "ema: no leaf matches 'bdoy'; did you mean 'body' (2 leaves)?; the parts are 'body', 'head'"),
        ({"body": 0.9, "**/w": 0.5}, "ema: '**/w' also takes 'body/w' of 'body': give each leaf one decay"),
        ({"body": 1.0}, "ema={'body': 1.0}: give a number of at least 0 and below 1"),
        ({"body": optax.constant_schedule(0.9)}, "as the average is debiased"),
        ("body", "ema={'body': 'body'}: give a number"),
        ({}, 'give a decay by part or selector, {"body": 0.999}'),
        ({3: 0.9}, "ema: 3 is no selector"),
        ({"body": 0.9, "head": 0.9, ...: 0.5}, "ema: ... takes no leaf that is trained and has no average yet"),
    ],
)
def test_an_average_of_nothing_or_of_a_leaf_twice_is_an_error_when_the_update_is_made(ema, message):
    with pytest.raises(ft.UpdateError, match=re.escape(message)):
        update_of(ema)


def test_an_average_of_a_frozen_part_is_an_error():
    with pytest.raises(ft.UpdateError, match=r"'head' takes no leaf that is trained .* the trained parts are 'body'"):
        update_of({"head": 0.9}, transforms={"head": ft.FROZEN})


def test_an_update_without_averages_says_how_to_keep_them():
    update = update_of(None)
    with pytest.raises(ft.UpdateError, match=re.escape('keeps no average: make_update(..., ema={"body": 0.999})')):
        update.ema(update.init(two_leaves()))


def test_the_average_of_a_consumed_state_is_an_error_that_says_so():
    update = update_of({"body": 0.9})
    state = update.init(two_leaves())
    update(state, batches_of(1)[0])
    with pytest.raises(ft.UpdateError, match="this state was consumed"):
        update.ema(state)


@pytest.mark.parametrize("one_keeps", [True, False])
def test_a_state_of_other_averages_is_an_error_that_names_adopt(one_keeps):
    one, other = update_of(0.9 if one_keeps else None), update_of({"body": 0.9} if one_keeps else 0.9)
    with pytest.raises(
        ft.UpdateError, match=r"the state has averages of the parts .* update.adopt\(other_update, state\)"
    ):
        one(other.init(two_leaves()), batches_of(1)[0])


def test_adopt_takes_over_averages_of_the_same_leaves_and_decays_and_begins_the_others():
    before, after = update_of({"body": 0.9, "head": 0.9}), update_of({"body": 0.9, "head": 0.5})
    state, _ = run(before, before.init(two_leaves()), batches_of(3))
    kept = copy.deepcopy(state)
    adopted, report = after.adopt(before, state)
    assert_equal(adopted.ema["body"], kept.ema["body"])
    assert int(adopted.ema["head"].steps) == 0
    assert str(report).splitlines()[:3] == [
        "body: carried over from 'body': count (1 leaf), mu (2 leaves), nu (2 leaves), ema (2 leaves)",
        "head: carried over from 'head': trace (1 leaf)",
        "head: started anew: learning_rate (1 leaf), setting (1 leaf), ema (1 leaf)",
    ]
    run(after, adopted, batches_of(2))
    plain, report = update_of(None).adopt(before, kept)
    assert plain.ema is None
    assert "body: dropped: ema (2 leaves)" in str(report)
