"""What an optimizer state takes over from another one, of other parts or other transforms."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functrain.optim.states import parameter_of
from functrain.optim.transforms import state_name
from functrain.tree.partition import Partition
from functrain.tree.paths import Flat, flatten, unflatten
from functrain.tree.text import leaves_in_words

# The new optimizer's own: of with_lr, and of with_state.
_RATES = {"learning_rate", "setting"}
_HELD = {"hyperparameters", "settings"}


@dataclasses.dataclass(frozen=True)
class Adoption:
    """What was taken over; `print(it)` is a report, a line for each field of each part.

    Attributes:
      carried: `{part: {field: number of leaves}}`, of the new parts, what they have from the old ones.
      anew: the same of what starts anew.
      dropped: the same of the old parts, of what no new part has.
      sources: `{part: old parts}` that its carried leaves come from.
    """

    carried: dict[str, dict[str, int]]
    anew: dict[str, dict[str, int]]
    dropped: dict[str, dict[str, int]]
    sources: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = []
        for part, fields in self.carried.items():
            origin = ", ".join(repr(source) for source in self.sources[part])
            lines.append(f"{part}: carried over from {origin}: {_in_words(fields)}")
        lines += [f"{part}: started anew: {_in_words(fields)}" for part, fields in self.anew.items()]
        lines += [f"{part}: dropped: {_in_words(fields)}" for part, fields in self.dropped.items()]
        return "\n".join(lines) or "there was nothing to carry over"


class _Entry(NamedTuple):
    part: str
    name: str
    field: str
    path: str | None
    leaf: Any


def adopted(
    new: Mapping[str, Flat],
    old: Mapping[str, Flat],
    new_paths: Mapping[str, Sequence[str]],
    old_paths: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Flat], Adoption]:
    """New optimizer states with what fits of old ones.

    >>> states, report = adopted(
    ...     {"head": {"mu/w": 0.0, "count": 0}, "body": {"mu/v": 0.0, "count": 0}},
    ...     {"all": {"mu/w": 1.0, "mu/v": 2.0, "count": 3}},
    ...     {"head": ["w"], "body": ["v"]}, {"all": ["w", "v"]},
    ... )
    >>> states
    {'head': {'mu/w': 1.0, 'count': 3}, 'body': {'mu/v': 2.0, 'count': 3}}
    >>> print(report)
    head: carried over from 'all': mu (1 leaf), count (1 leaf)
    body: carried over from 'all': mu (1 leaf), count (1 leaf)

    A leaf of a parameter follows its path, where the other state has a field of the same name and shape for it. A
    scalar, such as a count, follows if all parameters of the part come from one old part. A rate is the new
    optimizer's own, as every hyperparameter that is state. A part of the same leaves and the same state is carried over
    as it is, but for these.

    Args:
      new: `{part: {name: leaf}}`, initial states, flat, of the trained parts.
      old: the same of the other optimizer.
      new_paths: the parameters of each new part.
      old_paths: the parameters of each old part.
    """
    states: dict[str, Flat] = {}
    report = Adoption({}, {}, {}, {})
    # Of other transforms of the parts, those of one name are an optimizer of their own.
    now, before = _by_suffix(new, new_paths), _by_suffix(old, old_paths)
    for suffix in {**now, **before}:
        made, of_these = _adopted(now.get(suffix, {}), before.get(suffix, {}), new_paths, old_paths)
        states |= _suffixed(made, suffix)
        report = Adoption(
            carried=report.carried | _suffixed(of_these.carried, suffix),
            anew=report.anew | _suffixed(of_these.anew, suffix),
            dropped=report.dropped | _suffixed(of_these.dropped, suffix),
            sources=report.sources
            | {part + suffix: tuple(each + suffix for each in of) for part, of in of_these.sources.items()},
        )
    return states, report


def _suffixed(by_part: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    return {part + suffix: value for part, value in by_part.items()}


def _by_suffix(states: Mapping[str, Flat], parts: Collection[str]) -> dict[str, dict[str, Flat]]:
    """States by part, for each "@name" of other transforms that there is; of the parts' own it is empty."""
    found: dict[str, dict[str, Flat]] = {"": {}}
    for name, flat in states.items():
        part = name if name in parts else next(part for part in parts if name.startswith(state_name(part, "")))
        found.setdefault(name.removeprefix(part), {})[part] = flat
    return found


def _adopted(
    new: Mapping[str, Flat],
    old: Mapping[str, Flat],
    new_paths: Mapping[str, Sequence[str]],
    old_paths: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Flat], Adoption]:
    entries = [entry for part, flat in old.items() for entry in _entries(part, flat, old_paths[part])]
    owner = {path: part for part in old for path in old_paths[part]}
    used: set[tuple[str, str]] = set()
    states: dict[str, Flat] = {}
    carried: dict[str, dict[str, int]] = {}
    anew: dict[str, dict[str, int]] = {}
    sources: dict[str, dict[str, None]] = {}
    for part, flat in new.items():
        origins = {owner.get(path) for path in new_paths[part]}
        source = next(iter(origins)) if len(origins) == 1 else None
        same = (
            source is not None
            and _shapes_and_dtypes(old[source]) == _shapes_and_dtypes(flat)
            and set(old_paths[source]) == set(new_paths[part])
        )
        states[part] = {}
        for entry in _entries(part, flat, new_paths[part]):
            found = _match(entry, entries, source, same)
            if found is None:
                # An initial state may hold the very arrays of the params, or one array twice.
                states[part][entry.name] = _as(entry.leaf, entry.leaf, copy=True)
                _count(anew, part, entry.field)
            else:
                # A count that goes to two parts becomes two arrays, as each will be donated.
                again = (found.part, found.name) in used
                states[part][entry.name] = _as(found.leaf, entry.leaf, copy=again)
                used.add((found.part, found.name))
                _count(carried, part, entry.field)
                sources.setdefault(part, {})[found.part] = None
    dropped: dict[str, dict[str, int]] = {}
    for entry in entries:
        if (entry.part, entry.name) not in used:
            _count(dropped, entry.part, entry.field)
    return states, Adoption(carried, anew, dropped, {part: tuple(names) for part, names in sources.items()})


def adopted_states(
    new: Mapping[str, Any], old: Mapping[str, Any], parts: Partition, old_parts: Partition
) -> tuple[dict[str, Any], Adoption]:
    """As `adopted`, of states as an optimizer has them, and the partitions of their params."""
    states, report = adopted(
        {part: flatten(state) for part, state in new.items()},
        {part: flatten(state) for part, state in old.items()},
        {part: parts.paths(part) for part in parts.names},
        {part: old_parts.paths(part) for part in old_parts.names},
    )
    return {part: unflatten(flat, like=new[part]) for part, flat in states.items()}, report


def _entries(part: str, flat: Flat, paths: Sequence[str]) -> list[_Entry]:
    """The leaves of a state with their field, the last name before the parameter's path."""
    found = []
    known = frozenset(paths)
    for name, leaf in flat.items():
        of = parameter_of([name], known)
        prefix = name if of is None else name.removesuffix(of).removesuffix("/")
        *_, before, last = "", *prefix.split("/")
        found.append(_Entry(part, name, before if before in _HELD else last or "state", of, leaf))
    return found


def _match(entry: _Entry, entries: Sequence[_Entry], source: str | None, same: bool) -> _Entry | None:
    """The old leaf that a new one takes over."""
    if entry.field in _HELD | _RATES:
        return None
    if same:
        return next(old for old in entries if (old.part, old.name) == (source, entry.name))
    if entry.path is None and source is None:
        return None
    fits = [
        old for old in entries
        if (old.field, old.path) == (entry.field, entry.path)
        and jnp.shape(old.leaf) == jnp.shape(entry.leaf)
        and (entry.path is not None or old.part == source)
    ]  # fmt: skip
    alike = [old for old in fits if old.name == entry.name] or fits
    if not alike or (len(alike) > 1 and any(not np.array_equal(alike[0].leaf, other.leaf) for other in alike[1:])):
        return None
    return alike[0]


def _as(leaf: Any, like: Any, *, copy: bool) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    if leaf.dtype != like.dtype:
        return leaf.astype(like.dtype)
    return jnp.array(leaf, copy=True) if copy else leaf


def _shapes_and_dtypes(flat: Flat) -> dict[str, Any]:
    return {name: (jnp.shape(leaf), jnp.result_type(leaf)) for name, leaf in flat.items()}


def _count(counts: dict[str, dict[str, int]], part: str, field: str) -> None:
    of_part = counts.setdefault(part, {})
    of_part[field] = of_part.get(field, 0) + 1


def _in_words(fields: Mapping[str, int]) -> str:
    return ", ".join(f"{field} ({leaves_in_words(count)})" for field, count in fields.items())
