"""The leaves of a state by name, and their shapes and dtypes as text."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functrain.errors import CheckpointError
from functrain.tree.paths import flatten
from functrain.update.state import TrainState
from functrain.update.window import Window

FIELDS = ("params", "opt_state", "model_state", "key", "scale_state", "ema", "step", "batches", "pending")
COUNTERS = ("step", "batches", "pending")
WINDOW = "window/"
_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


def named_leaves(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by name: the field, for an optimizer state the part, and the path.

    >>> state = TrainState({"w": 1.0}, {"all": {"mu": {"w": 2.0}}}, None, None, None, None, 0, 0, 0, None)
    >>> sorted(named_leaves(state))
    ['batches', 'opt_state/all/mu/w', 'params/w', 'pending', 'step']
    """
    return flatten(named_fields(state) | ({} if state.window is None else {"window": _window_fields(state.window)}))


def named_fields(state: TrainState) -> dict[str, Any]:
    """The fields of a state that have leaves, but for a pending window."""
    return {name: getattr(state, name) for name in FIELDS if getattr(state, name) is not None}


def leaf_spec(leaf: Any) -> str:
    """Shape and dtype of a leaf as text: 'float32[3,4]'."""
    return _spec(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf), jnp.shape(leaf))


@functools.lru_cache(4096)  # Most leaves have the form of another one, and numpy takes long to name a dtype.
def _spec(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}".replace(" ", "")


class KeyKind(NamedTuple):
    """A kind of random keys.

    Attributes:
      dtype: of arrays of them.
      implementation: its name in JAX.
      shape: of the uint32 that one of them consists of.
    """

    dtype: Any
    implementation: str
    shape: tuple[int, ...]


@functools.cache
def key_kinds() -> dict[str, KeyKind]:
    """The kinds of random keys by the name of their dtype: 'key<fry>'."""
    kinds = {}
    for implementation in _IMPLEMENTATIONS:
        key = jax.eval_shape(functools.partial(jax.random.key, 0, impl=implementation))
        kinds[str(key.dtype)] = KeyKind(key.dtype, implementation, jax.eval_shape(jax.random.key_data, key).shape)
    return kinds


# A pending window. The form of its metrics is known to the loss function alone, so that it is saved with it.


def window_containers(window: Window | None) -> Any:
    """The containers of a pending window as JSON, with the name of each leaf in its place.

    Raises:
      CheckpointError: metrics in other containers than dicts, lists and tuples, or with keys that JSON can't hold.
    """
    fields = _window_fields(window)
    if fields is None:
        return None
    names = iter(flatten({"window": fields}))
    return _containers(jax.tree.map(lambda _: next(names), fields))


def _window_fields(window: Window | None) -> Any:
    return None if window is None else {"grads": window.grads, "metrics": window.metrics, "weight": window.weight}


def _containers(node: Any) -> Any:
    if isinstance(node, str) or node is None:
        return node
    if type(node) is dict and all(isinstance(name, str | int | float) for name in node):
        return {"dict": [[name, _containers(child)] for name, child in node.items()]}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_containers(child) for child in node]}
    raise CheckpointError(
        f"the metrics of a pending window hold a {type(node).__name__}, which no checkpoint can name: return metrics in"
        " lists, tuples, and dicts with keys that are strings or numbers"
    )


def window_of(containers: Any, leaves: Mapping[str, Any]) -> Window | None:
    """The inverse of `window_containers`: a window of leaves by name."""

    def filled(node: Any) -> Any:
        if isinstance(node, str) or node is None:
            return None if node is None else leaves[node]
        ((kind, children),) = node.items()
        if kind == "dict":
            return {name: filled(child) for name, child in children}
        return [filled(child) for child in children] if kind == "list" else tuple(filled(child) for child in children)

    fields = filled(containers)
    return None if fields is None else Window(**fields)
