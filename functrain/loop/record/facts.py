"""What was trained, by what, on what: the facts that a record begins with, and how those of two starts differ."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from functrain.auditing.audit import audit
from functrain.loop.record import machine
from functrain.loop.record.masking import Masks
from functrain.loop.record.plainly import plainly
from functrain.optim.describe import described
from functrain.optim.held import settings_in
from functrain.optim.transforms import Frozen
from functrain.tree.partition import Leaf
from functrain.update.state import TrainState
from functrain.update.update import Update

_COMPARED = ("config", "command", "versions", "device", "git", "source", "model")
_LEFT_OUT = ("model/optimizers", "model/audit", "git/dirty", "source/file", "source/left_out", "source/masked")


def facts_of(
    update: Update, state: TrainState, *, name: str, config: Any, folder: Path, masks: Masks
) -> dict[str, Any]:
    """All that is known before the first update, masked.

    Args:
      update: what trains.
      state: which it begins with.
      name: of the run.
      config: the user's, as JSON has it, masked.
      folder: whose commit is meant.
      masks: what must not stand in it.
    """
    facts = {
        "config": config,
        "versions": machine.versions(),
        "device": machine.device(),
        "git": machine.commit(folder),
        "model": model_of(update, state),
    }
    return {"name": name, "command": masks.command(machine.command()), **masks.texts(facts)}


def model_of(update: Update, state: TrainState) -> dict[str, Any]:
    """The parts of a model and their optimizers."""
    optim = update.optim
    settings = {name: settings_in(of_part) for name, of_part in state.opt_state.items()}
    parts = {}
    for part, selector in zip(optim.parts.names, optim.parts.selectors, strict=True):
        leaves = [leaf for leaf in optim.parts.leaves if leaf.part == part]
        transform = optim.all_transforms[part]
        parts[part] = {
            "optimizer": described(transform),
            "hyperparameters": {key: plainly(value) for key, value in settings.get(part, {}).items()},
            "selector": selector,
            "leaves": len(leaves),
            "parameters": sum(map(_size, leaves)),
            "bytes": sum(_size(leaf) * leaf.dtype.itemsize for leaf in leaves if leaf.dtype is not None),
            "trained": not isinstance(transform, Frozen),
        }
    trained = sum(part["parameters"] for part in parts.values() if part["trained"])
    total = sum(part["parameters"] for part in parts.values())
    return {"parts": parts, "parameters": {"total": total, "trained": trained}, "optimizers": str(optim), "audit": None}


def audited(update: Update, state: TrainState, batch: Any) -> str | None:
    """The audit as a table, by tracing alone; None where it can't be made, as of data that is no arrays."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.params)
    try:
        found = audit(
            update.schedule,
            update.optim.parts,
            shapes,
            batch,
            optim=update.optim,
            key=state.key,
            model_state=state.model_state,
        )
    except Exception:  # The loss function is the user's, and what it raises ends no run.
        return None
    return str(found)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What differs between two starts of a run, by key: old and new, None where it was not there.

    >>> changes({"config": {"rate": 0.1}}, {"config": {"rate": 0.2, "width": 8}})
    {'config/rate': [0.1, 0.2], 'config/width': [None, 8]}
    """
    before, now = (dict(_named(each)) for each in (old, new))
    names = dict.fromkeys([*before, *now])
    # What is imported later, or no more, is no other version.
    told = [name for name in names if not name.startswith("versions/") or (name in before and name in now)]
    return {name: [before.get(name), now.get(name)] for name in told if before.get(name) != now.get(name)}


def _named(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []

    def walk(name: str, value: Any) -> None:
        if name in _LEFT_OUT or name.endswith("/hyperparameters"):
            return
        if isinstance(value, Mapping) and value:
            for key, each in value.items():
                walk(f"{name}/{key}", each)
        else:
            found.append((name, value))

    for name in _COMPARED:
        value = facts.get(name)
        walk(name, shlex.join(map(str, value)) if name == "command" and isinstance(value, list) else value)
    return found


def _size(leaf: Leaf) -> int:
    return 0 if leaf.shape is None else math.prod(leaf.shape)
