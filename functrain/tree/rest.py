"""Trees with leaves that are no arrays, such as the functions in a module: without them, and whole again."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from functrain.tree.arrays import is_array
from functrain.tree.partition import Partition
from functrain.tree.paths import PyTree


def apart(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """A tree without what is no array, and what puts that back.

    >>> arrays, whole = apart({"w": 1.0, "activation": abs})
    >>> arrays, whole({"activation": None, "w": 3.0})
    ({'activation': None, 'w': 1.0}, {'activation': <built-in function abs>, 'w': 3.0})
    """
    leaves, treedef = jax.tree.flatten(tree)
    kept = [is_array(leaf) for leaf in leaves]

    def whole(arrays: PyTree) -> PyTree:
        given = iter(jax.tree.leaves(arrays))
        return jax.tree.unflatten(
            treedef, [next(given) if is_kept else leaf for leaf, is_kept in zip(leaves, kept, strict=True)]
        )

    without = [leaf if is_kept else None for leaf, is_kept in zip(leaves, kept, strict=True)]
    return jax.tree.unflatten(treedef, without), whole


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A partition of whole trees, and what it is of their arrays alone.

    >>> from functrain.tree.partition import partition
    >>> whole = Whole(partition({"w": 1.0, "activation": abs}, {"weights": "w", "static": ...}))
    >>> whole.arrays({"w": 2.0, "activation": abs}), whole.parts.names
    ({'activation': None, 'w': 2.0}, ('weights',))
    >>> whole.tree({"activation": None, "w": 3.0})
    {'activation': <built-in function abs>, 'w': 3.0}
    """

    partition: Partition

    @functools.cached_property
    def parts(self) -> Partition:
        """The partition of the arrays; parts that have none are not there."""
        if not self.partition.rest:
            return self.partition
        leaves = tuple(leaf for leaf in self.partition.leaves if leaf.path not in self.partition.rest)
        names = {leaf.part for leaf in leaves}
        both = zip(self.partition.names, self.partition.selectors, strict=True)
        kept = [(name, selector) for name, selector in both if name in names]
        return Partition(
            names=tuple(name for name, _ in kept),
            leaves=leaves,
            selectors=tuple(selector for _, selector in kept),
            treedef=jax.tree.structure(self._without([0] * len(self.partition.leaves))),
            state=self.partition.state,
        )

    def arrays(self, tree: PyTree) -> PyTree:
        """A whole tree without what is no array; one without it already as it is.

        Raises:
          PartitionError: a tree of another structure.
        """
        if not self.partition.rest or jax.tree.structure(tree) == self.parts.treedef:
            return tree
        self.partition.split(tree)
        return self._without(jax.tree.leaves(tree))

    def tree(self, arrays: PyTree) -> PyTree:
        """The whole tree of these arrays, with what is no array as it was in the tree that was partitioned."""
        if not self.partition.rest:
            return arrays
        given, rest = iter(jax.tree.leaves(arrays)), self.partition.rest
        leaves = [rest[leaf.path] if leaf.path in rest else next(given) for leaf in self.partition.leaves]
        return jax.tree.unflatten(self.partition.treedef, leaves)

    def given_to(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of whole params, and anything else, as one of their arrays."""
        if not self.partition.rest:
            return function

        @functools.wraps(function)
        def of_arrays(params: PyTree, *args: Any, **kwargs: Any) -> Any:
            return function(self.tree(params), *args, **kwargs)

        return of_arrays

    def _without(self, leaves: list[Any]) -> PyTree:
        kept = zip(self.partition.leaves, leaves, strict=True)
        return jax.tree.unflatten(
            self.partition.treedef, [None if leaf.path in self.partition.rest else value for leaf, value in kept]
        )
