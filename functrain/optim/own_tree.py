"""The model's own tree, as the transform of one part is given it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from functrain.tree.partition import Partition
from functrain.tree.paths import Flat, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class ByPart:
    """An extra argument that is another one for each part."""

    of: Mapping[str, Any]


class OwnTree:
    """The model's tree with `optax.MaskedNode()` where leaves of other parts are, as under `optax.multi_transform`.

    Attributes:
      paths: of the part's leaves, in the tree's order.
      named: such a tree, with its path at each leaf.
    """

    def __init__(self, parts: Partition, part: str):
        self._parts = parts
        self._part = part
        self.paths = parts.paths(part)
        self.named = self.masked(jax.tree.unflatten(parts.treedef, [leaf.path for leaf in parts.leaves]))
        self._treedef: Any = jax.tree.structure(self.named)

    def masked(self, whole: PyTree) -> PyTree:
        """The part's tree of a whole one."""
        return self._parts.masked(whole, self._part)

    def nested(self, flat: Mapping[str, Any]) -> PyTree:
        """The part's tree from `{path: leaf}`."""
        return jax.tree.unflatten(self._treedef, [flat[path] for path in self.paths])

    def flat(self, tree: PyTree) -> Flat:
        """The inverse of `nested`.

        Raises:
          ValueError: the tree is of another structure.
        """
        if not self._has_structure(tree):
            raise ValueError(f"{jax.tree.structure(tree)} is not {self._treedef}")
        return dict(zip(self.paths, jax.tree.leaves(tree), strict=True))

    def argument(self, value: Any, params: PyTree) -> Any:
        """An extra argument for the transform: of a tree, its own leaves; a function, as one of its own tree.

        Args:
          value: a tree like params, or a split one, becomes the part's tree. A function of whole params becomes one of
            the part's tree, the other leaves being those of `params`. What is none of these stays as it is.
          params: the whole params.
        """
        if isinstance(value, ByPart):
            return self.argument(value.of[self._part], params)
        if self._is_whole(value):
            return self.masked(value)
        if isinstance(value, Mapping) and isinstance(flat := value.get(self._part), Mapping):
            return self.nested(flat) if flat.keys() == {*self.paths} else value
        return self._function(value, params) if callable(value) else value

    def _has_structure(self, tree: Any) -> bool:
        return bool(jax.tree.structure(tree) == self._treedef)

    def _is_whole(self, tree: Any) -> bool:
        return bool(jax.tree.structure(tree) == self._parts.treedef)

    def _function(self, function: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
        def whole(value: Any) -> Any:
            if not self._has_structure(value):
                return value
            return self._parts.merge({self._part: self.flat(value)}, into=params)

        @functools.wraps(function)
        def of_own_tree(*args: Any, **kwargs: Any) -> Any:
            returned = function(*map(whole, args), **kwargs)
            return self.masked(returned) if self._is_whole(returned) else returned

        return jax.tree_util.Partial(of_own_tree)  # A pytree, which may be handed through lax.cond.


def is_masked(node: Any) -> bool:
    """Whether a node stands for leaves that a transform is not to see."""
    return isinstance(node, optax.MaskedNode)
