"""A checkpoint taken into another partition, or to other optimizers."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.asked import Asked, of_leaves
from functrain.loop.checkpoint.contents import Contents
from functrain.optim.adoption import Adoption, adopted
from functrain.tree.paths import flatten
from functrain.tree.text import listed_lines
from functrain.update.ema import Average, adopted_ema

_PREFIX = "opt_state/"
_EMA = "ema/"


def regrouped(leaves: Mapping[str, Any], contents: Contents, asked: Asked) -> tuple[dict[str, Any], Adoption]:
    """The leaves of a checkpoint for a state of other parts or optimizers, and what became of its optimizer state.

    Args:
      leaves: what was saved, by name.
      contents: what was saved with it.
      asked: the state before the first step, of arrays: what starts anew is as it is there.

    Raises:
      CheckpointError: more differs than parts and optimizers, a window is pending, or the state has no arrays.
    """
    if contents.window is not None:
        raise CheckpointError("regroup=True: a window is pending in the checkpoint: save one at the end of a window")
    if other := [line for line in of_leaves(contents.leaves, asked.specs) if not line.startswith((_PREFIX, _EMA))]:
        raise CheckpointError(
            f"regroup=True is for other parts, optimizers and averages, but more differs:{listed_lines(other)}\nmake"
            " the parameters what they were, or start from params of your own with update.init"
        )
    now = {name: leaf for name, leaf in asked.leaves.items() if name.startswith((_PREFIX, _EMA))}
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in now.values()):
        raise CheckpointError("regroup=True needs the values that new state starts with: like=update.init(params, ...)")
    new_paths, old_paths = asked.configuration["parts"], contents.configuration["parts"]
    before = {name: leaves[name] for name in contents.leaves if name.startswith(_PREFIX)}
    new = {part: flatten(state) for part, state in asked.fields["opt_state"].items()}
    old = _by_part(before, contents.optimizer_leaves or _counted(before, old_paths))
    states, report = adopted(new, old, new_paths, old_paths)
    decays, old_decays = (
        configuration.get("ema", {}) for configuration in (asked.configuration, contents.configuration)
    )
    ema, report = adopted_ema(asked.fields.get("ema", {}), decays, _averages(leaves, old_decays), old_decays, report)
    made = {
        f"{_PREFIX}{part}/{rest}" if rest else f"{_PREFIX}{part}": leaf
        for part, flat in states.items()
        for rest, leaf in flat.items()
    } | flatten({"ema": ema})
    # A moment or an average of another part was restored without knowing where its parameter is.
    placed = {
        name: jax.device_put(leaf, now[name].sharding) if now[name].committed else leaf for name, leaf in made.items()
    }
    return {name: leaf for name, leaf in leaves.items() if not name.startswith((_PREFIX, _EMA))} | placed, report


def _averages(leaves: Mapping[str, Any], decays: Mapping[str, Mapping[str, float]]) -> dict[str, Average]:
    """The averages of a checkpoint, by part."""
    return {
        part: Average(leaves[f"{_EMA}{part}/steps"], {path: leaves[f"{_EMA}{part}/mean/{path}"] for path in of_part})
        for part, of_part in decays.items()
    }


def _by_part(named: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The leaves of optimizer states by part: of one after the other, so many leaves."""
    leaves = iter(named.items())
    return {
        part: {
            name.removeprefix(f"{_PREFIX}{part}").removeprefix("/"): leaf
            for name, leaf in itertools.islice(leaves, count)
        }
        for part, count in counts.items()
    }


def _counted(named: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, int]:
    """The counts by the longest name that fits, for the first checkpoints of this format, which have none."""
    counts: dict[str, int] = {}
    for name in named:
        rest = f"{name.removeprefix(_PREFIX)}/"
        part = max((part for part in parts if rest.startswith(f"{part}/")), key=len)
        counts[part] = counts.get(part, 0) + 1
    return counts
