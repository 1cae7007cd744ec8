"""What a leaf is called: its keys joined by `/`.

A path is the one vocabulary of functrain: it says which optimizer a leaf gets, whether it is differentiated, where it
is clipped, how it is logged, and how it is found again in a checkpoint.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax

from functrain.errors import PartitionError
from functrain.tree.text import around_first_difference, listed

PyTree: TypeAlias = Any
Flat: TypeAlias = dict[str, Any]


def flatten(tree: PyTree) -> Flat:
    """Returns the leaves of a tree as a plain dict from path to leaf.

    >>> flatten({"conv": {"kernel": 1.0, "bias": 2.0}, "heads": [3.0, None]})
    {'conv/bias': 2.0, 'conv/kernel': 1.0, 'heads/0': 3.0}

    Args:
      tree: any pytree. The key that a `flax.nnx.Variable` adds beneath itself is no part of a path.

    Returns:
      `{path: leaf}` in the tree's order; the leaves themselves, not copies.

    Raises:
      PartitionError: two leaves have one path.
    """
    flat: Flat = {}
    for keys, node in nodes(tree):
        for path, leaf in leaves_of(keys, node):
            if path in flat:
                raise PartitionError(
                    f"two leaves have the path {path!r}: a key that contains '/' reads like two keys; rename one of"
                    " them"
                )
            flat[path] = leaf
    return flat


def unflatten(flat: Mapping[str, Any], like: PyTree) -> PyTree:
    """Puts the leaves of a flat dict into a tree of another tree's type: the inverse of `flatten`.

    >>> unflatten({"a/0": 1.0, "a/1": 2.0}, like={"a": (0.0, 0.0)})
    {'a': (1.0, 2.0)}

    Args:
      flat: `{path: leaf}` with exactly the paths of `like`; the leaves may be anything.
      like: any pytree; only its structure is used.

    Raises:
      PartitionError: a path is missing, or one is there that is not in `like`.
    """
    paths = flatten(like)
    check_paths(flat, paths, "the flat tree")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in paths])


def check_paths(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raises a PartitionError unless both are the same paths, saying which are missing and which are extra."""
    if differs := difference(given, expected):
        raise PartitionError(f"{what} {differs}")


def difference(given: Iterable[str], expected: Iterable[str]) -> str:
    """Says which of the expected paths are missing and which of the given ones are extra; empty where none is."""
    given, expected = dict.fromkeys(given), dict.fromkeys(expected)
    missing = [path for path in expected if path not in given]
    extra = [path for path in given if path not in expected]
    lacks = f"lacks {listed(missing)}" if missing else ""
    has = f"has {listed(extra)}, which is not expected" if extra else ""
    return " and ".join(filter(None, (lacks, has)))


def same_structure(one: PyTree, other: PyTree) -> bool:
    """Whether two trees have the same node types, keys and static fields."""
    structure: Any = jax.tree.structure(one)
    return bool(structure == jax.tree.structure(other))


def structure_difference(given: PyTree, expected: PyTree) -> str:
    """Says how the structure of one tree differs from that of another; empty where it does not.

    >>> structure_difference({"a": 1, "c": 2}, {"a": 1, "b": 2})
    "lacks 'b' and has 'c', which is not expected"
    """
    if same_structure(given, expected):
        return ""
    return difference_from(given, jax.tree.structure(expected), flatten(expected))


def difference_from(given: PyTree, treedef: Any, paths: Iterable[str]) -> str:
    """Says how a tree differs from a structure that it is not of, with these paths."""
    if differs := difference(flatten(given), paths):
        return differs
    ours, theirs = around_first_difference(jax.tree.structure(given), treedef)
    return f"has the same paths, but its node types or static fields differ: {ours} where {theirs} was"


def nodes(tree: PyTree) -> Iterable[tuple[tuple[Any, ...], Any]]:
    """The leaves of a tree with their keys; a `flax.nnx.Variable` is one."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)


def leaves_of(keys: tuple[Any, ...], node: Any) -> Iterable[tuple[str, Any]]:
    """The paths and leaves of one of the `nodes`; of a Variable those within it."""
    if is_variable(node):
        for inner, value in jax.tree_util.tree_leaves_with_path(node):
            yield _join(keys + inner[1:]), value
    else:
        yield _join(keys), node


def is_variable(node: Any) -> bool:
    """Whether a node is a `flax.nnx.Variable`; flax is not imported for the question."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def _join(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
