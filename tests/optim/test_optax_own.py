"""Optax's own tests, as the installed package ships them, of transforms that are run through a part.

Where a test of optax calls `tx.init` or `tx.update`, it is given those of an `ft.Optimizer` that has the transform in a
part of all leaves, and optax's own state in and out: what the test asserts, holds of functrain.
"""

import collections
import importlib
import inspect
import os
import sys
import unittest

import jax
import jax.numpy as jnp
import optax
import pytest
from soak import SOAK

import functrain as ft

MODULES = [
    "transforms._masking_test",
    "transforms._combining_test",
    "transforms._freezing_test",
    "transforms._clipping_test",
    "schedules._inject_test",
    "tree_utils._state_utils_test",
    "contrib._schedule_free_test",
    "transforms._monitoring_test",
    "transforms._conditionality_test",
    "_src.combine_test",
    "_src.transform_test",
]
# `make soak` runs these too. Of Muon there are tests of our own.
LONG = [
    "contrib._sam_test",
    "transforms._accumulation_test",
    "contrib._reduce_on_plateau_test",
    "contrib._complex_valued_test",
    "transforms._layouts_test",
    "contrib._privacy_test",
    "_src.factorized_test",
    "_src.sharding_test",
    "_src.float64_test",
    "transforms._constraining_test",
    "_src.lookahead_test",
    "contrib._muon_test",
    "contrib._galore_test",
    "contrib._common_test",
    "transforms._adding_test",
    "_src.alias_test",
    "_src.linesearch_test",
]
SLOW = ["mixed_precision", "newton_schulz", "orthogonalization_modes"]
OTHERWISE = {
    # Its state starts with an integer and goes on with a float, which is an error here: a state keeps its dtypes.
    "schedules._inject_test": {"StatefulTest.test_inject_stateful_hyperparams"},
    # Its state has other leaves after the first update than before it, which would compile a step twice.
    "transforms._monitoring_test": {"MonitoringTest.test_monitor"},
    # It is to fail without params, and `optim.update` always has them.
    "transforms._constraining_test": {"ConstraintsTest.test_none_arguments"},
    # It is given the gradients of each example and no params, which are taken here to be of the gradients' shapes; with
    # params of their own shapes it is in test_gradients.py.
    "contrib._privacy_test": {
        "DifferentiallyPrivateAggregateTest.test_no_privacy",
        "DifferentiallyPrivateAggregateTest.test_noise_multiplier0 (3.0, 2.0)",
        "DifferentiallyPrivateAggregateTest.test_noise_multiplier1 (1.0, 5.0)",
        "DifferentiallyPrivateAggregateTest.test_noise_multiplier2 (100.0, 4.0)",
        "DifferentiallyPrivateAggregateTest.test_noise_multiplier3 (1.0, 90.0)",
    },
}
CALLS = collections.Counter()


OPTIMIZERS = {}


def optimizer(tx, params):
    shapes = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), params)
    key = id(tx), str(shapes)
    if key not in OPTIMIZERS:
        OPTIMIZERS[key] = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": tx})
    return OPTIMIZERS[key]


def is_trainable(params):
    leaves = jax.tree.leaves(params)
    return bool(leaves) and not any(ft.non_float("", leaf) for leaf in leaves)


def init_of(tx, init):
    def through_a_part(params):
        if not is_trainable(params):
            CALLS["init as it is"] += 1
            return init(params)
        CALLS["init"] += 1
        optim = optimizer(tx, params)
        return optim.optax_state(optim.init(params), "all")

    return through_a_part


def update_of(tx, update):
    def through_a_part(updates, state, params=None, **extra):
        grads = updates
        if isinstance(params, optax.LookaheadParams):
            grads = optax.LookaheadParams(updates, jax.tree.map(jnp.zeros_like, params.slow))
        if params is None and is_trainable(updates):  # A transform that does not look at them.
            params = jax.tree.map(jnp.zeros_like, updates)
        if not is_trainable(params) or jax.tree.structure(grads) != jax.tree.structure(params):
            CALLS["update as it is"] += 1
            return update(updates, state, params, **extra)
        CALLS["update"] += 1
        optim = optimizer(tx, params)
        opt_state = optim.init(params)
        if jax.tree.leaves(state):  # Some tests give none, or {}, to a transform that has no state.
            opt_state = optim.with_optax_state(opt_state, "all", state)
        new, opt_state = optim.update(optim.parts.split(grads), opt_state, params, **extra)
        return optim.parts.merge(new), optim.optax_state(opt_state, "all")

    return through_a_part


class Routed:
    """A field of a transform, which a test of optax is given through a part, and optax as it is."""

    def __init__(self, field, route):
        self.field, self.route = field, route

    def __get__(self, tx, owner):
        if tx is None:
            return self
        raw = self.field.__get__(tx, owner)
        return self.route(tx, raw) if sys._getframe(1).f_code.co_filename.endswith("_test.py") else raw


def cases_of(module):
    """The tests of a module of optax, but for those that are slow and of no transform's form."""
    left = [unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(f"optax.{module}"))]
    while left:
        test = left.pop()
        if isinstance(test, unittest.TestSuite):
            left += list(test)
        elif not any(name in test.id() for name in SLOW):
            yield test


def failing(tests):
    result = unittest.TestResult()
    unittest.TestSuite(tests).run(result)
    return {case.id().split(".", 3)[-1] for case, _ in result.failures + result.errors}


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES + LONG * (SOAK > 1))
def test_optaxs_own_tests_pass_of_transforms_in_a_part(module, monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", os.environ.get("XLA_FLAGS", "")
    )  # Some modules ask for devices when they are imported.
    tests = list(cases_of(module))
    CALLS.clear()
    with monkeypatch.context() as patch:
        for name, route in (("init", init_of), ("update", update_of)):
            field = inspect.getattr_static(optax.GradientTransformation, name)
            patch.setattr(optax.GradientTransformation, name, Routed(field, route))
        failed = failing(tests)
    # Some fail of optax as it is, with this JAX.
    again = [test for test in cases_of(module) if test.id().split(".", 3)[-1] in failed]
    assert failed - failing(again) == OTHERWISE.get(module, set())
    assert CALLS["init"] + CALLS["update"] > 0
