"""A checkpoint taken into another partition, or to other optimizers."""

from collections.abc import Mapping
from typing import Any

import jax

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.asked import Asked, of_leaves
from functrain.loop.checkpoint.contents import Contents
from functrain.optim.adoption import Adoption, adopted
from functrain.tree.text import listed_lines

_PREFIX = "opt_state/"


def regrouped(leaves: Mapping[str, Any], contents: Contents, asked: Asked) -> tuple[dict[str, Any], Adoption]:
    """The leaves of a checkpoint for a state of other parts or optimizers, and what became of the optimizer state.

    Args:
      leaves: what was saved, by name.
      contents: what was saved with it.
      asked: the state before the first step, of arrays: what starts anew is as it is there.

    Raises:
      CheckpointError: more differs than parts and optimizers, a window is pending, or the state has no arrays.
    """
    if contents.window is not None:
        raise CheckpointError("regroup=True: a window is pending in the checkpoint: save one at the end of a window")
    if other := [line for line in of_leaves(contents, asked) if not line.startswith(_PREFIX)]:
        raise CheckpointError(
            f"regroup=True takes parameters to other parts and optimizers, but more differs:{listed_lines(other)}\nmake"
            " the parameters what they were, or start from params of your own with update.init"
        )
    now = {name: leaf for name, leaf in asked.leaves.items() if name.startswith(_PREFIX)}
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in now.values()):
        raise CheckpointError("regroup=True needs the values that new state starts with: like=update.init(params, ...)")
    new_paths, old_paths = asked.configuration["parts"], contents.configuration["parts"]
    before = {name: leaves[name] for name in contents.leaves if name.startswith(_PREFIX)}
    new, old = _by_part(now, new_paths), _by_part(before, old_paths)
    states, report = adopted(new, old, new_paths, old_paths)
    kept = {name: leaf for name, leaf in leaves.items() if name not in before}
    for part, flat in states.items():
        for rest, leaf in flat.items():
            name = f"{_PREFIX}{part}/{rest}" if rest else f"{_PREFIX}{part}"
            # A moment of another part was restored without knowing where its parameter is.
            kept[name] = jax.device_put(leaf, now[name].sharding) if now[name].committed else leaf
    return kept, report


def _by_part(named: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The leaves of optimizer states by part."""
    split: dict[str, dict[str, Any]] = {}
    for name, leaf in named.items():
        rest = name.removeprefix(_PREFIX)
        part = max((part for part in parts if f"{rest}/".startswith(f"{part}/")), key=len)
        split.setdefault(part, {})[rest.removeprefix(part).removeprefix("/")] = leaf
    return split
