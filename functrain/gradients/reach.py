"""Which leaves a gradient reaches: found when it is traced, and free when it runs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import AuditError
from functrain.tree.model_state import told_of_statistics
from functrain.tree.partition import Partition
from functrain.tree.text import listed
from functrain.tree.warn import warn

_WHY = "it is not used, or cut off by stop_gradient or an operation that has no gradient"


def recording_reach(split: Mapping[str, Mapping[str, Any]], record: Callable[[set[tuple[str, str]]], None]) -> Any:
    """The same split tree; a backward pass through it tells which leaves it has a gradient for.

    >>> found = []
    >>> def loss(split):
    ...     split = recording_reach(split, found.append)
    ...     return split["a"]["w"] * jax.lax.stop_gradient(split["b"]["v"])
    >>> grads = jax.grad(loss)({"a": {"w": 1.0}, "b": {"v": 2.0}})
    >>> found
    [{('a', 'w')}]

    Args:
      split: `{part: {path: leaf}}`.
      record: called with the (part, path) of every leaf whose cotangent is more than the zero that JAX knows of
        when it transposes; not called where all are zero.
    """

    @jax.custom_vjp
    def recorded(split: Any) -> Any:
        return split

    def forward(split: Any) -> tuple[Any, None]:
        return {part: {path: leaf.value for path, leaf in flat.items()} for part, flat in split.items()}, None

    def backward(_: None, cotangents: Any) -> tuple[Any]:
        record({(part, path) for part, flat in cotangents.items() for path, ct in flat.items() if not _is_zero(ct)})
        return (
            jax.tree.map(
                lambda ct: jnp.zeros(ct.shape, ct.dtype) if _is_zero(ct) else ct, cotangents, is_leaf=_is_zero
            ),
        )

    recorded.defvjp(forward, backward, symbolic_zeros=True)
    return recorded(split)


def check_reached(parts: Partition, trained: tuple[str, ...], reached: set[tuple[str, str]], where: str) -> None:
    """Raises for a trained part of which no leaf is reached, and warns of the single leaves that are not.

    Raises:
      AuditError: names the part and its leaves.
    """
    unreached = {part: [path for path in parts.paths(part) if (part, path) not in reached] for part in trained}
    if whole := {part: paths for part, paths in unreached.items() if len(paths) == len(parts.paths(part))}:
        which = " and ".join(f"the trained part {part!r} ({listed(paths)})" for part, paths in whole.items())
        freeze = (
            f"{_WHY}; print(ft.audit(loss_fn, parts, params, batch)) shows what reaches what; freeze"
            f" {'the part' if len(whole) == 1 else 'these parts'}, or write audit=False"
        )
        raise AuditError(
            f"no loss{where} reaches {which}: {told_of_statistics(parts.state, *whole.values()) or freeze}"
        )
    single = [path for paths in unreached.values() for path in paths]
    statistics = told_of_statistics(parts.state, *map(parts.paths, trained))
    if statistics or single:
        no_loss = f"no loss{where} reaches {listed(single)}, which is trained: " if single else ""
        advice = f"{_WHY}; give such leaves a frozen part, or write audit=False"
        warn(f"{no_loss}{statistics or advice}")


def _is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
