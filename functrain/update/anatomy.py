"""An update taken apart: the program of a call, with the losses and gradients that it computes on its way."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from functrain.gradients.loss import Loss
from functrain.tree.paths import flatten
from functrain.update.programs import body_of, counted
from functrain.update.state import TrainState
from functrain.update.step import Metrics, Step
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
