"""The leaves of a state by name, and what differs between a saved state and one that is asked for."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import CheckpointError
from functrain.tree.paths import flatten, unflatten
from functrain.update.state import TrainState
from functrain.update.window import Window

FIELDS = ("params", "opt_state", "model_state", "key", "scale_state", "step", "batches", "pending")


def named_leaves(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by name: the field, for an optimizer state the part, and the path.

    >>> state = TrainState({"w": 1.0}, {"all": {"mu": {"w": 2.0}}}, None, None, None, 0, 0, 0, None)
    >>> sorted(named_leaves(state))
    ['batches', 'opt_state/all/mu/w', 'params/w', 'pending', 'step']
    """
    fields = {name: getattr(state, name) for name in FIELDS} | {"window": _window_fields(state.window)}
    return flatten({name: value for name, value in fields.items() if value is not None})


def rebuilt(leaves: Mapping[str, Any], like: TrainState, window: Any) -> TrainState:
    """A state from its leaves by name, of the structure of another one; `window` is from `window_form`."""
    fields = {name: getattr(like, name) for name in FIELDS if getattr(like, name) is not None}
    own = {name: leaf for name, leaf in leaves.items() if not name.startswith("window/")}
    values = dict.fromkeys(FIELDS) | unflatten(own, like=fields)
    values |= {name: np.asarray(values[name], np.int32) for name in ("step", "batches", "pending")}
    return TrainState(**values, window=_window(window, leaves), configuration=like.configuration)


def spec(leaf: Any) -> str:
    """Shape and dtype of a leaf as text: 'float32[3,4]'."""
    return f"{leaf.dtype if hasattr(leaf, 'dtype') else jnp.result_type(leaf)}{list(jnp.shape(leaf))}".replace(" ", "")


def shape_dtype(spec: str) -> tuple[tuple[int, ...], str]:
    """The inverse of `spec`.

    >>> shape_dtype("float32[3,4]"), shape_dtype("key<fry>[]")
    (((3, 4), 'float32'), ((), 'key<fry>'))
    """
    dtype, _, sizes = spec.removesuffix("]").partition("[")
    return tuple(int(size) for size in sizes.split(",") if size), dtype


def fingerprint(state: TrainState) -> dict[str, str]:
    """Name, shape and dtype of every leaf but those of a pending window, whose form follows from the rest."""
    return {name: spec(leaf) for name, leaf in named_leaves(state).items() if not name.startswith("window/")}


def differences(saved: Mapping[str, Any], like: TrainState) -> list[str]:
    """What differs between a saved state and one that is asked for, a line each; none if it can be restored.

    Args:
      saved: with the "leaves" of `fingerprint` and the "configuration" of the state.
      like: arrays or `jax.ShapeDtypeStruct`s.
    """
    before, now = saved["leaves"], fingerprint(like)
    lines = [
        f"{name}: saved as {before[name]}, now {now[name]}"
        for name in before
        if now.get(name, before[name]) != before[name]
    ]
    lines += [f"{name}: saved as {before[name]}, now missing" for name in before if name not in now]
    lines += [f"{name}: not saved, now {now[name]}" for name in now if name not in before]
    return _of_configuration(saved["configuration"], json.loads(like.configuration)) + lines


def _of_configuration(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if not saved or not now:
        return []
    lines = []
    for part, paths in saved["parts"].items():
        gone = [path for path in paths if path not in now["parts"].get(part, ())]
        owner = {path: other for other, others in now["parts"].items() for path in others}
        lines += [f"{path}: saved in part {part!r}, now in {owner[path]!r}" for path in gone if path in owner]
    for part, optimizer in saved["optimizers"].items():
        if now["optimizers"].get(part, optimizer) != optimizer:
            lines.append(f"part {part!r}: saved with the optimizer {optimizer}, now {now['optimizers'][part]}")
    for option in ("accumulate", "phases"):
        if saved[option] != now[option]:
            lines.append(f"{option}: saved as {saved[option]}, now {now[option]}")
    return lines


# A pending window. The form of its metrics is known to the loss function alone, so that it is saved with it.


def _window_fields(window: Window | None) -> Any:
    return None if window is None else {"grads": window.grads, "metrics": window.metrics, "weight": window.weight}


def window_form(window: Window | None) -> Any:
    """The containers of a pending window as JSON, with the name of each leaf in its place.

    Raises:
      CheckpointError: metrics in other containers than dicts, lists and tuples, or with keys that JSON can't hold.
    """
    fields = _window_fields(window)
    if fields is None:
        return None
    names = iter(flatten({"window": fields}))
    return _form(jax.tree.map(lambda _: next(names), fields))


def _form(node: Any) -> Any:
    if isinstance(node, str) or node is None:
        return node
    if type(node) is dict and all(isinstance(name, str | int | float) for name in node):
        return {"dict": [[name, _form(child)] for name, child in node.items()]}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_form(child) for child in node]}
    raise CheckpointError(
        f"the metrics of a pending window hold a {type(node).__name__}, which no checkpoint can name: return metrics in"
        " lists, tuples, and dicts with keys that are strings or numbers"
    )


def _window(form: Any, leaves: Mapping[str, Any]) -> Window | None:
    def built(node: Any) -> Any:
        if isinstance(node, str) or node is None:
            return None if node is None else leaves[node]
        ((kind, children),) = node.items()
        if kind == "dict":
            return {name: built(child) for name, child in children}
        return [built(child) for child in children] if kind == "list" else tuple(built(child) for child in children)

    fields = built(form)
    return None if fields is None else Window(**fields)
