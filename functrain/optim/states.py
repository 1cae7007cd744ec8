"""How an optimizer state keeps its form: its structure, its dtypes, and where it lies."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey

from functrain.errors import OptimizerError
from functrain.optim.state_form import StateForm
from functrain.tree.arrays import as_array, replicated_like
from functrain.tree.paths import flatten, structure_difference


def in_one_dtype(
    grads: Mapping[str, Any], state: Any, params: Mapping[str, Any]
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """All three with each path's leaves in the dtype that holds both its gradient and its parameter.

    A transform that is given two dtypes returns another state than it was given, or fails. State that is not of its
    parameter's dtype, such as moments kept in 16 bits, stays as it is.
    """
    wide = {
        path: jnp.promote_types(jnp.result_type(grad), jnp.result_type(params[path])) for path, grad in grads.items()
    }

    def widened(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = _parameter_at(keys, params)
        if path is None or jnp.result_type(leaf) != jnp.result_type(params[path]):
            return leaf
        return jnp.asarray(leaf, wide[path])

    grads = {path: jnp.asarray(grad, wide[path]) for path, grad in grads.items()}
    state, of_params = (jax.tree_util.tree_map_with_path(widened, tree) for tree in (state, dict(params)))
    return grads, state, of_params


def parameter_of(names: Sequence[str], paths: Container[str]) -> str | None:
    """The parameter that a leaf of a state belongs to: the one whose path the last name ends with, or one above it.

    >>> parameter_of(["conv/kernel"], {"kernel", "conv/kernel"}), parameter_of(["0/mu/conv/kernel"], {"kernel"})
    ('conv/kernel', 'kernel')

    Args:
      names: the keys of the dicts that the leaf is in, the outermost first; or its name alone, of a checkpoint.
      paths: of the parameters.
    """
    for name in reversed(names):
        segments = name.split("/")
        for begin in range(len(segments)):
            if (path := "/".join(segments[begin:])) in paths:
                return path
    return None


def _parameter_at(keys: tuple[Any, ...], paths: Container[str]) -> str | None:
    return parameter_of([key.key for key in keys if isinstance(key, DictKey) and isinstance(key.key, str)], paths)


def like_before(new: Any, old: Any, form: StateForm, what: str) -> Any:
    """A state of optax's own form in the one that crosses calls, with the dtypes of the state before."""
    if jax.tree.structure(new) != form.own:
        raise OptimizerError(
            f"{what} is not of the structure of the one before: it {structure_difference(new, form.to_own(old))}; if"
            " the state was restored, restore it like optim.init(params)"
        )
    crossing = form.to_cross(new)
    dtypes = [[jnp.result_type(leaf) for leaf in jax.tree.leaves(state)] for state in (crossing, old)]
    for number, (after, before) in enumerate(zip(*dtypes, strict=True)):
        if _kind(after) > _kind(before):
            raise OptimizerError(
                f"{what} holds {list(flatten(crossing))[number]!r} as {after}, where {before} was before: make it of"
                f" that dtype in the transform's init, such as jnp.zeros((), jnp.{after})"
            )
    return jax.tree.map(lambda after, before: as_array(after, jnp.result_type(before)), crossing, old)


def _kind(dtype: Any) -> int:
    """Of two kinds of dtypes the one of the larger number can't be cast to the other without loss of its kind."""
    return 2 if jnp.issubdtype(dtype, jnp.complexfloating) else int(jnp.issubdtype(dtype, jnp.inexact))


def in_place_of(old: Any, new: Any, what: str) -> Any:
    """A state with the shapes of the one before, where that one lies."""

    def placed(after: jax.Array, before: Any) -> jax.Array:
        if after.shape != before.shape:
            raise OptimizerError(f"{what} holds a leaf of shape {after.shape} where one of {before.shape} was: keep it")
        if isinstance(before, jax.core.Tracer) or isinstance(after, jax.core.Tracer):
            return after
        return jax.device_put(after, before.sharding) if before.committed else after

    return jax.tree.map(placed, new, old)


def laid_out(state: Any, params: Mapping[str, Any]) -> Any:
    """The state on the devices of its parameters, so that a compiled step returns it where it was."""
    concrete = all(isinstance(p, jax.Array) and not isinstance(p, jax.core.Tracer) for p in params.values())
    committed = {path: p.sharding for path, p in params.items() if p.committed} if concrete else {}
    if not committed:
        return state
    shardings = {path: committed.get(path) or replicated_like(next(iter(committed.values()))) for path in params}
    return jax.device_put(state, state_shardings(state, params, shardings))


def state_shardings(state: Any, params: Mapping[str, Any], shardings: Mapping[str, Any]) -> Any:
    """A parameter's sharding for each leaf of a state that is named and shaped like it, replicated for the others."""
    replicated = replicated_like(next(iter(shardings.values())))

    def of(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = _parameter_at(keys, params)
        return shardings[path] if path is not None and leaf.shape == params[path].shape else replicated

    return jax.tree_util.tree_map_with_path(of, state)
