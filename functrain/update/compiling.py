"""The calls that are to come in a run, with what they will be given, so that their programs can be compiled before."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from functrain.tree.arrays import committed_sharding, replicated_like
from functrain.update.phases import Turn
from functrain.update.programs import Call, Programs
from functrain.update.state import TrainState


def calls_of(
    programs: Programs, turn: Turn, state: TrainState, batch: Any, with_telemetry: Sequence[bool]
) -> list[tuple[Call, TrainState, Any]]:
    """The calls of a turn that take one batch, or flush, the slowest to compile first, with state and batch of each.

    Args:
      programs: of the update.
      turn: the turn.
      state: any state of the run.
      batch: arrays or shapes.
      with_telemetry: for each program that makes a step, whether it is measured.
    """
    options = programs.options
    if options.accumulate == 1:
        return [(Call("whole", (turn,), measured), state, batch) for measured in with_telemetry]
    before = dataclasses.replace(state, window=None)
    after = _after_the_first(programs, turn, before, batch)
    asked = [(Call("last", (turn,), measured), after, batch) for measured in with_telemetry]
    if options.accumulate > 2:
        asked.append((Call("middle", (turn,)), after, batch))
    asked.append((Call("first", (turn,)), before, batch))
    if options.remainder == "flush":
        asked.append((Call("flush", (turn,)), after, None))
    return asked


def _after_the_first(programs: Programs, turn: Turn, state: TrainState, batch: Any) -> TrainState:
    """The state as it is after the first batch of a window, with shapes in the place of the window."""
    program = programs.program(Call("first", (turn,)), state, batch, None)
    _, window, _ = program.jitted.eval_shape(*program.split(state), batch, None)
    split = programs.options.optim.parts.split(state.params)
    committed = filter(None, map(committed_sharding, jax.tree.leaves(state.params)))
    of_others = next(map(replicated_like, committed), None)

    def placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place, weak_type=leaf.weak_type)

    grads = {
        part: {path: placed(leaf, committed_sharding(split[part][path]) or of_others) for path, leaf in flat.items()}
        for part, flat in window.grads.items()
    }
    metrics, weight = jax.tree.map(lambda leaf: placed(leaf, of_others), (window.metrics, window.weight))
    return dataclasses.replace(state, window=dataclasses.replace(window, grads=grads, metrics=metrics, weight=weight))
