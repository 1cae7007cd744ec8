"""Runs of `fit` in which a part joins on the way: what is resumed, compiled, logged and told."""

import signal
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import warm
from runs import bits_of, compilations, counted, data_of, loss_fn, start

import functrain as ft

JOINS = 3
HERE = Path(__file__).parent


def made(joins=JOINS, **options):
    rate = optax.cosine_decay_schedule(0.1, 10)
    transforms = {"body": ft.with_lr(optax.adamw, rate, clock="run"), "head": ft.with_lr(optax.sgd, rate)}
    parts = ft.partition(start(), {"body": "body", "head": "head"})
    return ft.make_update(loss_fn, ft.Optimizer(parts, transforms, frozen_until={"body": joins}), **options)


def fitted(update, steps, **options):
    options = {"log": ft.Every(updates=2), "progress": False} | options
    return ft.fit(update, update.init(start()), data_of(), epochs=2, steps=steps, **options)


@pytest.mark.parametrize("stops", [JOINS - 1, JOINS, JOINS + 1])
def test_a_run_that_is_stopped_around_the_step_goes_on_to_the_bits_of_one_that_was_not(stops, tmp_path):
    whole = fitted(made(), 6)
    fitted(made(), stops, checkpoints=ft.Checkpoints(tmp_path))
    resumed = fitted(made(), 6, checkpoints=ft.Checkpoints(tmp_path))
    assert int(resumed.state.step) == 6
    assert bits_of(resumed.state) == bits_of(whole.state)


KILLED = """
import os, signal, sys

sys.path[:0] = {paths!r}

import functrain as ft
from test_joining import JOINS, fitted, made

class Killed(ft.Hook):
    def update_ended(self, run):
        if run.step == JOINS + 1:
            os.kill(os.getpid(), signal.SIGKILL)

fitted(made(), 6, checkpoints=ft.Checkpoints(sys.argv[1], every=ft.Every(updates=JOINS - 1)), hooks=[Killed()])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_after_the_step_goes_on_from_before_it(tmp_path):
    process = warm.Process(KILLED.format(paths=[str(HERE), str(HERE.parent)]), tmp_path)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == -signal.SIGKILL, errors
    resumed = fitted(made(), 6, checkpoints=ft.Checkpoints(tmp_path))
    assert bits_of(resumed.state) == bits_of(fitted(made(), 6).state)


def test_a_window_that_was_pending_when_a_part_had_not_joined_is_gone_on_with(tmp_path):
    update = made(joins=1, accumulate=2)
    batches = [*data_of().epoch(0)]
    whole = update.init(start())
    for batch in batches[:4]:
        whole, _ = update(whole, batch)
    state = update.init(start())
    state, _ = update(state, batches[0])
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        again = made(joins=1, accumulate=2)
        state = checkpoints.restore(like=again.abstract(start())).state
    for batch in batches[1:4]:
        state, _ = again(state, batch)
    assert bits_of(state) == bits_of(whole)


def test_an_unrolled_run_takes_single_updates_up_to_the_step():
    """The scans before and after it take two steps; none of them has the step in it."""
    with compilations() as names:
        unrolled = fitted(made(), 7, unroll=2)
    assert {name for name in names if "functrain" in name} == {"jit(functrain_scan)", "jit(functrain_whole)"}
    one_by_one = fitted(made(), 7)
    for one, other in zip(*(jax.tree.leaves(each.state.params) for each in (unrolled, one_by_one)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert [row.keys() for row in unrolled.history[-1:]] == [row.keys() for row in one_by_one.history[-1:]]


@pytest.mark.parametrize(("steps", "programs"), [(JOINS, 1), (JOINS + 1, 2)])
def test_a_run_compiles_the_programs_of_the_stages_that_it_comes_to_before_its_first_step(steps, programs):
    class First(ft.Hook):
        def update_ended(self, run):
            self.count = getattr(self, "count", None) or len(ours())

    def ours():
        return [name for name in names if "functrain" in name]

    first = First()
    with compilations() as names:
        fitted(made(), steps, log=ft.Every(updates=100), hooks=[first])
    assert (first.count, len(ours())) == (programs, programs)


def test_a_row_has_the_rate_of_a_part_from_its_first_update_on():
    rows = fitted(made(), 6, log=ft.Every(updates=1)).history
    with_rate = [row["step"] for row in rows if "train/learning_rate/body" in row]
    with_norm = [row["step"] for row in rows if "train/parts/body/grad_norm" in row]
    assert with_rate == with_norm == [4, 5, 6]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"body": 3}, {"body": 5}, "part 'body' was frozen until step 3, is now frozen until step 5"),
        ({"body": 3}, {}, "part 'body' was frozen until step 3, is now trained from the first step"),
        ({}, {"body": 5}, "part 'body' was trained from the first step, is now frozen until step 5"),
    ],
)
def test_a_run_that_goes_on_with_another_step_is_told(before, now, told, tmp_path):
    parts = ft.partition(start(), {"body": "body", "head": "head"})
    transforms = dict.fromkeys(parts.names, optax.sgd(0.1))
    first, second = (
        ft.make_update(loss_fn, ft.Optimizer(parts, transforms, frozen_until=each)) for each in (before, now)
    )
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(first.init(start()))
        with pytest.warns(match=told):
            restored = checkpoints.restore(like=second.init(start()))
    assert restored.changed == (told,)


def test_the_rates_of_a_part_that_has_not_joined_are_not_swept():
    update, state, data = counted(made())
    with pytest.raises(ft.FitError) as raised:
        ft.lr_sweep(update, state, data, {"body": (1e-4, 1e-2)})
    assert str(raised.value) == (
        "part 'body' is frozen until step 3, and the state is at step 0, where its rate does nothing: sweep it with a"
        " state of that step, dataclasses.replace(state, step=np.array(3))"
    )
