"""The compiled update: train step, partition, optimizer and accumulation as one state and one call."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import PhaseError, UpdateError
from functrain.gradients.loss import accepted_context
from functrain.gradients.routes import Route, Weight
from functrain.gradients.train_step import make_gradient
from functrain.optim.adoption import Adoption
from functrain.optim.optimizer import Optimizer
from functrain.phases import Alternation, Phase, period
from functrain.precision import DynamicScale, caster
from functrain.programs import Call, Program
from functrain.state import Form, TrainState, abstract_state, initial_state, taken_apart
from functrain.step import After, Metrics, Step
from functrain.tree.paths import PyTree, flatten
from functrain.tree.text import listed
from functrain.turns import many_turns, one_turn


def make_update(
    loss_fn: Callable[..., Any] | Alternation,
    optim: Optimizer,
    *,
    accumulate: int = 1,
    microbatches: int = 1,
    remainder: Literal["flush", "drop", "carry"] = "flush",
    nonfinite: Literal["raise", "skip"] = "raise",
    after: After | None = None,
    compute_dtype: Any = None,
    loss_scale: DynamicScale | None = None,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
    audit: bool = True,
) -> "Update":
    """Makes the compiled update of a loss function and an optimizer.

    >>> from functrain import Optimizer, partition, with_lr
    >>> import optax
    >>> params = {"w": jnp.ones(2)}
    >>> optim = Optimizer(partition(params, {"all": ...}), {"all": with_lr(optax.sgd, 0.5)})
    >>> update = make_update(lambda params, batch: jnp.sum(params["w"] * batch), optim, accumulate=2)
    >>> state = update.init(params)
    >>> state, metrics = update(state, jnp.array([1.0, 2.0]))
    >>> state, metrics = update(state, jnp.array([3.0, 2.0]))
    >>> state.params["w"].tolist(), float(metrics["loss"]), int(state.step)
    ([0.0, 0.0], 4.0, 1)

    Args:
      loss_fn: as for `make_train_step`, or phases with a loss function each: `alternate(...)`. Its key is
        `fold_in(fold_in(key, batches), index of the phase)`, with the microbatch's index folded in where there are
        several; its `step` is the number of finished windows.
      optim: the optimizer. The gradients of `optim.trained` are computed and no others; its transforms are given
        optax's extra argument `value`, the loss.
      accumulate: batches in a window, which makes one optimizer step from their gradients, weighted by `Loss.weight`.
      microbatches: slices of a batch that are computed one after the other, for memory; the batch's leading axis must
        be a multiple of it. The result is that of the whole batch, where the loss is a mean over `Loss.weight`.
      remainder: what `flush` does with a window cut short: "flush" steps with the mean of what is there, "drop" forgets
        it, "carry" leaves it pending.
      nonfinite: "raise" adds nothing to the compiled program; who reads the loss finds out. "skip" leaves out an update
        with a non-finite gradient, params, optimizer state and `after`, and the model state of the batch that had it.
      after: `fn(params, model_state, step) -> (params, model_state)`, compiled in after each optimizer step, which
        `step` counts from 1: target networks, moving averages, projections.
      compute_dtype: the dtype of the params that the loss is given, or `{part: dtype}`; masters and gradients keep
        theirs.
      loss_scale: a `DynamicScale`, for float16; it implies `nonfinite="skip"`.
      route: which losses each part learns from, as for `make_train_step`; the "loss" in the metrics is then the plain
        sum of all.
      loss_weights: the weights of named losses in the sum, as for `make_train_step`; each is logged unweighted.
      audit: check before the first step, without a FLOP, that the losses reach the trained parts: raise for a part of
        which they reach no leaf, warn of single leaves. See `ft.audit`.

    Raises:
      UpdateError: an option that is none of these.
      LossError: `loss_fn` requires an argument that functrain does not know.
      PartitionError: `compute_dtype` names an unknown part.
      PhaseError: a phase with unknown or frozen parts, a trained part without a phase, or with `accumulate` a phase
        that takes the batch of another.
    """
    if not isinstance(optim, Optimizer):
        raise UpdateError(f"make_update(loss_fn, optim) takes an ft.Optimizer, not {type(optim).__name__}")
    if after is not None and not callable(after):
        raise UpdateError(f"after={after!r}: give a function (params, model_state, step) -> (params, model_state)")
    if loss_scale is not None and not isinstance(loss_scale, DynamicScale):
        raise UpdateError(f"loss_scale={loss_scale!r}: write ft.DynamicScale(initial=2.0**15)")
    for name, count in (("accumulate", accumulate), ("microbatches", microbatches)):
        if not isinstance(count, int) or count < 1:
            raise UpdateError(f"{name}={count!r}: give a whole number of at least 1")
    if remainder not in ("flush", "drop", "carry"):
        raise UpdateError(f"remainder={remainder!r}: write 'flush', 'drop' or 'carry'")
    if nonfinite not in ("raise", "skip"):
        raise UpdateError(f"nonfinite={nonfinite!r}: write 'raise' or 'skip'")
    cast = caster(optim.parts, compute_dtype)
    schedule = _scheduled(loss_fn, optim, accumulate, route, loss_weights)
    skips = nonfinite == "skip" or loss_scale is not None
    required: set[str] = set()
    steps = []
    for index, phase in enumerate(schedule.phases):
        gradient = make_gradient(
            phase.loss_fn, optim.parts, phase.trained, cast=cast, route=phase.route, loss_weights=phase.loss_weights,
            audit=(f" of phase {phase.name!r}" if phase.name else "") if audit else None,
        )  # fmt: skip
        required |= {name for name, is_required in accepted_context(phase.loss_fn).items() if is_required}
        afters = tuple(each for each in (phase.after, after) if each is not None)
        steps.append(
            Step(phase.name, index, phase.trained, optim, gradient, accumulate, microbatches, skips, afters, loss_scale)
        )
    return Update(schedule, tuple(steps), required, remainder)


def _scheduled(
    loss_fn: Any, optim: Optimizer, accumulate: int, route: Route | None, loss_weights: Mapping[str, Weight] | None
) -> Alternation:
    """The phases of an update; a loss function alone is one phase without a name."""
    if not isinstance(loss_fn, Alternation):
        return Alternation((Phase("", loss_fn, optim.trained, route=route, loss_weights=loss_weights),))
    if route is not None or loss_weights is not None:
        raise UpdateError("with phases, route= and loss_weights= belong to one: ft.Phase(name, loss_fn, parts, route=)")
    loss_fn.check(optim)
    same = [phase.name for phase in loss_fn.phases if phase.same_batch]
    if accumulate > 1 and same:
        raise PhaseError(
            f"accumulate={accumulate}: phase {listed(same)} takes the batch of the phase before it, which is one of"
            f" a window: use microbatches={accumulate} and larger batches, or give it batches of its own"
        )
    return loss_fn


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Update:
    """A compiled update, `state, metrics = update(state, batch)`; made by `make_update`.

    It holds options and compiled programs and nothing of a run: that is all in the `TrainState`.
    """

    schedule: Alternation
    steps: tuple[Step, ...]
    required: set[str]
    remainder: str
    _programs: dict[tuple[Call, Form], Program] = dataclasses.field(default_factory=dict, init=False)

    @property
    def optim(self) -> Optimizer:
        """The optimizer that it was made with."""
        return self.steps[0].optim

    @property
    def accumulate(self) -> int:
        """Batches in a window."""
        return self.steps[0].accumulate

    @functools.cached_property
    def configuration(self) -> str:
        """What it is made of, as JSON, for a checkpoint to be checked against."""
        phases = self.schedule.phases
        return json.dumps({
            "parts": {part: self.optim.parts.paths(part) for part in self.optim.parts.names},
            "optimizers": self.optim.described,
            "accumulate": self.accumulate,
            "phases": [[phase.name, *phase.trained, phase.repeat, phase.same_batch] for phase in phases if phase.name],
        })  # fmt: skip

    @property
    def cycle(self) -> int:
        """Batches in a whole cycle of phases; without phases, or where `phase=` says whose turn it is, in a window."""
        return self.accumulate * (len(self.schedule.cycle) if self.schedule.alternates else 1)

    def init(self, params: PyTree, *, key: Any = None, model_state: Any = None, copy: bool = True) -> TrainState:
        """The state before the first batch.

        Args:
          params: the whole tree, of arrays.
          key: the run's random key, for a loss function that declares `key`.
          model_state: any pytree of arrays, for a loss function that declares `model_state`.
          copy: False hands params and model state over: the first update deletes them.

        Raises:
          UpdateError: a leaf that is no array, or an argument missing that the loss function declares.
        """
        given = {"key": key, "model_state": model_state}
        if absent := [name for name in given if name in self.required and given[name] is None]:
            raise UpdateError(f"the loss function declares {listed(absent)}: update.init(params, {absent[0]}=...)")
        loss_scale = self.steps[0].loss_scale
        scale = None if loss_scale is None else loss_scale.init()
        return initial_state(self.optim, params, model_state, key, scale, self.configuration, copy=copy)

    def abstract(self, params: PyTree, *, key: Any = None, model_state: Any = None) -> TrainState:
        """What `init` would return, as `jax.ShapeDtypeStruct`s with shardings: what to restore a checkpoint like.

        The arguments may be arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
        """
        loss_scale = self.steps[0].loss_scale
        scale = (lambda: None) if loss_scale is None else loss_scale.init
        return abstract_state(self.optim, params, model_state, key, scale, self.configuration)

    def __call__(
        self, state: TrainState, batch: Any, *, lr: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Metrics]:
        """Takes in one batch; the batch that ends a window makes the optimizer step.

        Args:
          state: its arrays that change are consumed: they are deleted, and the returned state has the new ones.
          batch: what the loss function takes.
          lr: learning rates of this step alone, by part; see `Optimizer.step`. They count at the call that ends a
            window. Other values never recompile.

        Returns:
          The new state, and metrics: "loss", the named losses, the loss function's metrics. They are the batch's; the
          call that ends a window returns the window's weighted means. With `nonfinite="skip"` that call also returns
          "skipped", 1 or 0, and "nonfinite", `{part: bool}`.

        Raises:
          UpdateError: called under a trace: use `update.pure` there.
        """
        return self._run(self._call_of(state), state, batch, lr)

    def measured(
        self, state: TrainState, batch: Any, *, lr: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Metrics]:
        """As a call, with telemetry under "parts" in the metrics of the call that ends a window.

        It is a program of its own, so that the steps that are not measured pay nothing. See `telemetry.by_part`.
        """
        return self._run(self._call_of(state)._replace(measured=True), state, batch, lr)

    def scan(
        self, state: TrainState, batches: Any, *, lr: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Metrics]:
        """Takes in many batches in one dispatch.

        The state has the bits of call after call, unless XLA fuses a scan otherwise (seen with JAX 0.12 and `phase=`).

        Args:
          state: consumed; no window may be pending.
          batches: batches stacked on a leading axis: whole windows of them, and with phases whole cycles.
          lr: learning rates of all these steps, by part.

        Returns:
          The new state, and the metrics of every window, stacked on a leading axis; with phases, of every window of a
          phase under its name.

        Raises:
          UpdateError: the leading axis is no multiple of `accumulate`, or of a cycle's batches, or a window is pending.
        """
        lengths = {path: jnp.shape(leaf)[:1] for path, leaf in flatten(batches).items()}
        count = next(iter(lengths.values()), (0,))
        if len(set(lengths.values())) != 1 or not count or count[0] % self.cycle or not count[0]:
            raise UpdateError(
                "scan needs batches stacked on a leading axis, a multiple of"
                f" {self.cycle} of them ({self._cycle_in_words}), not {lengths}"
            )
        self._check_state(state)
        self._check_whole(state, "scan")
        turns = self.schedule.turns(int(state.step), count[0] // self.accumulate)
        steps = sum(map(len, turns))
        return self._run(Call("scan", period(turns)), state, batches, lr, batches=count[0], steps=steps)

    def pure(self, state: TrainState, batch: Any, *, lr: Mapping[str, Any] | None = None) -> tuple[TrainState, Metrics]:
        """The update as a pure function, for a `jit`, `scan` or `vmap` of one's own.

        A position inside of a window or a cycle can't be traced. So it takes in a whole window with `accumulate=k`, and
        a whole cycle with phases: `batch` has the `update.cycle` batches on a leading axis where there are several.
        With phases that take turns the metrics are stacked.
        """
        self._check_whole(state, "pure")
        if self.schedule.phase is not None:
            raise UpdateError("pure can't ask phase= for a step that is traced: use update(...) or update.scan(...)")
        if self.cycle > 1:
            lengths = {path: jnp.shape(leaf)[:1] for path, leaf in flatten(batch).items()}
            if wrong := {path: length for path, length in lengths.items() if length != (self.cycle,)}:
                raise UpdateError(
                    f"pure takes in {self.cycle} batches stacked on a leading axis ({self._cycle_in_words}), not"
                    f" {wrong}; for more of them use update.scan, or a scan of your own over pure"
                )
        if self.schedule.alternates:
            return many_turns(self.steps, self.schedule.cycle)(state, batch, lr, False)
        return one_turn(self.steps, self.schedule.cycle[0])(state, batch, lr, False)

    def lower(self, state: TrainState, batch: Any, *, lr: Mapping[str, Any] | None = None) -> Any:
        """The program that a call with these arguments would run, as `jax.jit(...).lower` gives it; nothing is run."""
        call = self._call_of(state)
        program = self._program(call, state)
        return program.jitted.lower(*program.arguments(state), batch, lr)

    def flush(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """Ends a window that was cut short, as at the end of an epoch, in the way that `remainder` says.

        Returns:
          The new state, and the means over the window if it made a step, else no metrics.
        """
        self._check_state(state)
        if int(state.pending) == 0 or self.remainder == "carry":
            return state, {}
        if self.remainder == "drop":
            return dataclasses.replace(state, window=None, pending=np.zeros((), np.int32)), {}
        call = Call("flush", (self.schedule.turn(int(state.step)),))
        return self._run(call, state, None, None, batches=0)

    def adopt(self, other: "Update", state: TrainState) -> tuple[TrainState, Adoption]:
        """A state for this update with what fits of another one's; see `Optimizer.adopt`.

        Args:
          other: the update that the state is of.
          state: handed over: the first call of this update deletes what it carried over.

        Raises:
          UpdateError: a window is pending.
        """
        self._check_state(state)
        self._check_whole(state, "adopt")
        opt_state, report = self.optim.adopt(other.optim, state.opt_state, state.params)
        scale = self.steps[0].loss_scale
        kept = state.loss_scale if scale is None or state.loss_scale is not None else scale.init()
        new = dataclasses.replace(
            state, opt_state=opt_state, loss_scale=None if scale is None else kept, configuration=self.configuration
        )
        return new, report

    # How it is compiled and called.

    @property
    def _cycle_in_words(self) -> str:
        turns = len(self.schedule.cycle)
        return f"accumulate={self.accumulate}" + (f", and {turns} turns in a cycle" if self.schedule.alternates else "")

    def _call_of(self, state: TrainState) -> Call:
        self._check_state(state)
        position, length = int(state.pending), self.accumulate
        if position >= length:
            raise UpdateError(
                f"{position} batches are pending in the state, of a longer window than accumulate={length}: end it"
                " first with update.flush(state), or keep to the accumulate= that it was begun with"
            )
        kind = "last" if position + 1 == length else "middle" if position else "first"
        return Call("whole" if length == 1 else kind, (self.schedule.turn(int(state.step)),))

    def _check_state(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise UpdateError(
                f"an update takes a TrainState, not {type(state).__name__}: state = update.init(params), then"
                " state, metrics = update(state, batch)"
            )
        if isinstance(state.step, jax.core.Tracer):
            raise UpdateError("update() was called under a trace: use update.pure in a jit, scan or vmap of your own")

    def _check_rates(self, lr: Mapping[str, Any] | None) -> None:
        if lr is None:
            return
        if not isinstance(lr, Mapping) or any(part not in self.optim.trained for part in lr):
            raise UpdateError(f"lr={lr!r}: give a rate by part, of the parts {listed(self.optim.trained)}")

    def _check_whole(self, state: TrainState, where: str) -> None:
        if state.window is not None:
            raise UpdateError(
                f"{where} takes in whole windows, but one is pending: end it first, with update.flush(state)"
            )

    def _run(
        self, call: Call, state: TrainState, batch: Any, lr: Any, *, batches: int = 1, steps: int | None = None
    ) -> tuple[TrainState, Metrics]:
        self._check_rates(lr)
        if call.sums:
            lr, call, steps = None, call._replace(measured=False), 0
        elif steps is None:
            steps = len(call.turns[0])
        return self._program(call, state)(
            state, batch, lr,
            step=np.array(state.step + steps, np.int32),
            batches=np.array(state.batches + batches, np.int32),
            pending=np.array(state.pending + 1 if call.sums else 0, np.int32),
        )  # fmt: skip

    def _program(self, call: Call, state: TrainState) -> Program:
        form, _ = taken_apart(state)
        program = self._programs.get((call, form))
        if program is None:
            program = self._programs[call, form] = Program(self.steps, call, form)
        return program
