"""The programs of an update: what each kind of call compiles, consumes and returns."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from functrain.errors import UpdateError
from functrain.gradients.accumulation import Accumulated
from functrain.phases import Turn
from functrain.state import Form, TrainState, lasting, put_together, taken_apart
from functrain.step import Metrics, Step
from functrain.turns import Body, many_turns, one_step, one_turn


class Call(NamedTuple):
    """What is compiled once: a kind of call, the turns that it takes (of a scan one cycle), whether with telemetry."""

    kind: str
    turns: tuple[Turn, ...]
    measured: bool = False

    @property
    def sums(self) -> bool:
        """Whether it adds to a window and makes no step."""
        return self.kind in ("first", "middle")


class Program:
    """The compiled program of a call, for states of a form.

    It consumes the leaves of the state that it changes, and reads the others: a phase leaves the networks of other
    phases where they are, and every update what is frozen. XLA deletes what is consumed and writes the new in its
    place.
    """

    def __init__(self, steps: Sequence[Step], call: Call, form: Form):
        self.form = form
        self._changes = _changed(steps, call, form)
        self._reads = _read(self._changes, form)
        # Only a middle batch returns a window, of which a consumed one could be the place.
        self._is_middle = call.kind == "middle"
        self.jitted = self._jitted(steps, call)

    def arguments(self, state: TrainState) -> tuple[Any, Any]:
        """What it consumes of a state, and what it reads."""
        _, leaves = taken_apart(state)
        consumed = leaves if len(self._changes) == len(leaves) else [leaves[i] for i in self._changes]
        consumed_window, window = (state.window, None) if self._is_middle else (None, state.window)
        read = ([leaves[i] for i in self._reads], window, state.key, state.step, state.batches)
        return (consumed, consumed_window), read

    def __call__(self, state: TrainState, batch: Any, lr: Any, **counters: Any) -> tuple[TrainState, Metrics]:
        """The next state, with the given counters, and the metrics.

        Raises:
          UpdateError: an earlier call has consumed the state.
        """
        consumed, read = self.arguments(state)
        # One leaf of each tells: what a call consumes is deleted together.
        told = [*consumed[0][:1], *read[0][:1], *([consumed[1].weights] if consumed[1] else [])]
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in told):
            raise UpdateError(
                "this state was consumed by an earlier call, and with it every shallow copy: go on from the state that"
                " the call returned, state, metrics = update(state, batch), or copy.deepcopy(state) before it"
            )
        changed, window, metrics = self.jitted(consumed, read, batch, lr)
        leaves = changed
        if len(changed) < self.form.leaves:
            leaves = taken_apart(state)[1].copy()
            for i, leaf in zip(self._changes, changed, strict=True):
                leaves[i] = leaf
        others = {"key": state.key, "window": window, "configuration": state.configuration, **counters}
        return put_together(self.form, leaves, **others), metrics

    def _jitted(self, steps: Sequence[Step], call: Call) -> Any:
        body, form, changes, reads = _body(steps, call), self.form, self._changes, self._reads
        nothing = {field.name: None for field in dataclasses.fields(TrainState)} | {"pending": 0}

        def run(consumed: Any, read: Any, batch: Any, lr: Any) -> tuple[list[Any], Any, Metrics]:
            (changing, consumed_window), (others, window, key, step, batches) = consumed, read
            given = dict(zip((*changes, *reads), (*changing, *others), strict=True))
            fields = form.fields([given.get(i, 0) for i in range(form.leaves)])
            counted = {"key": key, "step": step, "batches": batches, "window": consumed_window or window}
            state, metrics = body(TrainState(**{**nothing, **fields, **counted}), batch, lr, call.measured)
            leaves = jax.tree.leaves(lasting(state))
            return [leaves[i] for i in changes], state.window, metrics

        run.__name__ = f"functrain_{call.kind}"
        out_shardings = None
        if form.shardings is not None:
            step = steps[call.turns[0][0]]
            split = step.optim.parts.split(form.field("params", form.shardings))
            grads = {part: split[part] for part in step.parts}
            window = Accumulated(sums=(grads, None), weights=None) if call.sums else None
            out_shardings = ([form.shardings[i] for i in changes], window, None)
        return jax.jit(run, donate_argnums=0, out_shardings=out_shardings)


def _changed(steps: Sequence[Step], call: Call, form: Form) -> list[int]:
    """Which leaves of the state a call changes."""
    numbers = form.fields(range(form.leaves))
    changed = [numbers["model_state"]]
    if not call.sums:
        mine = [steps[index] for turn in call.turns for index in turn]
        parts = {part for step in mine for part in step.parts}
        params = numbers["params"]
        if not any(step.after for step in mine):
            split = steps[0].optim.parts.split(params)
            params = [split[part] for part in parts]
        changed += [params, [numbers["opt_state"][part] for part in parts], numbers["loss_scale"]]
    return sorted(jax.tree.leaves(changed))


def _read(changes: Sequence[int], form: Form) -> list[int]:
    """Which others it looks at: optimizer state that it does not change is none of them."""
    numbers = form.fields(range(form.leaves))
    del numbers["opt_state"]
    return sorted({*jax.tree.leaves(numbers)} - {*changes})


def _body(steps: Sequence[Step], call: Call) -> Body:
    if call.kind == "scan":
        return many_turns(steps, call.turns)
    if call.kind == "whole":
        return one_turn(steps, call.turns[0])
    step = steps[call.turns[0][0]]
    bodies = {"first": step.summed, "middle": step.summed, "last": step.last, "flush": step.flush}
    return one_step(step, bodies[call.kind])
