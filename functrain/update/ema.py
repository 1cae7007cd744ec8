"""Averages of the parameters over the optimizer steps, which are kept in the state beside them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functrain.errors import PartitionError, UpdateError
from functrain.mesh.constraints import brought
from functrain.mesh.layout import Layout
from functrain.optim.adoption import Adoption
from functrain.optim.optimizer import Optimizer
from functrain.tree.arrays import committed_sharding, global_norm, replicated_like, wide
from functrain.tree.partition import Partition, Split, taken_by
from functrain.tree.paths import Flat, PyTree
from functrain.tree.selectors import describe
from functrain.tree.text import listed


class Average(NamedTuple):
    """The exponential moving average of leaves of one part, which begins at zero: the state of `optax.ema`.

    Attributes:
      steps: int32 scalar, how many it is of.
      mean: `{path: average}`, float32 or wider, not debiased.
    """

    steps: jax.Array
    mean: dict[str, jax.Array]


Ema = dict[str, Average]
"""The averages of a state, by part."""


@dataclasses.dataclass(frozen=True, eq=False)
class Averages:
    """Which leaves of which parts are averaged, and how long they are remembered.

    The semantics are those of `optax.ema` with `debias=True`, of the parameters in float32 or wider. A part counts its
    own steps.

    Attributes:
      parts: the partition of the params.
      decays: `{part: {path: decay}}`.
      layout: says where averages lie; None for where their parameters do.
    """

    parts: Partition
    decays: dict[str, dict[str, float]]
    layout: Layout | None = None

    def init(self, params: PyTree) -> Ema:
        """The averages of no step, laid out as their leaves are."""
        split = self.parts.split(params)
        return {part: self._zeros({path: split[part][path] for path in decays}) for part, decays in self.decays.items()}

    def shardings(self, of_params: PyTree, replicated: Any) -> Ema:
        """The shardings of the averages, from those of the params."""
        split = self.parts.split(of_params)
        return {
            part: Average(replicated, {path: self._place(path, split[part][path]) for path in decays})
            for part, decays in self.decays.items()
        }

    def stepped(self, ema: Ema, params: PyTree, parts: Sequence[str]) -> Ema:
        """The averages after a step of some parts."""
        split = self.parts.split(params)
        return ema | {part: self._stepped(part, ema[part], split[part]) for part in parts if part in self.decays}

    def debiased(self, ema: Ema, split: Split) -> Split:
        """`{part: {path: average}}` of the given parts, float32 or wider; before a part's first step its parameters."""
        found: Split = {}
        for part, given in split.items():
            params = self._beside_averages(given)
            steps, mean = ema[part]
            unbiased: Flat = {}
            for decay, paths in self._by_decay(part).items():
                unbiased |= optax.tree.bias_correction({path: mean[path] for path in paths}, decay, steps)
            found[part] = {path: jnp.where(steps > 0, unbiased[path], wide(params[path])) for path in mean}
        return found

    def in_params(self, ema: Ema, params: PyTree) -> PyTree:
        """Whole params with the averages in place, debiased, each leaf of its own dtype."""
        split = self.parts.split(params)
        covered = {part: {path: split[part][path] for path in decays} for part, decays in self.decays.items()}
        means = self._debiased_alike(ema, covered)
        return self.parts.merge({part: split[part] | flat for part, flat in means.items()}, into=params)

    @functools.cached_property
    def _debiased_alike(self) -> Any:
        def debiased(ema: Ema, split: Split) -> Split:
            alike: Split = jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), self.debiased(ema, split), split)
            layout = self.layout
            if layout is None:
                return alike
            return {
                part: {path: brought(mean, layout.sharding(path)) for path, mean in flat.items()}
                for part, flat in alike.items()
            }

        return jax.jit(debiased)

    def distances(self, ema: Ema, params: PyTree, parts: Sequence[str]) -> dict[str, jax.Array]:
        """How far the parameters are from their averages, by part, float32 scalars."""
        split = self.parts.split(params)
        means = self.debiased(ema, {part: split[part] for part in parts if part in self.decays})
        return {
            part: global_norm([wide(split[part][path]) - mean for path, mean in flat.items()])
            for part, flat in means.items()
        }

    def _stepped(self, part: str, average: Average, params: Flat) -> Average:
        mean: Flat = {}
        params = self._beside_averages({path: params[path] for path in self.decays[part]})
        for decay, paths in self._by_decay(part).items():
            new = {path: _as_stored(params[path]) for path in paths}
            mean |= optax.tree.update_moment(new, {path: average.mean[path] for path in paths}, decay, 1)
        kept = self._beside_averages({path: mean[path] for path in average.mean})
        return Average(optax.safe_increment(average.steps), kept)

    def _zeros(self, params: Mapping[str, Any]) -> Average:
        """An average of no step; nothing of it ever lies elsewhere than in its place."""
        places = {path: self._place(path, _place(leaf)) for path, leaf in params.items()}
        shapes = jax.eval_shape(lambda leaves: jax.tree.map(wide, leaves), dict(params))
        mean = {path: jnp.zeros(leaf.shape, leaf.dtype, device=places[path]) for path, leaf in shapes.items()}
        first = next(iter(places.values()))
        return Average(jnp.zeros((), jnp.int32, device=None if first is None else replicated_like(first)), mean)

    def _beside_averages(self, leaves: Flat) -> Flat:
        """Leaves where their averages lie."""
        layout = self.layout
        if layout is None:
            return leaves
        return {path: brought(leaf, layout.of_state(path)) for path, leaf in leaves.items()}

    def _place(self, path: str, of_param: Any) -> Any:
        return of_param if self.layout is None else self.layout.of_state(path)

    def _by_decay(self, part: str) -> dict[float, list[str]]:
        """The covered paths of a part by their decay: what has one goes through the operations of `optax.ema`."""
        found: dict[float, list[str]] = {}
        for path, decay in self.decays[part].items():
            found.setdefault(decay, []).append(path)
        return found


def averages_of(optim: Optimizer, ema: Any) -> Averages | None:
    """Which leaves the option `ema` of `make_update` has averaged.

    Args:
      optim: the optimizer; what no step changes has no average.
      ema: a decay for all trained parts, or `{part or selector: decay}`, disjoint; None for no average at all.

    Raises:
      UpdateError: a decay that is none; a key that takes no leaf, or one that another has, or frozen ones alone.
    """
    if ema is None:
        return None
    by_key = ema if isinstance(ema, Mapping) else dict.fromkeys(optim.trained, ema)
    if not by_key:
        raise UpdateError('ema={}: give a decay by part or selector, {"body": 0.999}, or leave it out')
    decays: dict[str, dict[str, float]] = {}
    owner: dict[str, Any] = {}
    for key, decay in by_key.items():
        if isinstance(decay, bool) or not isinstance(decay, float | int) or not 0 <= decay < 1:
            raise UpdateError(
                f"ema={{{_written(key)}: {decay!r}}}: give a number of at least 0 and below 1, such as 0.999; it needs"
                " no schedule for the first steps, as the average is debiased"
            )
        taken = leaves_taken_by(optim.parts, key, "ema")
        if key is ...:
            taken = {path: part for path, part in taken.items() if path not in owner}
        if twice := [path for path in taken if path in owner]:
            others = ", ".join(dict.fromkeys(_written(owner[path]) for path in twice))
            raise UpdateError(f"ema: {_written(key)} also takes {listed(twice)} of {others}: give each leaf one decay")
        mine = {path: part for path, part in taken.items() if part in optim.trained}
        if not mine:
            raise UpdateError(
                f"ema: {_written(key)} takes no leaf that is trained and has no average yet, and the average of what"
                f" does not change is that itself: leave it out; the trained parts are {listed(optim.trained, 30)}"
            )
        owner |= dict.fromkeys(taken, key)
        for path, part in mine.items():
            decays.setdefault(part, {})[path] = float(decay)
    return Averages(optim.parts, decays, optim.layout)


def leaves_taken_by(parts: Partition, key: Any, what: str) -> dict[str, str]:
    """The paths that the name of a part, or else a selector takes, with the part of each.

    Raises:
      UpdateError: it takes none.
    """
    try:
        return taken_by(parts, key)
    except PartitionError as error:
        raise UpdateError(f"{what}: {error}") from None


def check_averages(averages: Averages | None, ema: Ema | None) -> None:
    """Raises unless a state has the averages that an update keeps."""
    asked, given = (averages.decays if averages else {}), (ema or {})
    if asked.keys() != given.keys():
        raise UpdateError(
            f"the state has averages of the parts [{listed(given)}], and the update keeps those of [{listed(asked)}]:"
            " begin with update.init, or take the state over, state, report = update.adopt(other_update, state)"
        )


def adopted_ema(
    new: Ema, new_decays: Mapping[str, Any], old: Ema, old_decays: Mapping[str, Any], report: Adoption
) -> tuple[Ema, Adoption]:
    """New averages with those of old ones that are of the same leaves with the same decays.

    Args:
      new: averages of no step, by part.
      new_decays: `{part: {path: decay}}`.
      old: the averages to take over, by part.
      old_decays: theirs.
      report: what became of the optimizer states.

    Returns:
      The averages, and the report with what became of them as the field "ema".
    """
    found = {part: next((other for other in old if old_decays[other] == new_decays[part]), None) for part in new}
    sources = {part: other for part, other in found.items() if other is not None}
    ema = {part: old[sources[part]] if part in sources else average for part, average in new.items()}

    def told(before: Mapping[str, dict[str, int]], averages: Ema) -> dict[str, dict[str, int]]:
        counts = {part: {"ema": len(average.mean)} for part, average in averages.items()}
        return {part: before.get(part, {}) | counts.get(part, {}) for part in [*before, *counts]}

    origins = {part: dict.fromkeys([*report.sources.get(part, ()), other]) for part, other in sources.items()}
    return ema, Adoption(
        carried=told(report.carried, {part: ema[part] for part in sources}),
        anew=told(report.anew, {part: new[part] for part in new if part not in sources}),
        dropped=told(report.dropped, {part: old[part] for part in old if part not in sources.values()}),
        sources=report.sources | {part: tuple(names) for part, names in origins.items()},
    )


def _as_stored(param: Any) -> Any:
    """A parameter in float32 or wider, with the bits of its own dtype.

    XLA leaves a rounding to 16 bits out where what is rounded is widened again, in one program and not in another.
    """
    info = jnp.finfo(jnp.result_type(param))  # type: ignore[no-untyped-call]
    return wide(param) if info.bits >= 32 else jax.lax.reduce_precision(wide(param), info.nexp, info.nmant)


def _place(leaf: Any) -> Any:
    return None if isinstance(leaf, jax.core.Tracer) else committed_sharding(leaf)


def _written(key: Any) -> str:
    return repr(key) if isinstance(key, str) else describe(key)
