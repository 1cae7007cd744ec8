"""The partition: which leaf belongs to which part, resolved once from the parameters and never again."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from functrain.errors import PartitionError
from functrain.tree.arrays import is_array
from functrain.tree.model_state import state_of_model
from functrain.tree.paths import Flat, PyTree, check_paths, difference_from, flatten
from functrain.tree.rules import owners
from functrain.tree.selectors import Selector, describe, matcher, unmatched
from functrain.tree.text import aligned, bytes_in_words, did_you_mean, leaves_in_words, listed

Split = dict[str, Flat]


class Leaf(NamedTuple):
    """What a partition knows of a leaf; `shape` and `dtype` are None for a leaf that is no array."""

    path: str
    part: str
    shape: tuple[int, ...] | None
    dtype: Any


@dataclasses.dataclass(frozen=True, repr=False)
class Partition:
    """A total, disjoint assignment of the leaves of a tree to named parts; made by `partition`.

    It is immutable and hashable, and free at run time: under `jit`, splitting and merging leave no operation behind.
    `print(parts)` is a table of the parts.

    Attributes:
      names: the parts, in the order of their rules.
      leaves: every leaf, in the tree's order.
      selectors: what each part was selected by, for display.
      shared: the paths of each array that was at several, each of which is a parameter of its own.
      rest: the leaves that are no arrays, by path, such as the functions in a module of Equinox.
      state: which leaves are state of a model of Flax and no parameters, by path, and of what kind.
    """

    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    selectors: tuple[str, ...]
    treedef: jax.tree_util.PyTreeDef
    shared: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), compare=False)
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    state: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def paths(self, part: str) -> tuple[str, ...]:
        """The paths of a part's leaves, in the tree's order.

        >>> partition({"a": 1.0, "b": 2.0, "c": 3.0}, {"first": "a", "rest": ...}).paths("rest")
        ('b', 'c')
        """
        self.check_names([part], "paths")
        return tuple(self._index[part])

    def shapes(self, part: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a part's leaves, which are arrays, by path."""
        mine = (leaf for leaf in self.leaves if leaf.part == part)
        return {leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in mine}

    def split(self, tree: PyTree) -> Split:
        """Splits a whole tree into its parts.

        >>> parts = partition({"conv": {"kernel": 1.0, "bias": 2.0}}, {"bias": "**/bias", "rest": ...})
        >>> parts.split({"conv": {"kernel": 3.0, "bias": 4.0}})
        {'bias': {'conv/bias': 4.0}, 'rest': {'conv/kernel': 3.0}}

        Args:
          tree: a tree of the structure that the partition was made from. Its leaves may be anything: gradients,
            shardings, masks, per-example gradients.

        Returns:
          `{part: {path: leaf}}`, plain dicts, with every part.

        Raises:
          PartitionError: the tree's structure is another one; says which leaves are missing or extra.
        """
        leaves = self._leaves_of(tree, "the tree to split")
        return {part: {path: leaves[i] for path, i in index.items()} for part, index in self._index.items()}

    def merge(self, split: Mapping[str, Mapping[str, Any]], *, into: PyTree = None) -> PyTree:
        """Puts parts together to a whole tree: the inverse of `split`.

        >>> parts = partition({"a": 1.0, "b": [2.0]}, {"first": "a", "rest": ...})
        >>> parts.merge({"first": {"a": 3.0}}, into={"a": 1.0, "b": [2.0]})
        {'a': 3.0, 'b': [2.0]}

        Args:
          split: `{part: {path: leaf}}`; every part, unless `into` is given.
          into: a whole tree that the leaves of absent parts are taken from.

        Raises:
          PartitionError: an unknown or a missing part, or a part with missing or extra leaves.
        """
        self.check_names(split, "merge")
        absent = [part for part in self.names if part not in split]
        if absent and into is None:
            raise PartitionError(f"merge lacks the parts {listed(absent)}: give them, or write merge(split, into=tree)")
        leaves = [None] * len(self.leaves) if into is None else self._leaves_of(into, "the tree to merge into")
        for part, flat in split.items():
            index = self._index[part]
            self.check_part(part, flat)
            for path, i in index.items():
                leaves[i] = flat[path]
        return jax.tree.unflatten(self.treedef, leaves)

    def masked(self, tree: PyTree, part: str) -> PyTree:
        """A whole tree with `optax.MaskedNode()` where leaves of other parts are: what a part's transform is given.

        >>> parts = partition({"a": 1.0, "b": [2.0]}, {"first": "a", "rest": ...})
        >>> parts.masked({"a": 1.0, "b": [2.0]}, "rest")
        {'a': MaskedNode(), 'b': [2.0]}

        Args:
          tree: a tree of the structure that the partition was made from.
          part: the part whose leaves stay.

        Raises:
          PartitionError: an unknown part, or a tree of another structure.
        """
        self.check_names([part], "masked")
        kept = zip(self.leaves, self._leaves_of(tree, "the tree to mask"), strict=True)
        return jax.tree.unflatten(
            self.treedef, [value if leaf.part == part else optax.MaskedNode() for leaf, value in kept]
        )

    def labels(self, values: Mapping[str, Any] | None = None) -> PyTree:
        """A whole tree that holds at each leaf its part's name, or its part's value.

        >>> parts = partition({"a": 1.0, "b": [2.0]}, {"first": "a", "rest": ...})
        >>> parts.labels()
        {'a': 'first', 'b': ['rest']}
        >>> parts.labels({"first": 0.0, "rest": 0.1})
        {'a': 0.0, 'b': [0.1]}

        Args:
          values: a value for every part (a sharding, a decay, a dtype); None for the part's name.

        Raises:
          PartitionError: a part without a value, or a value for an unknown part.
        """
        if values is None:
            values = {part: part for part in self.names}
        self.check_names(values, "labels")
        if absent := [part for part in self.names if part not in values]:
            raise PartitionError(f"labels needs a value for every part: add {listed(absent)}")
        return jax.tree.unflatten(self.treedef, [values[leaf.part] for leaf in self.leaves])

    def table(self, *, paths: bool = False) -> str:
        """The parts as a table: leaves, parameters, bytes, selector, and with `paths` each leaf's shape and dtype.

        >>> print(partition({"a": jax.numpy.ones((2, 3)), "b": jax.numpy.ones(4)}, {"first": "a", "rest": ...}))
        part   leaves  parameters  bytes  selector
        first       1           6   24 B  'a'
        rest        1           4   16 B  ...
        total       2          10   40 B
        """
        return table(self, "selector", self.selectors, paths=paths)

    def check_names(self, names: Any, where: str) -> None:
        """Raises a PartitionError that names the known parts, if one of the names is unknown."""
        if unknown := [name for name in names if name not in self._index]:
            raise PartitionError(
                f"{where}: unknown part {listed(unknown)}; the parts are {listed(self.names, 30)}"
                f"{did_you_mean(unknown, self.names)}"
            )

    def check_part(self, part: str, flat: Mapping[str, Any]) -> None:
        """Raises a PartitionError unless `flat` has exactly the paths of the part."""
        if not isinstance(flat, Mapping):
            raise PartitionError(f"part {part!r} must be a dict of path to leaf as split() gives it, not {type(flat)}")
        if flat.keys() != self._index[part].keys():
            check_paths(flat, self._index[part], f"part {part!r}")

    @functools.cached_property
    def _index(self) -> dict[str, dict[str, int]]:
        index: dict[str, dict[str, int]] = {part: {} for part in self.names}
        for i, leaf in enumerate(self.leaves):
            index[leaf.part][leaf.path] = i
        return index

    def _leaves_of(self, tree: PyTree, what: str) -> list[Any]:
        leaves, treedef = jax.tree.flatten(tree)
        if treedef == self.treedef:
            return leaves
        differs = difference_from(tree, self.treedef, [leaf.path for leaf in self.leaves])
        raise PartitionError(
            f"{what} is not of the structure that was partitioned: it {differs}; give a tree like the one that"
            " partition() was given, or make a partition of this one"
        )

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        counts = ", ".join(f"{part}: {leaves_in_words(len(self._index[part]))}" for part in self.names)
        return f"Partition({counts})"


def partition(
    params: PyTree, rules: Mapping[str, Selector], *, overlap: Literal["first", "error"] = "first"
) -> Partition:
    """Assigns every leaf of a tree to a named part.

    >>> params = {"conv": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}
    >>> partition(params, {"biases": "**/bias", "head": "head", "rest": ...})
    Partition(biases: 2 leaves, head: 1 leaf, rest: 1 leaf)

    Rules are tried in order, and the first that matches takes the leaf.

    Args:
      params: any pytree of arrays or `jax.ShapeDtypeStruct`s; non-array leaves are kept.
      rules: `{part: selector}`; see `functrain.tree.selectors.matcher` for selectors. `...` is all that is left.
      overlap: "first": the first rule takes a leaf that several match; "error": that is an error. A rule that is
        `...` never overlaps.

    Raises:
      PartitionError: a rule takes no leaf (says which names come nearest, or which rule took them before), a leaf that
        no rule takes, two leaves with one path, two rules for one leaf with `overlap="error"`.
    """
    if overlap not in ("first", "error"):
        raise PartitionError(f"overlap={overlap!r}: write 'first' or 'error'")
    if not isinstance(rules, Mapping):
        raise PartitionError(f'rules are a dict of selectors by part, {{"head": "head", "rest": ...}}, not {rules!r}')
    flat = flatten(params)
    if not flat:
        raise PartitionError("the tree has no leaves: give partition() the parameters")
    owner = owners(params, rules, overlap)
    if uncovered := [path for path in flat if path not in owner]:
        raise PartitionError(
            f"no rule takes {listed(uncovered)}: add a rule for {'it' if len(uncovered) == 1 else 'them'},"
            ' or "rest": ... for all that is left'
        )
    return Partition(
        names=tuple(rules),
        leaves=tuple(Leaf(path, owner[path], *_shape_dtype(leaf)) for path, leaf in flat.items()),
        selectors=tuple(describe(selector) for selector in rules.values()),
        treedef=jax.tree.structure(params),
        shared=_shared(flat),
        rest={path: leaf for path, leaf in flat.items() if not is_array(leaf)},
        state=state_of_model(params),
    )


def taken_by(parts: Partition, key: Selector) -> dict[str, str]:
    """The paths that the name of a part, or else a selector takes, with the part of each.

    >>> taken_by(partition({"conv": {"kernel": 1.0, "bias": 2.0}}, {"body": ...}), "**/bias")
    {'conv/bias': 'body'}

    Raises:
      PartitionError: it takes none.
    """
    if isinstance(key, str) and key in parts.names:
        return dict.fromkeys(parts.paths(key), key)
    leaves = {leaf.path: leaf for leaf in parts.leaves}
    takes, problem = matcher(key), unmatched(key, leaves)
    if problem:
        raise PartitionError(f"{problem}; the parts are {listed(parts.names, 30)}")
    return {path: leaf.part for path, leaf in leaves.items() if takes(path, leaf)}


def table(parts: Partition, title: str, cells: Sequence[str], *, paths: bool = False) -> str:
    """The parts as a text table whose last column has a title and a cell for each part."""
    rows = [("part", "leaves", "parameters", "bytes", title)]
    for part, cell in zip(parts.names, cells, strict=True):
        mine = [leaf for leaf in parts.leaves if leaf.part == part]
        rows.append((part, *_sums(mine), cell))
        if paths:
            rows += [(f"  {leaf.path}", "", *_sums([leaf])[1:], _kind(leaf)) for leaf in mine]
    rows.append(("total", *_sums(parts.leaves), ""))
    return aligned(rows, (str.ljust, str.rjust, str.rjust, str.rjust, str.ljust))


def _shared(flat: Flat) -> tuple[tuple[str, ...], ...]:
    """The paths of each array that is at several."""
    paths: dict[int, list[str]] = {}
    for path, leaf in flat.items():
        if isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, jax.core.Tracer):
            paths.setdefault(id(leaf), []).append(path)
    return tuple(tuple(each) for each in paths.values() if len(each) > 1)


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...] | None, Any]:
    if isinstance(leaf, type):
        return None, None
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), leaf.dtype
    if isinstance(leaf, int | float | complex):
        return (), jax.numpy.result_type(leaf)
    return None, None


def _sums(leaves: Sequence[Leaf]) -> tuple[str, str, str]:
    sizes = [(math.prod(leaf.shape), leaf.dtype.itemsize) for leaf in leaves if leaf.shape is not None]
    parameters, nbytes = sum(size for size, _ in sizes), sum(size * itemsize for size, itemsize in sizes)
    return f"{len(leaves):,}", f"{parameters:,}", bytes_in_words(nbytes)


def _kind(leaf: Leaf) -> str:
    return "not an array" if leaf.shape is None else f"{leaf.dtype}{list(leaf.shape)}"
