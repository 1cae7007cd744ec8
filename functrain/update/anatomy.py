"""An update taken apart: the program of a call, with the losses and gradients that it computes on its way."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from functrain.gradients.loss import Loss
from functrain.tree.paths import flatten
from functrain.update.compiling import calls_of
from functrain.update.metrics import Metrics
from functrain.update.programs import Program, body_of, counted
from functrain.update.state import TrainState
from functrain.update.step import Step
from functrain.update.update import Update


class Output(NamedTuple):
    """What a value is that an update computes.

    Attributes:
      kind: "loss", "gradient", "parameter", "pending gradient" or "model state".
      phase: of a loss or a gradient, the phase that it is of; empty without phases.
      part: that a gradient or a parameter belongs to.
      name: of a loss, or the path of a leaf.
    """

    kind: str
    phase: str
    part: str
    name: str


class Anatomy(NamedTuple):
    """The program of a call.

    Attributes:
      program: computes `outputs`, in the order in which an update has them: losses, gradients, then what it leaves.
      values: what it is given, flat.
      names: what these are called.
      outputs: what its values are.
    """

    program: ClosedJaxpr
    values: list[Any]
    names: list[str]
    outputs: list[Output]


def taken_apart(update: Update, state: TrainState, batch: Any, *, flushes: bool = False) -> Anatomy:
    """What a call with these arguments computes, traced anew; nothing is computed, and nothing consumed.

    >>> import functrain as ft, optax
    >>> params = {"w": jnp.ones(())}
    >>> optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    >>> update = ft.make_update(lambda params, batch: params["w"] * batch, optim)
    >>> [output.kind for output in taken_apart(update, update.init(params), 2.0).outputs]
    ['loss', 'gradient', 'parameter']

    Args:
      update: the update.
      state: any state of it.
      batch: what the call would be given.
      flushes: the call is `update.flush(state)`, and there is no batch.
    """
    call = update.call_of(state, flushes=flushes)
    step, batches = counted(state)
    state = dataclasses.replace(state, step=step, batches=batches, pending=np.zeros((), np.int32))
    given = jax.tree.map(jnp.asarray, {"batch": batch, "state": state})
    found: dict[Output, Any] = {}

    def run(given: Any) -> list[Any]:
        found.clear()
        steps = [_telling(step, found) for step in update.stages[call.stage]]
        after, _ = body_of(steps, call)(given["state"], given["batch"], None)
        split = update.optim.parts.split(after.params)
        found.update(_of_leaves("parameter", {part: split[part] for part in update.optim.trained}))
        if after.window is not None:
            pending = steps[call.turns[0][0]].of_the_sum(after.window.grads, after.step)
            found.update(_of_leaves("pending gradient", pending))
        found.update({Output("model state", "", "", path): leaf for path, leaf in flatten(after.model_state).items()})
        return [*found.values()]

    program = jax.make_jaxpr(run)(given)
    return Anatomy(program, jax.tree.leaves(given), [_called(path) for path in flatten(given)], [*found])


class Lowered(NamedTuple):
    """A call of a step, not yet compiled.

    Attributes:
      kind: of the call: "whole", "first", "middle" or "last".
      phases: that it steps or adds, by index.
      times: how often a step has it.
      program: as `jax.jit(...).lower` gives it.
      state: what it is given, in shapes.
      arguments: `{name: part}`, whose each array of the state is, by JAX's name of the argument; "" for no part.
      outputs: the part of each of its outputs, in order.
    """

    kind: str
    phases: tuple[int, ...]
    times: int
    program: Any
    state: TrainState
    arguments: dict[str, str]
    outputs: list[str]


def lowered_calls(update: Update, state: TrainState, batch: Any) -> Iterator[Lowered]:
    """The calls of a step of an update, when all of its parts have joined; with phases, of a whole cycle.

    >>> import functrain as ft, optax
    >>> params = {"w": jnp.ones(())}
    >>> optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    >>> update = ft.make_update(lambda params, batch: params["w"] * batch, optim, accumulate=8)
    >>> [(call.kind, call.times, call.outputs) for call in lowered_calls(update, update.abstract(params), 2.0)]
    [('last', 1, ['all', '', '']), ('middle', 6, ['all', '', '', '']), ('first', 1, ['all', '', '', ''])]

    Args:
      update: the update.
      state: of `update.abstract`.
      batch: of one call, arrays or shapes.
    """
    programs, optim = update._programs, update.optim
    joined = np.array(max(optim.frozen_until.values(), default=0), np.int64)
    zero = np.zeros((), np.int64)
    state = dataclasses.replace(state, step=joined, batches=zero, pending=zero)
    turns = update.schedule.every_turn if update.schedule.phase is not None else update.schedule.cycle
    often = {"whole": 1, "first": 1, "middle": update.accumulate - 2, "last": 1}
    for turn in dict.fromkeys(turns):
        for call, before, given in calls_of(programs, turn, state, batch, (False,), stage=optim.stage(int(joined))):
            if call.kind in often:
                program = programs.program(call, before, given, None)
                lowered = program.traced(before, given, None).lower()
                times = often[call.kind] * turns.count(turn)
                parts = _parts_of(update, program, before, given, lowered.out_info)
                yield Lowered(call.kind, turn, times, lowered, before, *parts)


def _parts_of(
    update: Update, program: Program, state: TrainState, batch: Any, out: Any
) -> tuple[dict[str, str], list[str]]:
    """Whose the arguments of a program are, by JAX's names, and its outputs, in order."""

    def all_of(tree: Any, part: str = "") -> Any:
        return jax.tree.map(lambda _: part, tree)

    def of_window(window: Any) -> Any:
        def by_part(grads: Any) -> Any:
            return {name: all_of(each, name) for name, each in grads.items()}

        if window is None:
            return None
        by_loss = update.options.by_loss
        grads = {name: by_part(of) for name, of in window.grads.items()} if by_loss else by_part(window.grads)
        return dataclasses.replace(all_of(window), grads=grads)

    optim = update.optim
    owned = dataclasses.replace(
        state,
        params=optim.parts.merge({part: all_of(flat, part) for part, flat in optim.parts.split(state.params).items()}),
        opt_state={name: all_of(each, optim.owners[name]) for name, each in state.opt_state.items()},
        model_state=all_of(state.model_state),
        scale_state=all_of(state.scale_state),
        ema=state.ema and {part: all_of(each, part) for part, each in state.ema.items()},
        key=all_of(state.key),
        window=of_window(state.window),
    )
    consumed, read = program.split(owned)
    *of_state, _, _ = read  # The counters are of no part, as constants are.
    given = {"consumed": consumed, "read": of_state, "batch": all_of(batch)}
    arguments = {
        f"{name}{jax.tree_util.keystr(keys)}": part
        for name, tree in given.items()
        for keys, part in jax.tree_util.tree_leaves_with_path(tree)
    }
    _, window, metrics, weights = out
    return arguments, jax.tree.leaves((consumed[0], of_window(window), all_of(metrics), all_of(weights)))


def _telling(step: Step, found: dict[Output, Any]) -> Step:
    """The step, which leaves its losses and gradients among what was found."""
    losses = {"loss"}

    def see(loss: Loss) -> None:
        losses.update(loss.values)

    def tell(metrics: Metrics, grads: Any) -> None:
        found.update({Output("loss", step.name, "", name): metrics[name] for name in sorted(losses & metrics.keys())})
        found.update(_of_leaves("gradient", grads, step.name))

    return dataclasses.replace(step, see=see, tell=tell)


def _of_leaves(kind: str, split: Any, phase: str = "") -> dict[Output, Any]:
    return {Output(kind, phase, part, path): leaf for part, flat in split.items() for path, leaf in flat.items()}


def _called(path: str) -> str:
    whole, _, inner = path.partition("/")
    return f"{inner!r} of the {whole}" if inner else f"the {whole}"
