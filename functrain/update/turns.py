"""The steps of several phases as one pure function: on one batch, and on the batches of whole cycles."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from functrain.update.metrics import Metrics, Weighed, of_loss
from functrain.update.options import Settings
from functrain.update.phases import Turn
from functrain.update.state import TrainState
from functrain.update.step import Step

Found = Weighed | dict[str, Weighed]
"""What an update found: of an update without phases, or by the name of its phase."""

Body = Callable[[TrainState, Any, Any], tuple[TrainState, Found]]
"""From a state, a batch or several, and the hyperparameters of this call, to the next state and what was found."""


def make_turn(steps: Sequence[Step], turn: Turn, *, measured: bool = False, stacked: bool = False) -> Body:
    """What a turn does with its batch, or with its window of batches on a leading axis.

    Args:
      steps: by phase.
      turn: the phases that step, in order.
      measured: with telemetry in the metrics.
      stacked: give the metrics of every phase a leading axis, of its steps; else only those of one that steps again.
    """

    def run(state: TrainState, batch: Any, settings: Settings | None) -> tuple[TrainState, Found]:
        found: dict[str, list[Weighed]] = {}
        for nth, index in enumerate(turn):
            step = steps[index]
            if step.options.accumulate > 1:
                state, weighed = step.window(state, batch, settings, measured=measured)
            else:
                before = {name: of_loss(each[-1].metrics) for name, each in found.items() if name != step.name}
                state, weighed = step.whole(
                    state,
                    batch,
                    settings,
                    measured=measured,
                    repeat=turn[:nth].count(index),
                    before=before if index != turn[0] else None,
                )
            found.setdefault(step.name, []).append(weighed)
        if steps[turn[0]].options.accumulate == 1:
            state = dataclasses.replace(state, batches=state.batches + 1)
        return state, under_phases({name: _stacked(of_phase, stacked) for name, of_phase in found.items()})

    return run


def make_cycles(steps: Sequence[Step], cycle: tuple[Turn, ...], *, measured: bool = False) -> Body:
    """What repetitions of a cycle of turns do with their batches, on one leading axis.

    Every metric has a leading axis, of its phase's steps.
    """
    accumulate = steps[0].options.accumulate

    def run(state: TrainState, batches: Any, settings: Settings | None) -> tuple[TrainState, Found]:
        if accumulate > 1:
            batches = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]), batches)

        def scanned(body: Body, state: TrainState, batches: Any) -> tuple[TrainState, Any]:
            state, found = jax.lax.scan(lambda state, batch: body(state, batch, settings), state, batches)
            return state, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)

        def one_cycle(state: TrainState, batches: Any, _: Any) -> tuple[TrainState, Found]:
            found: dict[str, list[Weighed]] = {}
            begin = 0
            for turn, equal in itertools.groupby(cycle):
                body, count = make_turn(steps, turn, measured=measured, stacked=True), len(list(equal))
                mine = jax.tree.map(lambda leaf, at=begin, count=count: leaf[at : at + count], batches)
                state, of_turn = scanned(body, state, mine)
                begin += count
                for name, of_phase in of_turn.items():
                    found.setdefault(name, []).append(of_phase)
            return state, {name: jax.tree.map(_concatenated, *of_phase) for name, of_phase in found.items()}

        if len(cycle) == 1:
            return scanned(make_turn(steps, cycle[0], measured=measured, stacked=True), state, batches)
        if len(cycle) == len(jax.tree.leaves(batches)[0]):
            return one_cycle(state, batches, settings)
        by_cycle = jax.tree.map(lambda leaf: leaf.reshape(-1, len(cycle), *leaf.shape[1:]), batches)
        return scanned(one_cycle, state, by_cycle)

    return run


def under_phases(found: dict[str, Weighed]) -> Found:
    """What was found by the name of its phase; that of an update without phases, which has no name, as it is."""
    return found.get("", dict(found))


def apart(found: Found) -> tuple[Metrics, Any]:
    """The metrics, and their weights, by the names of the phases where there are any."""
    if isinstance(found, Weighed):
        return found.metrics, found.weight
    return {name: each.metrics for name, each in found.items()}, {name: each.weight for name, each in found.items()}


def _stacked(found: list[Weighed], always: bool) -> Weighed:
    if len(found) == 1 and not always:
        return found[0]
    stacked: Weighed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return stacked


def _concatenated(*leaves: Any) -> jax.Array:
    return jnp.concatenate(leaves)
