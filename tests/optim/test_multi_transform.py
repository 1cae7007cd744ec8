"""Steps give what optax gives, to the bit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import bits
from soak import SOAK

import functrain as ft


class Case(NamedTuple):
    """A tree, its partition, the names of its parts' transforms, and gradients of three steps."""

    whole: Any
    parts: ft.Partition
    kinds: dict[str, str]
    grads: list[Any]


def matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


TRANSFORMS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adamw with a mask": optax.adamw(0.01, weight_decay=0.1, mask=matrices),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01),
    "adagrad": optax.adagrad(0.1),
    "with_lr": ft.with_lr(optax.adamw, 0.01, weight_decay=0.1),
    "schedule": ft.with_lr(optax.adam, optax.linear_schedule(0.1, 0.0, 3)),
    "FROZEN": ft.FROZEN,
}


def containers(children):
    return st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "block_1", "block_10"]), children, min_size=1, max_size=4),
        st.lists(children, min_size=1, max_size=4),
        st.tuples(children, children),
    )


SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (4, 1), (1, 2, 2)])
TREES = containers(st.recursive(SHAPES.map(np.empty), containers, max_leaves=8))


@st.composite
def cases(draw):
    tree = draw(TREES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # Hypothesis' own choices are mostly one part of SGD.

    def random(magnitude):
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 10**magnitude, jnp.float32), tree)

    paths = list(rng.permutation(list(ft.flatten(tree))))
    kinds = rng.permutation(list(TRANSFORMS))[: rng.integers(1, min(4, len(paths)), endpoint=True)]
    rules = {f"part{i}": [str(path) for path in paths[i :: len(kinds)]] for i in range(len(kinds))}
    grads = [random(rng.uniform(-3, 3)) for _ in range(3)]
    return Case(random(0), ft.partition(tree, rules), dict(zip(rules, kinds, strict=True)), grads)


def run(case, jit):
    """Three steps of functrain's optimizer."""
    optim = ft.Optimizer(case.parts, {part: TRANSFORMS[kind] for part, kind in case.kinds.items()})

    def step(whole, grads, opt_state):
        split = case.parts.split(grads)
        return optim.step(whole, {part: split[part] for part in optim.trained}, opt_state)

    whole, opt_state = case.whole, optim.init(case.whole)
    step = jax.jit(step) if jit else step
    for grads in case.grads:
        whole, opt_state = step(whole, grads, opt_state)
    return whole


def run_optax(tx, tree, grads, jit):
    """Three steps of an optax transform."""

    def step(tree, grads, state):
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    step = jax.jit(step) if jit else step
    for grad in grads:
        tree, state = step(tree, grad, state)
    return tree


def optax_transform(kind):
    return optax.set_to_zero() if kind == "FROZEN" else TRANSFORMS[kind]


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@settings(max_examples=8 * SOAK)
@given(case=cases())
def test_steps_give_what_multi_transform_gives_to_the_bit(jit, case):
    transforms = {part: optax_transform(kind) for part, kind in case.kinds.items()}
    together = optax.multi_transform(transforms, case.parts.labels())
    assert bits(run(case, jit)) == bits(run_optax(together, case.whole, case.grads, jit))


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@settings(max_examples=8 * SOAK)
@given(case=cases())
def test_steps_give_what_each_transform_alone_gives_on_its_part_to_the_bit(jit, case):
    after = case.parts.split(run(case, jit))
    for part, kind in case.kinds.items():
        flat, *grads = (case.parts.split(tree)[part] for tree in (case.whole, *case.grads))
        assert bits(after[part]) == bits(run_optax(optax_transform(kind), flat, grads, jit)), kind
