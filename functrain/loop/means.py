"""The numbers of training between two rows of the log: weighted means, summed on the device."""

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functrain.loop.logs import flattened
from functrain.loop.names import named_values
from functrain.tree.arrays import wide
from functrain.update.metrics import KnownWeight, Metrics

_AT_ONCE = 32  # Updates whose metrics are kept before one program adds them all.
_COUNTED = ("skipped", "nonfinite")
_OF_THE_LAST = ("loss_scale", "parts")  # Measured at one update, or set from it on.
_NUMBERS = (jnp.floating, jnp.integer, jnp.bool_)

Layout: TypeAlias = tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[str, ...]]
"""The names and shapes of what is averaged, and the names of what is counted."""


class Sums(NamedTuple):
    """What was added up of updates whose metrics have one layout, a pytree.

    Attributes:
      updates: how many the mean is of.
      weight: the sum of their weights.
      mean: so far, all numbers in one vector.
      counts: in how many updates each that is counted was not 0.
    """

    updates: Any
    weight: Any
    mean: Any
    counts: Any


class Means:
    """The metrics of a run since its last row; nothing is read from the device before it is asked for.

    Args:
      phases: of the update, by name; one without a name where there are none.
    """

    def __init__(self, phases: Sequence[str]) -> None:
        self._phases = {name: _OfPhase(f"{name}/" if name else "") for name in phases}
        self._alone = self._phases.get("")

    def add(self, metrics: Metrics, weights: Any) -> None:
        """Takes in what a call returned that made a step."""
        if self._alone is not None:
            self._alone.add(metrics, weights)
            return
        for name, of_phase in metrics.items():
            self._phases[name].add(of_phase, weights[name])

    @property
    def has_new(self) -> bool:
        """Whether a step was made since the last row."""
        return any(phase.has_new for phase in self._phases.values())

    def row(self) -> dict[str, float]:
        """The numbers of a row, by name; the next row begins after them.

        Means, "mean_of_updates" beside them, counts of what was skipped, and what was measured at the last update. A
        phase that has made no step since its last row has the numbers of that one, and "mean_of_updates" 0.

        Raises:
          LogError: a metric is no number, or a large array.
        """
        return {name: value for phase in self._phases.values() for name, value in phase.row().items()}

    def last(self) -> dict[str, float]:
        """The metrics of the last update alone, of every phase, by name.

        Raises:
          LogError: a metric is no number, or a large array.
        """
        return {name: value for phase in self._phases.values() for name, value in phase.last().items()}

    def alone(self) -> dict[str, float]:
        """Those of them of which a row has means."""
        return {name: value for phase in self._phases.values() for name, value in phase.alone().items()}

    def so_far(self) -> dict[str, Any]:
        """The means since the last row, by name."""
        return {name: mean for phase in self._phases.values() for name, mean in phase.summed()[0].items()}

    def state(self) -> dict[str, Any]:
        """What JSON can hold of it: all of it but the last metrics."""
        return {name: phase.state() for name, phase in self._phases.items()}

    def load(self, saved: Mapping[str, Any], last: Mapping[str, float]) -> None:
        """Goes on from what was saved, and from the last metrics by name."""
        for name, phase in self._phases.items():
            phase.load(saved.get(name, {}), last)


class _OfPhase:
    """The same of one phase.

    Args:
      prefix: of what its numbers are called.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._newest: Metrics = {}
        self._calls: list[tuple[Metrics, Any]] = []  # Not in the sums yet,
        self._updates = 0  # and how many updates they are.
        self._sums: dict[Layout, Sums] = {}
        self._summed: tuple[dict[str, Any], dict[str, int], int] | None = None  # As of now.
        self._shown: dict[str, float] = {}  # In the last row.

    def add(self, metrics: Metrics, weight: Any) -> None:
        self._newest, self._summed = metrics, None
        self._calls.append((metrics, weight))
        self._updates += _updates(metrics)
        if self._updates >= _AT_ONCE:
            self._add_up()

    @property
    def has_new(self) -> bool:
        return bool(self._calls or self._sums)

    def row(self) -> dict[str, float]:
        if self.has_new:
            means, counts, updates = self.summed()
            self._shown = {**self.last(), **flattened(means), **counts, f"{self._prefix}mean_of_updates": updates}
            self._sums, self._summed = {}, None
            return self._shown
        shown = self._shown or self.last()
        return {**shown, f"{self._prefix}mean_of_updates": 0} if shown else {}

    def last(self) -> dict[str, float]:
        newest = self._newest
        if np.ndim(newest.get("loss", 0)):
            newest = jax.tree.map(lambda leaf: leaf[-1], newest)
        return {f"{self._prefix}{name}": value for name, value in flattened(newest).items()}

    def alone(self) -> dict[str, float]:
        others = tuple(f"{self._prefix}{name}/" for name in (*_COUNTED, *_OF_THE_LAST))
        return {name: value for name, value in self.last().items() if not f"{name}/".startswith(others)}

    def summed(self) -> tuple[dict[str, Any], dict[str, int], int]:
        """Means and counts since the last row, by name, and the number of updates; no mean of what weighs nothing."""
        if self._summed is None:
            self._summed = self._fetched()
        return self._summed

    def _fetched(self) -> tuple[dict[str, Any], dict[str, int], int]:
        self._add_up()
        means: dict[str, tuple[float, Any]] = {}
        counts: dict[str, int] = {}
        fetched: dict[Layout, Sums] = jax.device_get(self._sums)
        for (averaged, counted), sums in fetched.items():
            for name, mean in _by_name(averaged, sums.mean):
                before, weight = means.get(name), float(sums.weight)
                if before is None and weight:
                    means[name] = weight, mean
                elif before is not None and weight:  # Metrics that other updates, with other ones beside, had too.
                    total = before[0] + weight
                    means[name] = total, before[1] + (mean - before[1]) * (weight / total)
            for name, count in zip(counted, sums.counts, strict=True):
                counts[f"{self._prefix}{name}"] = counts.get(f"{self._prefix}{name}", 0) + int(count)
        updates = sum(int(sums.updates) for sums in fetched.values())
        return {f"{self._prefix}{name}": mean for name, (_, mean) in means.items()}, counts, updates

    def state(self) -> dict[str, Any]:
        self._add_up()
        fetched: dict[Layout, Sums] = jax.device_get(self._sums)
        sums = [[layout, *(np.asarray(each).tolist() for each in sums)] for layout, sums in fetched.items()]
        return {"sums": sums, "shown": self._shown}

    def load(self, saved: Mapping[str, Any], last: Mapping[str, float]) -> None:
        named = (name for name in last if name.startswith(self._prefix))
        self._newest = {name.removeprefix(self._prefix): last[name] for name in named}
        self._shown = dict(saved.get("shown", {}))
        for (averaged, counted), updates, *numbers in saved.get("sums", ()):
            layout = tuple((name, tuple(shape)) for name, shape in averaged), tuple(counted)
            weight, mean, counts = map(np.asarray, numbers)
            self._sums[layout] = Sums(np.int32(updates), weight, mean, counts.astype(np.int32))

    def _add_up(self) -> None:
        """Adds to the sums what is not in them yet."""
        calls, self._calls, self._updates = self._calls, [], 0
        added = [_added_up(metrics) for metrics, _ in calls]
        for _, group in itertools.groupby(zip(_forms(added), added, calls, strict=True), key=operator.itemgetter(0)):
            _, metrics, of_group = zip(*group, strict=True)
            weights = [weight for _, weight in of_group]
            layout = _layout(metrics[0])
            self._sums[layout] = _with(self._sums.get(layout) or _none(layout), metrics, weights)


def _updates(metrics: Metrics) -> int:
    """How many updates these metrics are of, on a leading axis where there are several."""
    shape: tuple[int, ...] = metrics["loss"].shape
    return shape[0] if shape else 1


def _added_up(metrics: Metrics) -> Metrics:
    if metrics.keys().isdisjoint(_OF_THE_LAST):
        return metrics
    return {name: each for name, each in metrics.items() if name not in _OF_THE_LAST}


def _forms(metrics: Sequence[Metrics]) -> list[Any]:
    """Of the metrics of each call, structure and shapes."""
    leaves, structure = jax.tree.flatten(metrics)
    each_call: list[Any] = structure.children()  # type: ignore[attr-defined]
    shapes = iter([leaf.shape for leaf in leaves])
    return [(each, [*itertools.islice(shapes, each.num_leaves)]) for each in each_call]


def _layout(metrics: Metrics) -> Layout:
    averaged, counted = _sorted(metrics)
    skip = metrics["loss"].ndim
    return tuple((name, each.shape[skip:]) for name, each in averaged), tuple(name for name, _ in counted)


def _sorted(metrics: Metrics) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """What is averaged, and what is counted, by name, in an order of its own; what is no number is neither."""
    elements = (element for name, value in named_values(metrics) for element in _elements(name, value))
    named = sorted((each for each in elements if _is_number(each[1])), key=lambda each: each[0])
    return [each for each in named if not _is_counted(each[0])], [each for each in named if _is_counted(each[0])]


def _elements(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The numbers of a list, called as a row calls them; a number as it is."""
    if isinstance(value, list | tuple):
        yield from ((f"{name}/{i}", each) for i, each in enumerate(value))
    else:
        yield name, value


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and any(jnp.issubdtype(leaf.dtype, kind) for kind in _NUMBERS)


def _is_counted(name: str) -> bool:
    return name.partition("/")[0] in _COUNTED


def _none(layout: Layout) -> Sums:
    averaged, counted = layout
    size = sum(math.prod(shape) for _, shape in averaged)
    return Sums(np.int32(0), np.float32(0), np.zeros(size, np.float32), np.zeros(len(counted), np.int32))


def _by_name(averaged: tuple[tuple[str, tuple[int, ...]], ...], mean: np.ndarray) -> Iterator[tuple[str, Any]]:
    """The numbers of a vector, shaped as the metrics are."""
    begin = 0
    for name, shape in averaged:
        yield name, mean[begin : begin + math.prod(shape)].reshape(shape)
        begin += math.prod(shape)


def _with(sums: Sums, metrics: Sequence[Metrics], weights: Sequence[Any]) -> Sums:
    """The sums, and some calls more. One program is for all numbers of them, so that the bits are, too."""
    count, most = len(metrics), -(-_AT_ONCE // _updates(metrics[0]))
    left, known = most - count, np.zeros(most, np.float32)
    known[:count] = [weight.value if isinstance(weight, KnownWeight) else 1 for weight in weights]
    given: list[Any] | None = None
    if not all(isinstance(weight, KnownWeight) for weight in weights):
        given = [np.float32(1) if isinstance(weight, KnownWeight) else weight for weight in weights]
        given += [given[-1]] * left
    added: Sums = _added(sums, (*metrics, *[metrics[-1]] * left), given, known, np.int32(count))
    return added


@jax.jit
def _added(sums: Sums, metrics: tuple[Metrics, ...], given: Any, known: Any, count: Any) -> Sums:
    """The sums, and of the calls the first `count` more, update by update: a mean as it goes does not overflow."""
    columns = [_sorted(each) for each in jax.tree.map(_on_all, metrics)]
    updates = _updates(metrics[0])
    values, counted = ([_row(named, updates) for named in of_kind if named] for of_kind in zip(*columns, strict=True))
    numbers = jnp.concatenate(values)
    is_taken = jnp.repeat(jnp.arange(len(metrics)) < count, updates)
    weights, counts = jnp.repeat(known, updates), sums.counts
    if given is not None:
        weights *= jnp.concatenate([jnp.broadcast_to(each, (updates,)) for each in given])
    if counted:
        counts += jnp.sum((jnp.concatenate(counted) != 0) & is_taken[:, None], axis=0, dtype=counts.dtype)
    if "skipped" in metrics[0]:
        is_taken &= jnp.concatenate([each["skipped"].reshape(-1) for each in metrics]) == 0

    def add(before: Any, one: Any) -> tuple[Any, None]:
        updates, total, mean = before
        numbers, weight = one
        total += weight
        share = weight / jnp.where(total == 0, 1, total)
        return (updates + (weight != 0), total, jnp.where(weight == 0, mean, mean + (numbers - mean) * share)), None

    dtype = numbers.dtype
    start = (sums.updates, sums.weight.astype(dtype), sums.mean.astype(dtype))
    weights = jnp.where(is_taken, weights, 0).astype(dtype)
    of_all, _ = jax.lax.scan(add, start, (numbers, weights), unroll=8)
    return Sums(*of_all, counts)


def _row(named: Sequence[tuple[str, Any]], updates: int) -> jax.Array:
    """All numbers of a call beside each other, (updates, numbers), in float32 or wider."""
    return jnp.concatenate([wide(each).reshape(updates, each.size // updates) for _, each in named], axis=1)


def _on_all(leaf: Any) -> Any:
    """The leaf as all devices have it alike, where its type says that they do not, so that it goes beside others."""
    sharding = jax.typeof(leaf).sharding
    return jax.sharding.reshard(leaf, jax.NamedSharding(sharding.mesh, jax.P())) if any(sharding.spec) else leaf
