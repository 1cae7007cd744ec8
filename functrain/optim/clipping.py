"""Gradients scaled down to a norm: of all parts together, of each part, or of each tensor."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from functrain.errors import OptimizerError
from functrain.tree.arrays import global_norm
from functrain.tree.partition import Split
from functrain.tree.scalars import wrong_scalar
from functrain.tree.text import listed

By: TypeAlias = Literal["all", "part", "tensor"]
Norms: TypeAlias = float | Mapping[str, float]


def checked_norms(clip_norm: Norms | None, clip_by: By | None, trained: Sequence[str]) -> tuple[dict[str, float], By]:
    """The largest norm of each part that is clipped, and of what it is the norm.

    Raises:
      OptimizerError: a norm that is none, of an unknown or frozen part, or over all parts where each has its own.
    """
    if clip_by is not None and clip_by not in get_args(By):
        raise OptimizerError(f"clip_by={clip_by!r}: write 'all', 'part' or 'tensor'")
    if clip_norm is None:
        if clip_by is not None:
            raise OptimizerError(f"clip_by={clip_by!r} clips to no norm: add clip_norm=1.0, or leave it out")
        return {}, "all"
    if not isinstance(clip_norm, Mapping):
        _check_norm(clip_norm, f"clip_norm={clip_norm!r}")
        return dict.fromkeys(trained, clip_norm), clip_by or "all"
    if clip_by == "all":
        raise OptimizerError("clip_by='all' is one norm of all parts: write clip_norm=1.0, or clip_by='part'")
    if unknown := [part for part in clip_norm if part not in trained]:
        raise OptimizerError(
            f"clip_norm for {listed(unknown)}, which is frozen or unknown: the trained parts are {listed(trained, 30)}"
        )
    for part, norm in clip_norm.items():
        _check_norm(norm, f"clip_norm of part {part!r} is {norm!r}")
    return dict(clip_norm), clip_by or "part"


def clip_written(clip_norm: Norms | None, clip_by: By | None, trained: Sequence[str]) -> dict[str, Any]:
    """What gradients are clipped to as JSON has it.

    >>> clip_written({"a": 1}, None, ["a", "b"])
    {'clip_norm': {'a': 1.0}, 'clip_by': 'part'}
    """
    norms, by = checked_norms(clip_norm, clip_by, trained)
    if not isinstance(clip_norm, Mapping):
        return {"clip_norm": None if clip_norm is None else float(clip_norm), "clip_by": by}
    return {"clip_norm": {part: float(norm) for part, norm in norms.items()}, "clip_by": by}


def each_norm(groups: Mapping[Any, Split]) -> dict[Any, jax.Array]:
    """The norm of each group of leaves, in float32 or wider."""
    return {name: global_norm(split) for name, split in groups.items()}


def clipped(
    grads: Mapping[str, Mapping[str, Any]], norms: Mapping[str, float], by: By, norms_of: Any = each_norm
) -> Split:
    """The gradients, scaled down to norms that are computed in float32 or wider.

    >>> grads = {"a": {"v": jnp.array([3.0, 4.0]), "w": jnp.array([0.0, 12.0])}}
    >>> {path: grad.tolist() for path, grad in clipped(grads, {"a": 6.5}, "part")["a"].items()}
    {'v': [1.5, 2.0], 'w': [0.0, 6.0]}
    >>> {path: grad.tolist() for path, grad in clipped(grads, {"a": 6.0}, "tensor")["a"].items()}
    {'v': [3.0, 4.0], 'w': [0.0, 6.0]}

    Args:
      grads: split gradients.
      norms: the largest norm, by part; a part without one stays as it is.
      by: of what it is the norm. With "all" every part has the same.
      norms_of: from split trees by any name to their norms.
    """
    if not grads:
        return {}
    if by == "all":
        groups: dict[Any, Split] = {"all": {part: dict(flat) for part, flat in grads.items()}}
    elif by == "part":
        groups = {part: {part: dict(grads[part])} for part in norms if part in grads}
    else:
        groups = {
            (part, path): {part: {path: grad}} for part in norms if part in grads for path, grad in grads[part].items()
        }
    new = {part: dict(flat) for part, flat in grads.items()}
    for name, norm in norms_of(groups).items():
        most = next(iter(norms[part] for part in groups[name] if part in norms))
        scale = jnp.minimum(1.0, most / norm)
        for part, flat in groups[name].items():
            new[part] |= _scaled(flat, scale)
    return new


def _scaled(flat: Mapping[str, Any], scale: jax.Array) -> dict[str, Any]:
    return {path: (grad * scale).astype(jnp.result_type(grad)) for path, grad in flat.items()}


def _check_norm(norm: Any, what: str) -> None:
    if wrong_scalar(norm) or not norm > 0:
        raise OptimizerError(f"{what}: give a positive norm, or None not to clip")
