"""The selectors that pick leaves by path: strings, regular expressions, functions, sequences of these, and `...`."""

import difflib
import fnmatch
import glob
import re
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

import jax.numpy as jnp

from functrain.errors import PartitionError
from functrain.tree.nnx_filters import is_filter, taken
from functrain.tree.paths import Flat, PyTree, flatten, unflatten
from functrain.tree.text import leaves_in_words, listed

Selector: TypeAlias = "str | re.Pattern[str] | Callable[[str, Any], bool] | EllipsisType | Sequence[Selector]"


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
        `...` (everything), or a sequence of these (any of them). Filters of Flax NNX go through `resolved` first.

    Raises:
      PartitionError: the selector is none of these.
    """
    if selector is ...:
        return lambda path, leaf: True
    if isinstance(selector, type):
        raise PartitionError(
            f"{selector.__name__} is a class, and no selector: write a path like 'encoder/layers', or an NNX type of"
            " Variables, such as nnx.Param, for a tree like nnx.state(model)"
        )
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


def resolved(selector: Selector, tree: PyTree) -> Selector:
    """The selector with what filters of Flax NNX in it take of a tree, as functions of path and leaf.

    Raises:
      PartitionError: a filter that takes nothing of a tree without Variables.
    """
    if is_filter(selector):
        return taken(selector, tree)
    if isinstance(selector, Sequence) and not isinstance(selector, str):
        return [resolved(one, tree) for one in selector]
    return selector


def take(tree: PyTree, selector: Selector) -> tuple[Flat, Flat]:
    """Takes the leaves that a selector matches out of a tree.

    >>> grads = {"conv": {"kernel": 1.0, "bias": 2.0}, "head": 3.0}
    >>> bias, rest = take(grads, "conv/bias")
    >>> conv, rest = take(rest, "conv")
    >>> conv, rest
    ({'conv/kernel': 1.0}, {'head': 3.0})

    Args:
      tree: any pytree, or what an earlier `take` left.
      selector: see `functrain.tree.selectors.matcher`.

    Returns:
      What it took and what is left, both `{path: leaf}`.

    Raises:
      PartitionError: it takes nothing: misspelt, or taken before.
    """
    flat = flatten(tree)
    selector = resolved(selector, tree)
    if problem := unmatched(selector, flat):
        raise PartitionError(
            f"take: {problem} (or an earlier take has it: what one takes is gone from the rest that it returns)"
        )
    takes = matcher(selector)
    taken = {path: leaf for path, leaf in flat.items() if takes(path, leaf)}
    return taken, {path: leaf for path, leaf in flat.items() if path not in taken}


def mask(selector: Selector, *, invert: bool = False) -> Callable[[PyTree], PyTree]:
    """A selector as a mask of optax: a function from a tree to a tree of booleans.

    >>> kernels = mask("**/kernel")
    >>> kernels({"conv": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}})
    {'conv': {'bias': False, 'kernel': True}, 'head': {'bias': False, 'kernel': True}}
    >>> mask(["**/bias", "norm"], invert=True)({"kernel": 1.0, "bias": 2.0, "norm": {"scale": 3.0}})
    {'bias': False, 'kernel': True, 'norm': {'scale': False}}

    For `optax.adamw(1e-3, mask=kernels)`, `optax.masked(tx, kernels)` and the like. In a part it is of that part's
    leaves: an `optax.MaskedNode()` stays one.

    Args:
      selector: see `functrain.tree.selectors.matcher`. Of a function of path and leaf, the leaf is a parameter when the
        state is made, and a gradient in a step.
      invert: whether the leaves are True that it does not take.

    Raises:
      PartitionError: it is no selector; or, when the function is called, a member of it takes no leaf of the tree.
    """
    matcher(resolved(selector, ()))  # What is no selector is refused here, where it was written.

    def of(tree: PyTree) -> PyTree:
        flat, of_tree = flatten(tree), resolved(selector, tree)
        if problem := unmatched(of_tree, flat):
            raise PartitionError(f"mask: {problem}")
        takes = matcher(of_tree)
        return unflatten({path: takes(path, leaf) != invert for path, leaf in flat.items()}, like=tree)

    of.__name__ = of.__qualname__ = f"ft.mask({describe(selector)}{', invert=True' if invert else ''})"
    return of


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
    if selector == "...":
        return "no leaf matches '...' in quotes: write ... without them for all that is left"
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
    # As an attribute is; without what it is in; with one name for several.
    deep = "/".join("**" if name == "*" else name for name in selector.split("/"))
    spelt = [selector.replace(".", "/").strip("/"), f"**/{selector}", deep]
    if found := [each for each in spelt if each != selector and _count(each, flat)]:
        close = found[:1]
    else:
        as_deep = [subtree for subtree in subtrees if subtree.count("/") == selector.strip("/").count("/")]
        anywhere = ["**/" + subtree.rsplit("/", 1)[-1] for subtree in subtrees] if selector.startswith("**/") else []
        names = difflib.get_close_matches(selector, dict.fromkeys(as_deep + anywhere), cutoff=0.7)
        close = [name if name.startswith("**/") else glob.escape(name) for name in names]
    if close:
        counts = (f"{name!r} ({leaves_in_words(_count(name, flat))})" for name in close)
        return f"did you mean {' or '.join(counts)}?"
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
