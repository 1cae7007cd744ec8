"""Sample trees of every framework, and hypothesis strategies for random trees and rules."""

import dataclasses
import functools
import glob
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import settings
from hypothesis import strategies as st

import functrain as ft

quick = settings(max_examples=60)


class Pair(NamedTuple):
    left: Any
    right: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["encoder", "head"], meta_fields=["activation"])
@dataclasses.dataclass
class Model:
    encoder: Any
    head: Any
    activation: str = "relu"


class NnxModel(nnx.Module):
    """Submodules, a list of them, a variable that holds a dict, a running mean, and a random key."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.lora = nnx.Param({"a": jnp.ones(2), "value": jnp.ones(3)})


class EquinoxModel(eqx.Module):
    """Arrays, a function, a number and a static field, side by side."""

    mlp: eqx.nn.MLP
    scale: float
    name: str = eqx.field(static=True, default="model")


@functools.cache
def nnx_model() -> NnxModel:
    return NnxModel(rngs=nnx.Rngs(0))


@functools.cache
def nnx_params() -> nnx.State:
    return nnx.state(nnx_model(), nnx.Param)


@functools.cache
def linen_params() -> dict[str, Any]:
    return nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(2)]).init(jax.random.key(0), jnp.ones((1, 2)))


@functools.cache
def equinox_model() -> EquinoxModel:
    return EquinoxModel(eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)), scale=0.5)


@functools.cache
def haiku_params() -> Any:
    return hk.transform(lambda x: hk.nets.MLP([3, 2])(x)).init(jax.random.key(0), jnp.ones((1, 2)))


TREES: dict[str, Callable[[], Any]] = {
    "nnx.State": nnx_params,
    "nnx.split": lambda: nnx.split(nnx_model()),
    "nnx.Module": nnx_model,
    "Linen": linen_params,
    "Linen FrozenDict": lambda: flax.core.freeze(linen_params()),
    "Equinox": equinox_model,
    "Haiku": haiku_params,
    "flat dict": lambda: {"conv/kernel": 1.0, "conv/bias": 2.0},
    "nested tuples": lambda: ((1.0, (2.0,)), (), (3.0, None)),
    "lists": lambda: [[1.0], [], [2.0, [3.0]]],
    "dataclasses": lambda: Model(Model({"w": 1.0}, None), [2.0], activation="tanh"),
    "NamedTuples": lambda: Pair(Pair(1.0, {}), Pair(2.0, [3.0])),
    "bare array": lambda: jnp.ones(2),
    "None and empty containers": lambda: {"a": 1.0, "none": None, "dict": {}, "list": [None, ()], "tuple": ([], 2.0)},
}


def identical(one: Any, other: Any) -> bool:
    """Whether two trees have one structure and hold the very same leaves."""
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    return bool(structure == other_structure) and all(a is b for a, b in zip(leaves, others, strict=True))


def bits(tree: Any) -> dict[str, Any]:
    """Path, dtype, shape and bytes of every leaf."""

    def of(leaf: Any) -> Any:
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        return str(leaf.dtype), array.shape, array.tobytes()

    return {path: of(leaf) for path, leaf in ft.flatten(tree).items()}


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def says(*phrases: str) -> str:
    """A pattern for `pytest.raises(match=)`: these very phrases, in this order."""
    return "(?s)" + ".*".join(map(re.escape, phrases))


# Keys that a path or a pattern could trip over. None holds a '/', so that no two leaves have one path.
KEYS = [
    "a",
    "b",
    "block_1",
    "block_10",
    "a.b",
    "[0]",
    "[!a]",
    "]",
    "~",
    "*",
    "**",
    "?",
    "",
    "a b",
    "^",
    "\\d",
    "0",
    "é",
]


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(st.sampled_from(KEYS), children, max_size=4),
        st.dictionaries(st.integers(0, 12), children, max_size=3),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Pair, children, children),
        st.builds(Model, children, children, st.sampled_from(["relu", "tanh"])),
    )


def _numbered(tree: Any) -> Any:
    """The tree with leaves that can be told apart."""
    numbers = itertools.count()
    return jax.tree.map(lambda _: float(next(numbers)), tree)


_nodes = st.recursive(st.sampled_from([0.0, 0.0, 0.0, None, {}, [], ()]), _containers, max_leaves=8)

any_trees = _nodes.map(_numbered)
trees = any_trees.filter(jax.tree.leaves)


class Rule(NamedTuple):
    """A selector, and what it takes: worked out from the leaf's segments, not by functrain."""

    selector: Any
    takes: frozenset[str]


def escaped(path: str) -> str:
    """A string selector that means these characters and nothing else."""
    return glob.escape(path)


@st.composite
def rules_for(draw: Any, tree: Any) -> Rule:
    paths = list(ft.flatten(tree))
    path = draw(st.sampled_from(paths))
    segments = path.split("/")
    prefix = segments[: draw(st.integers(1, len(segments)))]
    name = draw(st.sampled_from(segments))
    chosen = draw(st.sets(st.sampled_from(paths), min_size=1))
    rules = [
        (escaped("/".join(prefix)), lambda other: other[: len(prefix)] == prefix),
        ("**/" + escaped(name), lambda other: name in other),
        (re.compile(re.escape(path)), lambda other: other == segments),
        (lambda other, leaf: other in chosen, lambda other: "/".join(other) in chosen),
        (sorted(map(escaped, chosen)), lambda other: any(_below(other, one.split("/")) for one in chosen)),
    ]
    selector, takes = draw(st.sampled_from(rules))
    return Rule(selector, frozenset(other for other in paths if takes(other.split("/"))))


def _below(segments: list[str], prefix: list[str]) -> bool:
    return segments[: len(prefix)] == prefix


class Case(NamedTuple):
    """A tree, rules that fit it, and the part of every path."""

    tree: Any
    rules: dict[str, Any]
    owner: dict[str, str]


@st.composite
def cases(draw: Any) -> Case:
    tree = draw(trees)
    left = list(ft.flatten(tree))
    rules, owner = {}, {}
    for i, rule in enumerate(draw(st.lists(rules_for(tree), max_size=4))):
        if free := [path for path in left if path in rule.takes]:
            rules[f"part{i}"] = rule.selector
            owner.update(dict.fromkeys(free, f"part{i}"))
            left = [path for path in left if path not in owner]
    if left:
        rules["rest"] = ...
        owner.update(dict.fromkeys(left, "rest"))
    return Case(tree, rules, owner)
