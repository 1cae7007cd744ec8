"""Averages of the parameters in a run: evaluated, returned, saved, and taken back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import bits, bits_of, counted, loss_fn, optim_of, start

import functrain as ft
from functrain.loop.checkpoint.storage import Storage


def averaging(ema=None, **options):
    return ft.make_update(loss_fn, optim_of(), ema=ema, **options)


def eval_step(params, batch):
    return {"sum": jnp.full(len(batch["x"]), sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))}


def fitted(update, **options):
    update, state, data = counted(update)
    options = {"epochs": 2} | options
    evaluation = options.pop("evaluation", None)
    made = [ft.Evaluation(eval_step, [{"x": np.ones(2)}], **of) for of in evaluation or ()]
    return ft.fit(update, state, data, evaluation=made, progress=False, **options)


def total(params):
    return pytest.approx(sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(params)), rel=1e-6)


def test_a_run_returns_the_averages_and_evaluates_them_beside_the_last_parameters():
    update = averaging(ema={"body": 0.9})
    result = fitted(update, evaluation=[{}, {"params": "ema", "name": "ema"}])
    assert bits(result.ema) == bits(update.ema(result.state))
    assert result.results == {"valid/sum": total(result.state.params), "ema/sum": total(result.ema)}
    assert result.results["valid/sum"] != result.results["ema/sum"]
    assert fitted(averaging()).ema is None


def test_the_best_state_comes_with_its_own_averages(tmp_path):
    update = averaging(ema=0.5)
    checkpoints = ft.Checkpoints(tmp_path, keep_best={"ema/sum": "min"})
    evaluation = [{"params": "ema", "name": "ema"}]
    result = fitted(update, evaluation=evaluation, checkpoints=checkpoints, load_best_on_end=True)
    assert bits(result.ema) == bits(update.ema(result.state))


def test_an_evaluation_of_averages_that_nobody_keeps_is_an_error_before_the_run():
    with pytest.raises(ft.FitError, match=re.escape('params="ema") needs averages: make_update(..., ema={"body"')):
        fitted(averaging(), evaluation=[{"params": "ema"}])
    with pytest.raises(ft.EvaluationError, match=re.escape("params='emas'): write 'last' or 'ema'")):
        ft.Evaluation(eval_step, [], params="emas")


def test_a_run_that_is_cut_short_ends_with_the_same_averages(tmp_path):
    update = averaging(ema={"body": 0.9, "head/w": 0.99}, accumulate=2)
    whole = fitted(update)
    fitted(update, epochs=None, steps=2, checkpoints=ft.Checkpoints(tmp_path))
    assert sorted(saved_names(tmp_path)) == [
        "ema/body/mean/body/w", "ema/body/steps", "ema/head/mean/head/w", "ema/head/steps",
    ]  # fmt: skip
    resumed = fitted(update, checkpoints=ft.Checkpoints(tmp_path))
    assert bits_of(resumed.state) == bits_of(whole.state)
    assert (bits(resumed.state.ema), bits(resumed.ema)) == (bits(whole.state.ema), bits(whole.ema))


def saved_names(directory):
    newest = ft.Checkpoints(directory).steps()[-1]
    return [name for name in Storage().contents(newest).leaves if name.startswith("ema/")]


def misfit(tmp_path, saved_by, asked_by):
    """What is said of a checkpoint of one update that another one asks for."""
    with ft.Checkpoints(tmp_path) as checkpoints:
        state, _ = saved_by(saved_by.init(start()), BATCH)
        checkpoints.save(state)
        with pytest.raises(ft.CheckpointError) as raised:
            checkpoints.restore(like=asked_by.abstract(start()))
    *lines, advice = str(raised.value).split(":\n", 1)[1].splitlines()
    assert advice.endswith("as only parts, optimizers or ema= are others, regroup=True")
    return [line.strip() for line in lines]


BATCH = {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float32)}


def test_a_checkpoint_without_averages_is_told_of_and_regroup_begins_them(tmp_path):
    before, after = averaging(), averaging(ema={"body": 0.9})
    lines = misfit(tmp_path, before, after)
    assert lines == ["ema/body/steps: not saved, now int32[]", "ema/body/mean/body/w: not saved, now float32[3,4]"]
    restored = ft.Checkpoints(tmp_path).restore(like=after.init(start()), regroup=True)
    assert bits(after.ema(restored.state)) == bits(restored.state.params)
    assert restored.report.anew["body"]["ema"] == 1
    after(restored.state, BATCH)


def test_another_decay_is_told_of_and_regroup_begins_that_average_alone(tmp_path):
    before, after = averaging(ema={"body": 0.9, "head": 0.9}), averaging(ema={"body": 0.9, "head": 0.99})
    assert misfit(tmp_path, before, after) == [
        f"the average of head/{name}: saved with the decay 0.9, now 0.99" for name in ("b", "w")
    ]
    restored = ft.Checkpoints(tmp_path).restore(like=after.init(start()), regroup=True)
    assert {part: int(average.steps) for part, average in restored.state.ema.items()} == {"body": 1, "head": 0}
    state, _ = before(before.init(start()), BATCH)
    assert bits(restored.state.ema["body"]) == bits(state.ema["body"])


def test_averages_of_a_part_of_another_name_are_carried_over_and_those_not_asked_for_dropped(tmp_path):
    before = averaging(ema=0.9)
    optim = ft.Optimizer(
        ft.partition(start(), {"trunk": "body", "head": ...}),
        {"trunk": before.optim.transforms["body"], "head": before.optim.transforms["head"]},
    )
    after = ft.make_update(loss_fn, optim, ema={"trunk": 0.9})
    state, _ = before(before.init(start()), BATCH)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(like=after.init(start()), regroup=True)
    assert bits(restored.state.ema["trunk"]) == bits(state.ema["body"])
    assert restored.report.dropped["head"]["ema"] == 2
    after(restored.state, BATCH)
