"""The calls that are to come in a run, with what they will be given, so that their programs can be compiled before."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from functrain.tree.arrays import committed_sharding, replicated_like
from functrain.update.phases import Alternation, Turn, period
from functrain.update.programs import Call, Programs
from functrain.update.stages import joins_within, stages_to_come
from functrain.update.state import TrainState


def calls_to_come(
    programs: Programs,
    schedule: Alternation,
    state: TrainState,
    batch: Any,
    with_telemetry: Sequence[bool],
    until: int | None,
) -> list[tuple[Call, TrainState, Any]]:
    """The calls with one batch, and those that flush, of every turn and stage from where a run stands to its end."""
    optim, found = programs.options.optim, []
    for begin in stages_to_come(optim, int(state.step), until):
        stage = optim.stage(begin)
        for turn in schedule.every_turn:
            if programs.trains(turn, stage):
                found += calls_of(programs, turn, state, batch, with_telemetry, stage=stage)
    return found


def scans_to_come(
    programs: Programs, schedule: Alternation, state: TrainState, count: int, until: int | None
) -> list[Call]:
    """The calls that scan so many turns, where each stage begins; not those in which a part would join."""
    optim, found = programs.options.optim, []
    for begin in stages_to_come(optim, int(state.step), until):
        step = schedule.begin(begin)
        turns = schedule.turns(step, count)
        if joins_within(optim, step, turns) is None:
            found.append(Call("scan", period(turns), stage=optim.stage(step)))
    return [*dict.fromkeys(found)]


def calls_of(
    programs: Programs,
    turn: Turn,
    state: TrainState,
    batch: Any,
    with_telemetry: Sequence[bool],
    *,
    stage: int = 0,
) -> list[tuple[Call, TrainState, Any]]:
    """The calls of a turn that take one batch, or flush, the slowest to compile first, with state and batch of each.

    Args:
      programs: of the update.
      turn: the turn.
      state: any state of the run.
      batch: arrays or shapes.
      with_telemetry: for each program that makes a step, whether it is measured.
      stage: the number of the stage.
    """
    options = programs.options
    call = functools.partial(Call, turns=(turn,), stage=stage)
    if options.accumulate == 1:
        return [(call("whole", measured=measured), state, batch) for measured in with_telemetry]
    before = dataclasses.replace(state, window=None)
    after = _after_the_first(programs, call("first"), before, batch)
    asked = [(call("last", measured=measured), after, batch) for measured in with_telemetry]
    if options.accumulate > 2:
        asked.append((call("middle"), after, batch))
    asked.append((call("first"), before, batch))
    if options.remainder == "flush":
        asked.append((call("flush"), after, None))
    return asked


def _after_the_first(programs: Programs, first: Call, state: TrainState, batch: Any) -> TrainState:
    """The state as it is after the first batch of a window, with shapes in the place of the window."""
    program = programs.program(first, state, batch, None)
    _, window, *_ = program.jitted.eval_shape(*program.split(state), batch, None)
    options, optim = programs.options, programs.options.optim
    committed = filter(None, map(committed_sharding, jax.tree.leaves(state.params)))
    of_others = next(map(replicated_like, committed), None)
    of_params = {
        part: {path: committed_sharding(leaf) for path, leaf in flat.items()}
        for part, flat in optim.parts.split(state.params).items()
    }
    places = options.places_of_sums or of_params

    def placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place, weak_type=leaf.weak_type)

    def of_parts(grads: Any) -> Any:
        return {
            part: {path: placed(leaf, places[part][path] or of_others) for path, leaf in flat.items()}
            for part, flat in grads.items()
        }

    by_loss = options.by_loss
    of_numbers = options.by_shard.place if options.by_shard else of_others
    grads = {name: of_parts(each) for name, each in window.grads.items()} if by_loss else of_parts(window.grads)
    metrics, weight = jax.tree.map(lambda leaf: placed(leaf, of_numbers), (window.metrics, window.weight))
    return dataclasses.replace(state, window=dataclasses.replace(window, grads=grads, metrics=metrics, weight=weight))
