"""The programs of an update: what each kind of call compiles, consumes and returns."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from functrain.accumulate import Accumulated
from functrain.phases import Turn
from functrain.state import LASTING, Form, TrainState
from functrain.step import Metrics, Step
from functrain.turns import Body, many_turns, one_step, one_turn


class Call(NamedTuple):
    """What is compiled once: a kind of call, the turns that it takes (of a scan one cycle), whether with telemetry."""

    kind: str
    turns: tuple[Turn, ...]
    measured: bool = False


class Fields(NamedTuple):
    """The fields of the state that a kind of call consumes, reads and returns."""

    consumes: tuple[str, ...]
    reads: tuple[str, ...]
    returns: tuple[str, ...]


_STEPPED = ("params", "opt_state", "model_state", "loss_scale")
_SUMMED = ("model_state", "window")
_COUNTED = ("key", "step", "batches")
FIELDS = {
    "whole": Fields(_STEPPED, _COUNTED, _STEPPED),
    "first": Fields(("model_state",), ("params", "loss_scale", *_COUNTED), _SUMMED),
    "middle": Fields(_SUMMED, ("params", "loss_scale", *_COUNTED), _SUMMED),
    # No output has the form of the window, so that it can't be donated.
    "last": Fields(_STEPPED, ("window", *_COUNTED), _STEPPED),
    "flush": Fields(_STEPPED, ("window", *_COUNTED), _STEPPED),
    "scan": Fields(_STEPPED, _COUNTED, _STEPPED),
}


def compiled(steps: Sequence[Step], call: Call, form: Form) -> Callable[..., tuple[dict[str, Any], Metrics]]:
    """The jitted `(consumed, read, batch, lr) -> (returned, metrics)` of a call, for states of a form.

    The first three are dicts of fields of the state, the lasting ones as lists of leaves; what is consumed is donated.
    """
    body, fields = _body(steps, call), FIELDS[call.kind]
    nothing = {field.name: None for field in dataclasses.fields(TrainState)} | {"pending": 0}

    def run(consumed: Any, read: Any, batch: Any, lr: Any) -> tuple[dict[str, Any], Metrics]:
        given = {**consumed, **read}
        trees = {name: form.unflatten(name, given[name]) for name in LASTING if name in given}
        state, metrics = body(TrainState(**{**nothing, **given, **trees}), batch, lr, call.measured)
        returned = {name: getattr(state, name) for name in fields.returns}
        leaves = {name: jax.tree.leaves(returned[name]) for name in LASTING if name in returned}
        return {**returned, **leaves}, metrics

    run.__name__ = f"functrain_{call.kind}"
    out_shardings = None
    if form.shardings is not None:
        step = steps[call.turns[0][0]]
        split = step.optim.parts.split(form.unflatten("params", form.shardings["params"]))
        grads = {part: split[part] for part in step.parts}
        known = {**form.shardings, "window": Accumulated(sums=(grads, None), weights=None)}
        out_shardings = ({name: known[name] for name in fields.returns}, None)
    return jax.jit(run, donate_argnums=0, out_shardings=out_shardings)


def _body(steps: Sequence[Step], call: Call) -> Body:
    if call.kind == "scan":
        return many_turns(steps, call.turns)
    if call.kind == "whole":
        return one_turn(steps, call.turns[0])
    step = steps[call.turns[0][0]]
    bodies = {"first": step.summed, "middle": step.summed, "last": step.last, "flush": step.flush}
    return one_step(step, bodies[call.kind])
