"""Leaf names, and the selectors that pick leaves by name.

A leaf's path is its keys joined by `/`. It is the one vocabulary of functrain: the same selectors say
which optimizer a leaf gets, whether it is differentiated, where it is clipped and how it is logged.
"""

import difflib
import fnmatch
import glob
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

PyTree: TypeAlias = Any
Flat: TypeAlias = dict[str, Any]
Selector: TypeAlias = "str | re.Pattern[str] | Callable[[str, Any], bool] | EllipsisType | Sequence[Selector]"


class PartitionError(ValueError):
    """A selector, a rule or a tree that does not fit the leaves it is meant for."""


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
    for path, leaf in _named_leaves(tree):
        if path in flat:
            raise PartitionError(
                f"two leaves have the path {path!r}: a key that contains '/' reads like two keys; rename one of them"
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
      PartitionError: a path is missing, or one is there that `like` has not.
    """
    paths = flatten(like)
    check_paths(flat, paths, "the flat tree")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in paths])


def non_float(path: str, leaf: Any) -> bool:
    """A selector for leaves that no gradient exists for: integers, booleans, random keys, functions.

    >>> model = {"kernel": jnp.ones(2), "steps": jnp.zeros((), jnp.int32), "activation": jnp.tanh}
    >>> [path for path, leaf in flatten(model).items() if non_float(path, leaf)]
    ['activation', 'steps']

    Args:
      path: not looked at.
      leaf: an array, a `jax.ShapeDtypeStruct`, a Python number or any object. Complex numbers count as floating point.
    """
    del path
    if isinstance(leaf, float | complex):
        return False
    if isinstance(leaf, type):
        return True
    return not jnp.issubdtype(getattr(leaf, "dtype", None) or type(leaf), jnp.inexact)


def matcher(selector: Selector) -> Callable[[str, Any], bool]:
    """Compiles a selector into a function of path and leaf.

    >>> takes = matcher(["block_1", "**/bias", re.compile(r"head\\d/.*")])
    >>> [takes(path, None) for path in ("block_1/kernel", "block_10/kernel", "block_10/bias", "head2/kernel")]
    [True, False, True, True]

    Args:
      selector: a string (whole segments from the root, and the subtree beneath; `*`, `?`, `[0-3]` within a segment,
        `**` for any number of segments), a compiled regular expression (the whole path), a `(path, leaf) -> bool`,
        `...` (everything), or a sequence of these (any of them).

    Raises:
      PartitionError: the selector is none of these.
    """
    if selector is ...:
        return lambda path, leaf: True
    if isinstance(selector, str):
        matches = _glob(selector)
        return lambda path, leaf: matches(path)
    if isinstance(selector, re.Pattern):
        return lambda path, leaf: selector.fullmatch(path) is not None
    if callable(selector):
        return lambda path, leaf: bool(selector(path, leaf))
    if isinstance(selector, Sequence):
        takes = [matcher(one) for one in selector]
        return lambda path, leaf: any(take(path, leaf) for take in takes)
    raise PartitionError(
        f"{selector!r} is no selector: write a path like 'encoder/layers', a compiled regex, a function of"
        " (path, leaf), a sequence of these, or ... for all that is left"
    )


def unmatched(selector: Selector, flat: Flat) -> str | None:
    """Says what is wrong with a selector of which some member matches no leaf at all, or returns None."""
    if isinstance(selector, Sequence) and not isinstance(selector, str):
        if not selector:
            return "an empty sequence takes no leaf: name at least one path in it"
        return next((problem for one in selector if (problem := unmatched(one, flat))), None)
    takes = matcher(selector)
    if any(takes(path, leaf) for path, leaf in flat.items()):
        return None
    if not flat:
        return "there is no leaf left to take"
    if isinstance(selector, str):
        return f"no leaf matches {selector!r}; {_nearest(selector, flat)}"
    if isinstance(selector, re.Pattern) and (found := next((path for path in flat if selector.search(path)), None)):
        return (
            f"no leaf matches re.compile({selector.pattern!r}) from end to end, though {found!r} contains it;"
            f" did you mean re.compile({f'.*(?:{selector.pattern}).*'!r})?"
        )
    return f"no leaf matches {describe(selector)}; the tree has {listed(flat)}"


def describe(selector: Selector) -> str:
    """A selector as one would write it."""
    if selector is ...:
        return "..."
    if isinstance(selector, re.Pattern):
        return f"re.compile({selector.pattern!r})"
    if isinstance(selector, Sequence) and not isinstance(selector, str):
        return "[" + ", ".join(map(describe, selector)) + "]"
    return getattr(selector, "__name__", None) or repr(selector)


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


def around_first_difference(one: object, other: object, margin: int = 40) -> tuple[str, str]:
    """What two things that look alike say where they first differ, in quotes."""
    texts = (str(one), str(other))
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    window = slice(max(0, same - margin), same + margin)
    return f"'...{texts[0][window]}...'", f"'...{texts[1][window]}...'"


def listed(names: Iterable[str], most: int = 10) -> str:
    """At most ten names in quotes, then a count of the others."""
    quoted = [repr(name) for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(leaves: int) -> str:
    """A number of leaves in words."""
    return f"{leaves:,} {'leaf' if leaves == 1 else 'leaves'}"


def _named_leaves(tree: PyTree) -> Iterable[tuple[str, Any]]:
    nnx = sys.modules.get("flax.nnx")

    def is_variable(node: Any) -> bool:
        return nnx is not None and isinstance(node, nnx.Variable)

    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        if is_variable(leaf):
            for inner, value in jax.tree_util.tree_leaves_with_path(leaf):
                yield _join(keys + inner[1:]), value
        else:
            yield _join(keys), leaf


def _join(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _glob(selector: str) -> Callable[[str], bool]:
    """Compiles a string selector: does it match the first segments of a path, or all of them?"""
    patterns = [None if name == "**" else re.compile(fnmatch.translate(name)).match for name in selector.split("/")]

    def matches(names: list[str], start: int, first: int) -> bool:
        for i in range(first, len(patterns)):
            pattern = patterns[i]
            if pattern is None:
                return any(matches(names, end, i + 1) for end in range(start, len(names) + 1))
            if start == len(names) or not pattern(names[start]):
                return False
            start += 1
        return True

    return lambda path: matches(path.split("/"), 0, 0)


def _nearest(selector: str, flat: Flat) -> str:
    """The subtrees whose names come nearest to a string that matches nothing, as a question."""
    subtrees = _subtrees(flat)
    deeper = f"**/{selector}"
    if _count(deeper, flat):
        close = [deeper]
    else:
        as_deep = [subtree for subtree in subtrees if subtree.count("/") == selector.strip("/").count("/")]
        anywhere = ["**/" + subtree.rsplit("/", 1)[-1] for subtree in subtrees] if selector.startswith("**/") else []
        names = difflib.get_close_matches(selector, dict.fromkeys(as_deep + anywhere), cutoff=0.7)
        close = [name if name.startswith("**/") else glob.escape(name) for name in names]
    if close:
        return "did you mean " + " or ".join(f"{name!r} ({counted(_count(name, flat))})" for name in close) + "?"
    top = [subtree for subtree in subtrees if "/" not in subtree] or subtrees
    return f"the tree has {listed(top)}"


def _subtrees(flat: Flat) -> list[str]:
    """The path of every node of the tree, in its order."""
    prefixes: dict[str, None] = {}
    for path in flat:
        segments = path.split("/")
        prefixes.update(dict.fromkeys("/".join(segments[: end + 1]) for end in range(len(segments))))
    return list(prefixes)


def _count(selector: str, flat: Flat) -> int:
    takes = matcher(selector)
    return sum(takes(path, leaf) for path, leaf in flat.items())
