"""What can be told of a transform."""

import functools
import json

import jax
import optax
import pytest

import functrain as ft
from functrain.optim.describe import changed, described, makeup, outlines

COSINE = optax.cosine_decay_schedule(0.1, 40)
DESCRIBED = {
    "chain(scale_by_adam, scale(step_size=-0.001))": optax.adam(1e-3),
    "chain(scale_by_adam(b1=0.95), add_decayed_weights(weight_decay=0.1), scale(step_size=-0.001))": optax.adamw(
        1e-3, b1=0.95, weight_decay=0.1
    ),
    "chain(scale_by_adam, scale_by_schedule(step_size_fn=scale_by_learning_rate))": optax.adam(COSINE),
    "clip_by_global_norm(max_norm=1.0)": optax.clip_by_global_norm(1.0),
    "masked(mask=True, trace(decay=0.9))": optax.masked(optax.trace(0.9), True),
    "MultiSteps(chain(identity, scale(step_size=-0.1)))": optax.MultiSteps(optax.sgd(0.1), 4),
    "adam": ft.with_lr(optax.adam, 1e-3),
    "adam(b1=0.5, eps=0.001)": ft.with_lr(functools.partial(optax.adam, b1=0.5), 1e-3, eps=1e-3),
    "adam(learning_rate=cosine_decay_schedule)": ft.with_lr(optax.adam, COSINE),
    "<lambda>(chain(identity, scale(step_size=-1.0)))": ft.with_lr(lambda lr: optax.sgd(lr), 0.1),
    "frozen": ft.FROZEN,
}


@pytest.mark.parametrize("text", DESCRIBED)
def test_a_transform_is_described_by_what_it_is_made_of_without_defaults(text):
    # MultiSteps has its own numbers under private names, which are compared but not shown.
    assert described(DESCRIBED[text]) == text


CHANGED = {
    "b1 of scale_by_adam was 0.9, is now 0.8": (optax.adam(0.1), optax.adam(0.1, b1=0.8)),
    "eps of scale_by_adam was 1e-08, is now 0.001": (
        ft.with_lr(optax.adam, 0.1), ft.with_lr(optax.adam, 0.1, eps=1e-3)
    ),
    "weight_decay of add_decayed_weights was 0.0001, is now 0.1": (
        optax.chain(optax.clip(1.0), optax.adamw(0.1)), optax.chain(optax.clip(1.0), optax.adamw(0.1, weight_decay=0.1))
    ),
    "step_size of scale was -0.1, is now -0.2": (optax.sgd(0.1), optax.sgd(0.2)),
    "_every_k_schedule of MultiSteps was MultiSteps.__init__(every_k_schedule=2), is now"
    " MultiSteps.__init__(every_k_schedule=4)": (
        optax.MultiSteps(optax.sgd(0.1), 2), optax.MultiSteps(optax.sgd(0.1), 4)
    ),
    "learning_rate of sgd was cosine_decay_schedule(alpha=0.0, decay_steps=40, exponent=1.0, init_value=0.1), is now"
    " cosine_decay_schedule(alpha=0.0, decay_steps=80, exponent=1.0, init_value=0.1)": (
        ft.with_lr(optax.sgd, COSINE), ft.with_lr(optax.sgd, optax.cosine_decay_schedule(0.1, 80))
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", CHANGED)
def test_of_two_transforms_of_one_structure_the_numbers_that_differ_are_told(line):
    old, new = (json.loads(json.dumps(makeup(tx))) for tx in CHANGED[line])
    assert outlines(old, new) is None
    assert changed(old, new) == [line]
    assert changed(old, old) == []


def test_a_constant_rate_of_with_lr_is_state_and_no_number_of_the_transform():
    assert makeup(ft.with_lr(optax.adam, 0.1)) == makeup(ft.with_lr(optax.adam, 0.2))


def test_what_is_no_number_in_a_closure_is_passed_over():
    noise = optax.add_noise(0.1, 0.5, jax.random.key(0))

    def own(limit, table, name):
        def update_fn(updates, state, params=None):
            return jax.tree.map(lambda g: g * limit * table[name], updates), state

        return optax.GradientTransformation(lambda params: (), update_fn)

    table = {"x": jax.numpy.float32(2)}
    assert makeup(optax.chain(noise, own(jax.numpy.float32(0.5), table, "x")))[2][1:] == [[
        "test_what_is_no_number_in_a_closure_is_passed_over", {"limit": 0.5}, []
    ]]  # fmt: skip
    assert json.dumps(makeup(noise))
