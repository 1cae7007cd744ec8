"""What a checkpoint is restored as, and what of a checkpoint differs from it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from functrain.loop.checkpoint.contents import Contents
from functrain.loop.checkpoint.leaves import COUNTERS, WINDOW, leaf_spec, named_fields, named_leaves
from functrain.optim.describe import Makeup, changed, outlines
from functrain.tree.arrays import committed_sharding, replicated_over
from functrain.update.packed import as_it_was
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
        """Looks at a state once, which may be one that was consumed."""
        like = as_it_was(like)
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
    for part, (before, after) in _optimizers(contents, asked).items():
        lines.append(f"part {part!r}: saved with the optimizer {before}, now {after}")
    for option in ("accumulate", "phases"):
        if saved[option] != now[option]:
            lines.append(f"{option}: saved as {saved[option]}, now {now[option]}")
    decays, new_decays = (_decays(configuration) for configuration in (saved, now))
    for path, decay in decays.items():
        if new_decays.get(path, decay) != decay:
            lines.append(f"the average of {path}: saved with the decay {decay}, now {new_decays[path]}")
    return lines


def _optimizers(contents: Contents, asked: Asked) -> dict[str, tuple[str, str]]:
    """The names of the optimizers that are others, before and now, by part."""
    found = {}
    for part, (old, new) in _makeups(contents, asked).items():
        if (names := outlines(old, new)) and (contents.is_of_this_optax or old[0] != new[0]):
            found[part] = names
    saved, now = contents.configuration["optimizers"], asked.configuration["optimizers"]
    if "makeup" not in contents.configuration:  # Of before there was one: the name of the outermost alone.
        found |= {part: (saved[part], now[part]) for part in saved if now.get(part, saved[part]) != saved[part]}
    return found


def _makeups(contents: Contents, asked: Asked) -> dict[str, tuple[Makeup, Makeup]]:
    saved, now = contents.configuration.get("makeup", {}), asked.configuration.get("makeup", {})
    return {part: (made, now[part]) for part, made in saved.items() if part in now}


def of_numbers(contents: Contents, asked: Asked) -> tuple[str, ...]:
    """The numbers of optimizers that are others, a line each: a run goes on with the new ones."""
    lines = []
    for part, (old, new) in _makeups(contents, asked).items():
        if not outlines(old, new):
            lines += [f"part {part!r}: {line}" for line in changed(old, new)]
    saved, now = contents.configuration.get("clip", {}), asked.configuration.get("clip", {})
    lines += [f"{name} was {saved[name]}, is now {now[name]}" for name in saved if now.get(name) != saved[name]]
    before, after = (each.configuration.get("frozen_until", {}) for each in (contents, asked))
    for part in {**before, **after}:
        if part in contents.configuration.get("parts", ()) and before.get(part) != after.get(part):
            lines.append(f"part {part!r} {_joins(before.get(part), 'was')}, {_joins(after.get(part), 'is now')}")
    return tuple(lines)


def _joins(step: int | None, verb: str) -> str:
    return f"{verb} trained from the first step" if step is None else f"{verb} frozen until step {step}"


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
