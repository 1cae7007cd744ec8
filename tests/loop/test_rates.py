"""With which learning rates a run goes on."""

import dataclasses
import functools
import json
import re
import warnings

import numpy as np
import optax
import pytest
from runs import bits_of, counted, update_of
from trees import says

import functrain as ft
from functrain.loop.checkpoint import manifest


class Set(ft.Hook):
    """Sets a rate after an update, or before the first."""

    def __init__(self, rate, after=None):
        self.rate, self.after = rate, after

    def _set(self, run):
        rates = run.update.optim.with_learning_rates(run.state.opt_state, {"head": self.rate})
        run.state = dataclasses.replace(run.state, opt_state=rates)

    def run_started(self, run):
        if self.after is None:
            self._set(run)

    def update_ended(self, run):
        if run.step == self.after:
            self._set(run)


def gone_on(directory, lr, epochs, *, hooks=(), rates="program"):
    """A run to the end of an epoch, and the warnings."""
    update = update_of(head=with_lr(lr))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ft.fit(
            *counted(update), epochs=epochs, checkpoints=ft.Checkpoints(directory), hooks=hooks, rates=rates
        )
    return result.state, [str(warning.message) for warning in caught]


@functools.cache  # So that runs share their updates.
def with_lr(lr):
    return ft.with_lr(optax.sgd, lr)


def rate_of(state):
    return float(state.opt_state["head"].setting)


PROGRAM = "part 'head' goes on with the learning rate 0.05 of the program, not with the 0.1 of the checkpoint"
CHECKPOINT = "part 'head' goes on with the learning rate 0.1 of the checkpoint, not the 0.05 of the program"


def test_a_rate_that_is_changed_between_two_runs_is_the_programs_with_a_warning_of_both(tmp_path):
    _, told = gone_on(tmp_path, 0.1, 1)
    assert not told
    state, (told,) = gone_on(tmp_path, 0.05, 2)
    assert rate_of(state) == np.float32(0.05)
    assert told.startswith(PROGRAM)
    assert 'fit(..., rates="checkpoint") goes on with that' in told
    state, told = gone_on(tmp_path, 0.05, 3)
    assert (rate_of(state), told) == (np.float32(0.05), [])


def test_it_is_the_checkpoints_where_that_is_asked_for_and_the_programs_again_where_it_is_not(tmp_path):
    gone_on(tmp_path, 0.1, 1)
    for epochs in (2, 3):
        state, (told,) = gone_on(tmp_path, 0.05, epochs, rates="checkpoint")
        assert rate_of(state) == np.float32(0.1)
        assert told == f'{CHECKPOINT}, as rates="checkpoint" says; leave it out to go on with the program\'s'
    state, (told,) = gone_on(tmp_path, 0.05, 4)
    assert rate_of(state) == np.float32(0.05)
    assert told.startswith(PROGRAM)


@pytest.mark.parametrize("rates", ["program", "checkpoint"])
def test_what_a_hook_has_set_goes_on_to_the_bit_as_the_program_says_what_it_said(tmp_path, rates):
    whole, _ = gone_on(tmp_path / "whole", 0.1, 3, hooks=[Set(0.02, after=2)])
    gone_on(tmp_path / "cut", 0.1, 1, hooks=[Set(0.02, after=2)])
    gone_on(tmp_path / "cut", 0.1, 2, rates=rates)
    state, told = gone_on(tmp_path / "cut", 0.1, 3, rates=rates)
    assert (rate_of(state), told) == (np.float32(0.02), [])
    assert bits_of(state) == bits_of(whole)


def test_a_new_rate_of_the_program_counts_after_a_hook_has_set_one(tmp_path):
    gone_on(tmp_path, 0.1, 1, hooks=[Set(0.02, after=2)])
    state, (told,) = gone_on(tmp_path, 0.05, 2)
    assert rate_of(state) == np.float32(0.05)
    assert re.search(says("rate 0.05 of the program", "the 0.02 of the checkpoint"), told)


def test_a_checkpoint_that_does_not_say_what_its_program_said_goes_on_with_its_own_until_a_hook_changes_it(tmp_path):
    gone_on(tmp_path, 0.1, 1)
    _without_rates(tmp_path / "4")
    for epochs in (2, 3):
        state, (told,) = gone_on(tmp_path, 0.05, epochs)
        assert rate_of(state) == np.float32(0.1)
        assert told.startswith(f"{CHECKPOINT}, as it does not say")
        assert "in run_started" in told
        assert "{'head': 0.05}" in told
    gone_on(tmp_path, 0.05, 4, hooks=[Set(0.05)])
    state, told = gone_on(tmp_path, 0.05, 5)
    assert (rate_of(state), told) == (np.float32(0.05), [])


def _without_rates(checkpoint):
    """Writes it as it was written before rates were kept."""
    path = checkpoint / "facts" / "metadata"
    contents = json.loads(path.read_bytes())
    del contents["beside"]["extra"]["json"]["rates"]
    path.write_text(json.dumps(contents))
    manifest.write(checkpoint, {name: each for name, each in manifest.load(checkpoint).items() if name != "files"})


def test_another_schedule_is_the_programs_with_a_warning_of_both(tmp_path):
    def state_of(steps, epochs):
        body = ft.with_lr(optax.sgd, optax.cosine_decay_schedule(0.1, steps))
        update, state, data = counted(update_of(body=body))
        return ft.fit(update, state, data, epochs=epochs, checkpoints=ft.Checkpoints(tmp_path)).state

    state_of(40, 1)
    with pytest.warns(UserWarning, match=says("learning_rate of sgd was cosine", "decay_steps=40", "decay_steps=80")):
        state = state_of(80, 2)
    used = optax.cosine_decay_schedule(0.1, 80)(np.int32(7))
    np.testing.assert_allclose(state.opt_state["body"].learning_rate, used, rtol=1e-6)


def test_the_replay_of_a_run_that_diverged_has_the_rate_that_the_run_had(tmp_path):
    gone_on(tmp_path, 0.1, 1)
    with pytest.raises(
        ft.NonFiniteError, match=says("the autopsy", "update 6, with batch 1 of epoch 1", "is the first")
    ):
        gone_on(tmp_path, 1e30, 2)


def momentum_of(momentum, epochs, directory, **options):
    update = update_of(head=with_momentum(momentum))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ft.fit(*counted(update), epochs=epochs, checkpoints=ft.Checkpoints(directory), **options)
    value = float(result.state.opt_state["head"].settings["momentum"])
    return result, value, [str(warning.message) for warning in caught]


@functools.cache
def with_momentum(momentum):
    return ft.with_state(optax.sgd, learning_rate=0.1, momentum=momentum)


def test_any_hyperparameter_that_is_changed_between_two_runs_is_told_and_taken_like_a_rate(tmp_path):
    momentum_of(0.5, 1, tmp_path)
    _, value, (told,) = momentum_of(0.75, 2, tmp_path, rates="checkpoint")
    assert value == 0.5
    assert told.startswith("part 'head' goes on with the momentum 0.5 of the checkpoint, not the 0.75 of the program")
    _, value, (told,) = momentum_of(0.75, 3, tmp_path)
    assert value == 0.75
    assert told.startswith("part 'head' goes on with the momentum 0.75 of the program, not with the 0.5")
    result, _, told = momentum_of(0.75, 4, tmp_path)
    assert not told
    assert result.history[-1]["train/momentum/head"] == 0.75
    assert result.history[-1]["train/learning_rate/head"] == np.float32(0.1)
