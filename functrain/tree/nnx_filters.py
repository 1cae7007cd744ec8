"""Filters of Flax NNX as selectors: they look at keys and Variables, where a selector looks at paths and leaves."""

import dataclasses
import sys
from typing import Any

from functrain.errors import PartitionError
from functrain.tree.paths import PyTree, is_variable, leaves_of, nodes


def is_filter(selector: Any) -> bool:
    """Whether a selector is a filter of NNX, such as `nnx.PathContains("conv1")`, or a type of its Variables."""
    if isinstance(selector, type):
        nnx = sys.modules.get("flax.nnx")
        return nnx is not None and issubclass(selector, nnx.Variable)
    return type(selector).__module__ == "flax.nnx.filterlib"


@dataclasses.dataclass(frozen=True, repr=False)
class Taken:
    """A filter of NNX as a function of path and leaf.

    Attributes:
      name: of the filter.
      paths: of the leaves that it takes of a tree.
    """

    name: str
    paths: frozenset[str]

    def __call__(self, path: str, leaf: Any) -> bool:
        """Whether it takes the leaf of a path."""
        return path in self.paths

    def __repr__(self) -> str:
        return self.name


def taken(selector: Any, tree: PyTree) -> Taken:
    """What a filter of NNX takes of a tree: what `nnx.state(model, selector)` would.

    Raises:
      PartitionError: it takes nothing, and could not, as the tree holds no Variables.
    """
    name = selector.__name__ if isinstance(selector, type) else repr(selector)
    takes = sys.modules["flax.nnx.filterlib"].to_predicate(selector)
    found = list(nodes(tree))
    mine = [(keys, node) for keys, node in found if takes(tuple(map(_name, keys)), node)]
    if found and not mine and not any(is_variable(node) for _, node in found):
        raise PartitionError(
            f"{name} is a filter of NNX, of Variables, and takes no leaf of this tree, which holds none: give a tree"
            " like nnx.state(model), or select by path, such as 'conv1'"
        )
    return Taken(name, frozenset(path for keys, node in mine for path, _ in leaves_of(keys, node)))


def _name(key: Any) -> Any:
    """What NNX calls a key of a tree."""
    return next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))
