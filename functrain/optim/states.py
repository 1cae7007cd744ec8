"""How an optimizer state keeps its form: its structure, its dtypes, and where it lies."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import OptimizerError
from functrain.tree.arrays import as_array, replicated_like
from functrain.tree.paths import structure_difference


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
        path = _path_among(params, keys)
        if path is None or jnp.result_type(leaf) != jnp.result_type(params[path]):
            return leaf
        return jnp.asarray(leaf, wide[path])

    grads = {path: jnp.asarray(grad, wide[path]) for path, grad in grads.items()}
    state, of_params = (jax.tree_util.tree_map_with_path(widened, tree) for tree in (state, dict(params)))
    return grads, state, of_params


def _path_among(params: Mapping[str, Any], keys: tuple[Any, ...]) -> str | None:
    """The parameter that a leaf of a state belongs to: a transform keeps the keys of the flat tree it was given."""
    names = (getattr(key, "key", None) for key in reversed(keys))
    return next((name for name in names if name in params), None)


def like_before(new: Any, old: Any, part: str) -> Any:
    """A state as its transform returned it, with the dtypes of the state before."""
    if differs := structure_difference(new, old):
        raise OptimizerError(
            f"part {part!r}: the state that its transform returns is not of the structure of the one it was given: it"
            f" {differs}; if the state was restored, restore it like optim.init(params)"
        )
    return jax.tree.map(lambda after, before: as_array(after, jnp.result_type(before)), new, old)


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
        path = _path_among(params, keys)
        return shardings[path] if path is not None and leaf.shape == params[path].shape else replicated

    return jax.tree_util.tree_map_with_path(of, state)
