"""What crosses a call in the place of an optax state: the same, but flat wherever it has the model's structure."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functrain.optim.own_tree import OwnTree, is_masked
from functrain.tree.paths import Flat, PyTree


class StateForm:
    """The two forms of the state of a part: optax's own, and the one that crosses calls.

    Nested trees are slow to hand to a compiled function. In the form that crosses a call each subtree of the model's
    structure (moments, for one) is `{path: leaf}`, without what is masked.

    Attributes:
      own: the structure of optax's own state.
      crossing: the structure of the state that crosses a call.
      shapes: the state that crosses a call, as shapes.
      looks_ahead: whether it is one of `optax.lookahead`, which is given gradients of the fast parameters alone.
    """

    def __init__(self, init: Callable[[Any], Any], tree: OwnTree, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        state = jax.eval_shape(init, tree.nested(shapes))
        self.own: Any
        self.crossing: Any
        leaves, self.own = jax.tree.flatten(state)
        self.looks_ahead = isinstance(tree.named, optax.LookaheadParams) and _has_lookahead(state)
        self._outline = _outline(init, state, tree, shapes)
        self.shapes = jax.tree.map(
            lambda node: node.flat if _is_found(node) else node, self._outline, is_leaf=_is_found
        )
        numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        crossing, self.crossing = jax.tree.flatten(self.shapes)
        self._order = [numbers[id(leaf)] for leaf in crossing]
        self._back = sorted(range(len(crossing)), key=self._order.__getitem__)

    def to_own(self, state: Any) -> Any:
        """Optax's own state, from one that crosses a call."""
        leaves = jax.tree.leaves(state)
        return jax.tree.unflatten(self.own, [leaves[number] for number in self._back])

    def to_cross(self, state: Any) -> Any:
        """The inverse of `to_own`, for a state of the structure `own`."""
        leaves = jax.tree.leaves(state)
        return jax.tree.unflatten(self.crossing, [leaves[number] for number in self._order])

    def with_placeholder(self, placeholder: Any) -> Any:
        """The state with a placeholder where it has the model's structure, as `optax.tree_map_params` asks for."""
        return jax.tree.map(lambda node: placeholder if _is_found(node) else 0, self._outline, is_leaf=_is_found)


@functools.cache
def placeholder_type() -> type:
    """The type of what `optax.tree_map_params` gives to `init` in the place of params."""
    given: list[Any] = []
    optax.tree_utils.tree_map_params(given.append, lambda leaf: leaf, None)
    return type(given[0])


class _Found(NamedTuple):
    """A subtree of a state that has the model's structure."""

    flat: Flat


def _is_found(node: Any) -> bool:
    return isinstance(node, _Found)


def _outline(init: Callable[[Any], Any], state: Any, tree: OwnTree, shapes: Mapping[str, Any]) -> Any:
    """The state with the subtrees that have the model's structure as `_Found`."""

    def marked(node: Any) -> Any:
        flat = _by_path(node, tree)
        return node if flat is None else _Found(flat)

    def looks_like_the_model(node: Any) -> bool:
        return _clearly_by_path(node, tree, shapes) is not None

    found: list[Any] = []
    try:
        # Within `eval_shape`, as init makes arrays.
        jax.eval_shape(
            lambda: found.append(optax.tree_utils.tree_map_params(init, marked, state, is_leaf=lambda _: True))
        )
    except Exception:  # An init of anyone's, which may need leaves to look at: then by structure alone.
        return jax.tree.map(
            lambda node: marked(node) if looks_like_the_model(node) else node, state, is_leaf=looks_like_the_model
        )
    return found[0]


def _by_path(node: Any, tree: OwnTree) -> Flat | None:
    """The leaves of a subtree by path, or what it has in their place; None if it is not like the model's tree."""
    for named in _structures(tree):
        entries = _entries(node, named)
        if entries is not None and (flat := {path: entry for path, entry in entries if not is_masked(entry)}):
            return flat
    return None


def _structures(tree: OwnTree) -> list[PyTree]:
    """The trees of names that a state may have copies of."""
    if isinstance(tree.named, optax.LookaheadParams):
        return [tree.named, tree.named.fast]
    return [tree.named]


def _entries(node: Any, named: PyTree) -> list[tuple[Any, Any]] | None:
    """Pairs of a path and what a subtree has in the place of its leaf."""
    structure: Any
    paths, structure = jax.tree.flatten(named)
    try:
        return list(zip(paths, structure.flatten_up_to(node), strict=True))
    except (ValueError, TypeError):
        pass
    # A mask that is a prefix of the tree leaves a MaskedNode in the place of a whole subtree.
    leaves, structure = jax.tree.flatten(node, is_leaf=is_masked)
    try:
        entries = list(zip(structure.flatten_up_to(named), leaves, strict=True))
    except (ValueError, TypeError):
        return None
    return entries if all(isinstance(path, str) or is_masked(entry) for path, entry in entries) else None


def _clearly_by_path(node: Any, tree: OwnTree, shapes: Mapping[str, Any]) -> Flat | None:
    """As `_by_path`, where a node that only happens to be of that structure is none."""
    flat = _by_path(node, tree)
    if flat is None:
        return None
    if isinstance(tree.named, str):  # The model is one array, and so is every leaf of a state.
        of = shapes[tree.named]
        is_one = isinstance(node, jax.ShapeDtypeStruct) and (node.shape, node.dtype) == (of.shape, of.dtype)
        return flat if is_one and jnp.issubdtype(node.dtype, jnp.inexact) else None
    # The state of a chain is a tuple too, but not of arrays.
    is_generic = type(tree.named) in (tuple, list)
    return None if is_generic and not all(jax.tree_util.all_leaves([entry]) for entry in flat.values()) else flat


def _has_lookahead(state: Any) -> bool:
    def is_one(node: Any) -> bool:
        return isinstance(node, optax.LookaheadState)

    return any(map(is_one, jax.tree.leaves(state, is_leaf=is_one)))
