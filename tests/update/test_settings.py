"""Hyperparameters that are state, in a compiled update."""

import copy
import re

import jax
import numpy as np
import optax
import pytest
from linear import batches_of, leaves_of, linear_params, loss_fn, optimizer_of

import functrain as ft


@pytest.fixture(scope="module")
def update():
    body = ft.with_state(optax.adamw, learning_rate=0.01, b1=0.75, weight_decay=0.125)
    return ft.make_update(loss_fn, optimizer_of(linear_params(), body=body))


def body_of(update, state):
    return {name: float(value) for name, value in update.optim.hyperparameters(state.opt_state)["body"].items()}


def test_one_is_set_for_a_call_in_every_way_of_calling(update):
    given = {"set": {"body": {"b1": 0.5}}}
    first, batches = update.init(linear_params()), batches_of(1)
    called, _ = update(copy.deepcopy(first), batches[0], **given)
    scanned, _ = update.scan(copy.deepcopy(first), batches, **given)
    pure, _ = jax.jit(lambda state, batch: update.pure(state, batch, **given))(first, batches[0])
    measured, metrics = update.measured(copy.deepcopy(first), batches[0], **given)
    assert body_of(update, called) == {"learning_rate": np.float32(0.01), "b1": 0.5, "weight_decay": 0.125}
    assert leaves_of(called) == leaves_of(scanned) == leaves_of(pure) == leaves_of(measured)
    assert float(metrics["parts"]["body"]["b1"]) == 0.5
    after, _ = update(called, batches[0])
    assert body_of(update, after)["b1"] == 0.75


def test_no_value_compiles_another_program(update):
    state = update.init(linear_params())
    given = [{"set": {"body": {"b1": b1}}, "lr": {"head": rate}} for b1, rate in ((0.5, 0.1), (0.25, 0.2))]
    for each in given:
        state, _ = update(state, batches_of(1)[0], **each)
    (program,) = [
        program for (call, _), program in update._programs.kept.items() if call.kind == "whole" and not call.measured
    ]
    sizes = program.jitted._cache_size()
    state, _ = update(state, batches_of(1)[0], set={"body": {"b1": 0.125}}, lr={"head": 0.3})
    assert program.jitted._cache_size() == sizes


def test_what_is_given_for_a_part_that_is_not_trained_is_an_error(update):
    state = update.init(linear_params())
    with pytest.raises(ft.UpdateError, match=re.escape("give hyperparameters by part and name, of the parts 'body'")):
        update(state, batches_of(1)[0], set={"bdoy": {"b1": 0.5}})
    with pytest.raises(ft.UpdateError, match=re.escape("set: 'b1' of part 'body' is nan: give a finite number")):
        update(state, batches_of(1)[0], set={"body": {"b1": float("nan")}})
