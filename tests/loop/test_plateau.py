"""`ReduceOnPlateau`: rates that fall when an evaluation no longer improves."""

import re

import numpy as np
import optax
import pytest
from runs import bits_of, counted, scripted, update_of

import functrain as ft

CONSTANT = ft.with_lr(optax.sgd, 0.08)


def update_with_two_rates():
    return update_of(body=CONSTANT)  # The head has 0.1.


class Rates(ft.Hook):
    """The rates after each evaluation, by part."""

    def __init__(self):
        self.seen = {}

    def evaluation_ended(self, run):
        for part, rate in run.update.optim.learning_rates(run.state.opt_state).items():
            self.seen.setdefault(part, []).append(round(float(rate), 6))


def rates_of(values, hook, update=None, **options):
    rates = Rates()
    result = ft.fit(
        *counted(update or update_with_two_rates(), 1), epochs=len(values), evaluation=scripted(*values),
        hooks=[hook, rates], **options,
    )  # fmt: skip
    return rates.seen, result


def test_the_evaluation_after_patience_ones_without_an_improvement_lowers_the_rate():
    hook = ft.ReduceOnPlateau("valid/loss", "body", factor=0.5, patience=1)
    # As PyTorch's, of which these are the rates: 2.0 is no improvement of 2.0, NaN none of anything.
    seen, _ = rates_of([3.0, 2.0, 2.0, 2.5, 1.0, np.nan, 1.5, 1.5, 1.5], hook)
    assert seen["body"] == [0.08, 0.08, 0.08, 0.04, 0.04, 0.04, 0.02, 0.02, 0.01]
    assert seen["head"] == [0.1] * 9


def test_evaluations_of_the_cooldown_do_not_count_and_no_rate_falls_below_the_lowest():
    hook = ft.ReduceOnPlateau("valid/loss", factor=0.25, patience=0, cooldown=2, lowest=0.01)
    seen, _ = rates_of([1.0] * 8, hook)
    assert seen["body"] == [0.08, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01]
    assert seen["head"] == [0.1, 0.025, 0.025, 0.025, 0.01, 0.01, 0.01, 0.01]


def test_larger_may_be_better_and_an_improvement_may_have_a_size():
    hook = ft.ReduceOnPlateau("valid/loss", "body", factor=0.5, patience=0, mode="max", least=0.5)
    assert rates_of([1.0, 1.5, 2.0], hook)[0]["body"] == [0.08, 0.04, 0.04]


def test_a_run_that_is_cut_off_goes_on_to_the_bit_as_one_that_is_not(tmp_path):
    values = [1.0] * 6

    def hook():
        return ft.ReduceOnPlateau("valid/loss", factor=0.5, patience=1, cooldown=1)

    _, whole = rates_of(values, hook())
    seen = []
    for epochs in range(1, 7):
        rates = Rates()
        result = ft.fit(
            *counted(update_with_two_rates(), 1), epochs=epochs, evaluation=scripted(1.0),
            checkpoints=ft.Checkpoints(tmp_path), hooks=[hook(), rates],
        )  # fmt: skip
        seen += rates.seen["body"]
    assert seen == [0.08, 0.08, 0.04, 0.04, 0.04, 0.02]
    assert bits_of(result.state) == bits_of(whole.state)


def test_a_second_run_with_the_same_hook_begins_anew():
    hook = ft.ReduceOnPlateau("valid/loss", "body", factor=0.5, patience=0)
    for _ in range(2):
        assert rates_of([1.0, 1.0], hook)[0]["body"] == [0.08, 0.04]


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (ft.ReduceOnPlateau("valid/loss", "head"), "part 'head' has no rate to set, those that have are 'body'"),
        (ft.ReduceOnPlateau("valid/loss"), "the rate of part 'body' follows a schedule, and can't be set"),
        (ft.ReduceOnPlateau("valid/los", mode="min"), "ReduceOnPlateau('valid/los'): the results are ['valid/loss']"),
    ],
    ids=["no rate", "a schedule", "no result"],
)  # fmt: skip
def test_what_it_can_not_do_is_told_before_the_first_update(hook, message):
    update = update_of(head=optax.sgd(0.1))
    with pytest.raises(ft.FitError, match=re.escape(message)):
        rates_of([1.0], hook, update)


def test_no_rate_at_all_is_an_error():
    update = update_of(body=optax.sgd(0.1), head=optax.sgd(0.1))
    with pytest.raises(ft.FitError, match=re.escape("no part has a rate to set: make one with ft.with_lr")):
        rates_of([1.0], ft.ReduceOnPlateau("valid/loss"), update)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.5}, "ReduceOnPlateau(factor=1.5): give a number between 0 and 1"),
        ({"factor": "0.5"}, "ReduceOnPlateau(factor='0.5'): give a number between 0 and 1"),
        ({"patience": -1}, "ReduceOnPlateau(patience=-1): give a number of at least 0"),
        ({"patience": "3"}, "ReduceOnPlateau(patience='3'): give a number of at least 0"),
        ({"result": "valid/accuracy"}, "ReduceOnPlateau('valid/accuracy'): "),
    ],
)
def test_options_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ft.FitError, match=re.escape(message)):
        ft.ReduceOnPlateau(**{"result": "valid/loss", **options})
