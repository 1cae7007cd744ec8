"""The steps of several phases as one pure function: on one batch, and on the batches of whole cycles."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from functrain.phases import Turn
from functrain.state import TrainState
from functrain.step import Metrics, Step

Body = Callable[[TrainState, Any, Any, bool], tuple[TrainState, Metrics]]


def one_step(step: Step, body: Body) -> Body:
    """A function of a `Step`, with its metrics under the name of its phase."""
    if not step.name:
        return body

    def named(state: TrainState, batch: Any, lr: Any, measured: bool) -> tuple[TrainState, Metrics]:
        state, metrics = body(state, batch, lr, measured)
        return state, {step.name: metrics}

    return named


def one_turn(steps: Sequence[Step], turn: Turn, *, stacked: bool = False) -> Body:
    """What a turn does with its batch, or with its window of batches on a leading axis.

    Args:
      steps: by phase.
      turn: the phases that step, in order.
      stacked: give the metrics of every phase a leading axis, of its steps; else only those of one that steps again.
    """

    def run(state: TrainState, batch: Any, lr: Any, measured: bool) -> tuple[TrainState, Metrics]:
        found: dict[str, list[Metrics]] = {}
        for nth, index in enumerate(turn):
            step = steps[index]
            if step.accumulate > 1:
                state, metrics = step.window(state, batch, lr, measured)
            else:
                state, metrics = step.whole(state, batch, lr, measured, repeat=turn[:nth].count(index))
            found.setdefault(step.name, []).append(metrics)
        if steps[turn[0]].accumulate == 1:
            state = dataclasses.replace(state, batches=state.batches + 1)
        return state, _by_phase({name: _stacked(all_, stacked) for name, all_ in found.items()})

    return run


def many_turns(steps: Sequence[Step], cycle: tuple[Turn, ...]) -> Body:
    """What repetitions of a cycle of turns do with their batches, on one leading axis.

    Every metric has a leading axis, of its phase's steps.
    """
    accumulate = steps[0].accumulate

    def run(state: TrainState, batches: Any, lr: Any, measured: bool) -> tuple[TrainState, Metrics]:
        if accumulate > 1:
            batches = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]), batches)

        def scanned(body: Body, state: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
            state, metrics = jax.lax.scan(lambda state, batch: body(state, batch, lr, measured), state, batches)
            return state, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), metrics)

        def one_cycle(state: TrainState, batches: Any, *_: Any) -> tuple[TrainState, Metrics]:
            found: dict[str, list[Metrics]] = {}
            begin = 0
            for turn, equal in itertools.groupby(cycle):
                body, count = one_turn(steps, turn, stacked=True), len(list(equal))
                mine = jax.tree.map(lambda leaf, at=begin, count=count: leaf[at : at + count], batches)
                state, metrics = scanned(body, state, mine)
                begin += count
                for name, of_phase in metrics.items():
                    found.setdefault(name, []).append(of_phase)
            return state, {name: jax.tree.map(_concatenated, *of_phase) for name, of_phase in found.items()}

        if len(cycle) == 1:
            return scanned(one_turn(steps, cycle[0], stacked=True), state, batches)
        if len(cycle) == len(jax.tree.leaves(batches)[0]):
            return one_cycle(state, batches)
        by_cycle = jax.tree.map(lambda leaf: leaf.reshape(-1, len(cycle), *leaf.shape[1:]), batches)
        return scanned(one_cycle, state, by_cycle)

    return run


def _stacked(metrics: list[Metrics], always: bool) -> Metrics:
    if len(metrics) == 1 and not always:
        return metrics[0]
    stacked: Metrics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)
    return stacked


def _concatenated(*leaves: Any) -> jax.Array:
    return jnp.concatenate(leaves)


def _by_phase(found: dict[str, Metrics]) -> Metrics:
    """The metrics by the name of their phase; those of an update without phases, which has no name, as they are."""
    return found.get("", dict(found))
