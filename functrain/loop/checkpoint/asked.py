"""What a checkpoint is restored as, and what of a checkpoint differs from it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from functrain.loop.checkpoint.contents import Contents
from functrain.loop.checkpoint.leaves import COUNTERS, WINDOW, leaf_spec, named_fields, named_leaves
from functrain.tree.arrays import committed_sharding, replicated_over
from functrain.update.state import TrainState


@dataclasses.dataclass(frozen=True)
class Asked:
    """The state that is asked for.

    Attributes:
      fields: those of its fields that have leaves, of arrays or `jax.ShapeDtypeStruct`s.
      leaves: its leaves by name.
      specs: their shapes and dtypes by name, but for those of a pending window.
      written_configuration: what its update is made of, as JSON.
      shardings: where its user put each leaf; None where JAX may move it.
      replicated: where what it has no place for goes, over several devices; None over one.
    """

    fields: dict[str, Any]
    leaves: dict[str, Any]
    specs: dict[str, str]
    written_configuration: str
    shardings: dict[str, Any]
    replicated: Any

    @property
    def configuration(self) -> dict[str, Any]:
        """What its update is made of."""
        return dict(json.loads(self.written_configuration))

    @classmethod
    def of(cls, like: TrainState) -> Self:
        """Looks at a state once."""
        leaves = named_leaves(like)
        return cls(
            fields=named_fields(like),
            leaves=leaves,
            specs={name: leaf_spec(leaf) for name, leaf in leaves.items() if not name.startswith(WINDOW)},
            written_configuration=like.configuration,
            shardings={name: committed_sharding(leaf) for name, leaf in leaves.items()},
            replicated=replicated_over(like.params),
        )


def differences(contents: Contents, asked: Asked) -> list[str]:
    """What differs between a checkpoint and the state that is asked for, a line each; none if it can be restored."""
    return of_configuration(contents, asked) + of_leaves(contents.leaves, asked.specs)


def of_leaves(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between leaves of which shape and dtype are given by name, a line each."""
    # Counters may have 32 or 64 bits: any of them is taken.
    before, now = ({name: spec for name, spec in specs.items() if name not in COUNTERS} for specs in (before, now))
    lines = [
        f"{name}: saved as {before[name]}, now {now[name]}"
        for name in before
        if now.get(name, before[name]) != before[name]
    ]
    lines += [f"{name}: saved as {before[name]}, now missing" for name in before if name not in now]
    return lines + [f"{name}: not saved, now {now[name]}" for name in now if name not in before]


def of_configuration(contents: Contents, asked: Asked) -> list[str]:
    """The parts, optimizers and options that are others."""
    saved, now = contents.configuration, asked.configuration
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
    before, after = (_decays(configuration) for configuration in (saved, now))
    for path, decay in before.items():
        if after.get(path, decay) != decay:
            lines.append(f"the average of {path}: saved with the decay {decay}, now {after[path]}")
    return lines


def _decays(configuration: Mapping[str, Any]) -> dict[str, float]:
    """The decay of each leaf that is averaged; checkpoints of before there were averages have none."""
    by_part = configuration.get("ema", {})
    return {path: decay for decays in by_part.values() for path, decay in decays.items()}


def places(contents: Contents, asked: Asked) -> dict[str, Any]:
    """The sharding of each leaf: where the state that is asked for has it; None where JAX may move it, as in there."""
    here = dict(asked.shardings)
    for part, paths in contents.configuration.get("parts", {}).items():
        here |= {f"{WINDOW}grads/{part}/{path}": here.get(f"params/{path}") for path in paths}
    return {name: here.get(name) or asked.replicated for name in contents.specs}
