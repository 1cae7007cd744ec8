"""The compiled update: train step, partition, optimizer and accumulation as one state and one call."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from functrain.errors import UpdateError
from functrain.gradients.loss import required_context
from functrain.gradients.objective import make_objective
from functrain.gradients.routes import Route, Weight
from functrain.gradients.train_step import make_gradient
from functrain.optim.adoption import Adoption
from functrain.optim.optimizer import Optimizer
from functrain.tree.paths import PyTree
from functrain.tree.text import listed
from functrain.update.checks import check_cycle, check_position, check_rates, check_state, check_whole, checked_count
from functrain.update.initial import abstract_state, initial_state
from functrain.update.options import Options
from functrain.update.phases import Alternation, period, scheduled
from functrain.update.precision import DynamicScale, LossScaleState, caster
from functrain.update.programs import Call, Programs
from functrain.update.state import TrainState
from functrain.update.step import After, Metrics, Step
from functrain.update.turns import make_cycles, make_turn


def make_update(
    loss_fn: Callable[..., Any] | Alternation,
    optim: Optimizer,
    *,
    accumulate: int = 1,
    microbatches: int = 1,
    remainder: Literal["flush", "drop", "carry"] = "flush",
    nonfinite: Literal["ignore", "skip"] = "ignore",
    after: After | None = None,
    compute_dtype: Any = None,
    loss_scale: DynamicScale | None = None,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
    audit: bool = True,
) -> "Update":
    """Makes the compiled update of a loss function and an optimizer.

    >>> from functrain import Optimizer, partition, with_lr
    >>> import jax.numpy as jnp, optax
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
      optim: the optimizer. The gradients of `optim.trained` are computed and no others. Its transforms are given those
        of optax's extra arguments that they declare: `value`, the loss that their part learns from, `value_fn`, the
        same as a function of their part's leaves (not with `accumulate`), `grad` and `grad_fn`.
      accumulate: batches in a window, which makes one optimizer step from their gradients, weighted by `Loss.weight`.
      microbatches: slices of a batch that are computed one after the other, for memory; the batch's leading axis must
        be a multiple of it. The result is that of the whole batch, where the loss is a mean over `Loss.weight`.
      remainder: what `flush` does with a window cut short: "flush" steps with the mean of what is there, "drop" forgets
        it, "carry" leaves it pending.
      nonfinite: "ignore" adds nothing to the compiled program; who reads the loss finds out. "skip" leaves out an
        update with a non-finite gradient, params, optimizer state and `after`, and the model state of the batch that
        had it.
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
    options = Options(
        optim=optim,
        accumulate=accumulate,
        microbatches=microbatches,
        remainder=remainder,
        nonfinite=nonfinite,
        loss_scale=loss_scale,
    )
    if after is not None and not callable(after):
        raise UpdateError(f"after={after!r}: give a function (params, model_state, step) -> (params, model_state)")
    cast = caster(optim.parts, compute_dtype)
    schedule = scheduled(loss_fn, optim, accumulate, route=route, loss_weights=loss_weights)
    steps = []
    for index, phase in enumerate(schedule.phases):
        losses: Any = {"cast": cast, "route": phase.route, "loss_weights": phase.loss_weights}
        where = (f" of phase {phase.name!r}" if phase.name else "") if audit else None
        steps.append(
            Step(
                name=phase.name,
                index=index,
                parts=phase.trained,
                gradient=make_gradient(phase.loss_fn, optim.parts, phase.trained, **losses, audit=where),
                objective=make_objective(phase.loss_fn, phase.trained, **losses),
                after=tuple(each for each in (phase.after, after) if each is not None),
                options=options,
            )
        )
    return Update(schedule, tuple(steps), options)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Update:
    """A compiled update, `state, metrics = update(state, batch)`; made by `make_update`.

    It holds options and compiled programs and nothing of a run: that is all in the `TrainState`.
    """

    schedule: Alternation
    steps: tuple[Step, ...]
    options: Options

    @property
    def optim(self) -> Optimizer:
        """The optimizer that it was made with."""
        return self.options.optim

    @property
    def accumulate(self) -> int:
        """Batches in a window."""
        return self.options.accumulate

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
        required = {name for phase in self.schedule.phases for name in required_context(phase.loss_fn)}
        if absent := [name for name in given if name in required and given[name] is None]:
            raise UpdateError(f"the loss function declares {listed(absent)}: update.init(params, {absent[0]}=...)")
        return initial_state(
            self.optim,
            params,
            model_state=model_state,
            scale_state=self._initial_scale(),
            key=key,
            configuration=self.configuration,
            copy=copy,
        )

    def abstract(self, params: PyTree, *, key: Any = None, model_state: Any = None) -> TrainState:
        """What `init` would return, as `jax.ShapeDtypeStruct`s with shardings: what to restore a checkpoint like.

        The arguments may be arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
        """
        return abstract_state(
            self.optim,
            params,
            model_state=model_state,
            scale_state=self._initial_scale,
            key=key,
            configuration=self.configuration,
        )

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
        return self._take(state, batch, lr, measured=False)

    def measured(
        self, state: TrainState, batch: Any, *, lr: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Metrics]:
        """As a call, with telemetry under "parts" in the metrics of the call that ends a window.

        It is a program of its own, so that the steps that are not measured pay nothing. See `telemetry.by_part`.
        """
        return self._take(state, batch, lr, measured=True)

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
        count = checked_count(batches, self.cycle, self._cycle_in_words)
        check_state(state)
        check_whole(state, "scan")
        turns = self.schedule.turns(int(state.step), count // self.accumulate)
        check_rates(lr, self.optim.trained)
        call, steps = Call("scan", period(turns)), sum(map(len, turns))
        return self._programs.run(call, state, batches, lr, batches=count, steps=steps)

    def pure(self, state: TrainState, batch: Any, *, lr: Mapping[str, Any] | None = None) -> tuple[TrainState, Metrics]:
        """The update as a pure function, for a `jit`, `scan` or `vmap` of one's own.

        A position inside of a window or a cycle can't be traced. So it takes in a whole window with `accumulate=k`, and
        a whole cycle with phases: `batch` has the `update.cycle` batches on a leading axis where there are several.
        With phases that take turns the metrics are stacked.
        """
        check_whole(state, "pure")
        if self.schedule.phase is not None:
            raise UpdateError("pure can't ask phase= for a step that is traced: use update(...) or update.scan(...)")
        if self.cycle > 1:
            check_cycle(batch, self.cycle, self._cycle_in_words)
        if self.schedule.alternates:
            return make_cycles(self.steps, self.schedule.cycle)(state, batch, lr)
        return make_turn(self.steps, self.schedule.cycle[0])(state, batch, lr)

    def lower(self, state: TrainState, batch: Any, *, lr: Mapping[str, Any] | None = None) -> Any:
        """The program that a call with these arguments would run, as `jax.jit(...).lower` gives it; nothing is run."""
        program = self._programs.program(self.call_of(state), state)
        return program.jitted.lower(*program.split(state), batch, lr)

    def flush(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """Ends a window that was cut short, as at the end of an epoch, in the way that `remainder` says.

        Returns:
          The new state, and the means over the window if it made a step, else no metrics.
        """
        check_state(state)
        if int(state.pending) == 0 or self.options.remainder == "carry":
            return state, {}
        if self.options.remainder == "drop":
            return dataclasses.replace(state, window=None, pending=np.zeros((), np.int64)), {}
        call = Call("flush", (self.schedule.turn(int(state.step)),))
        return self._programs.run(call, state, None, None, batches=0, steps=1)

    def adopt(self, other: "Update", state: TrainState) -> tuple[TrainState, Adoption]:
        """A state for this update with what fits of another one's; see `Optimizer.adopt`.

        Args:
          other: the update that the state is of.
          state: handed over: the first call of this update deletes what it carried over.

        Raises:
          UpdateError: a window is pending.
        """
        check_state(state)
        check_whole(state, "adopt")
        opt_state, report = self.optim.adopt(other.optim, state.opt_state, state.params)
        keeps_scale = self.options.loss_scale is not None and state.scale_state is not None
        scale_state = state.scale_state if keeps_scale else self._initial_scale()
        new = dataclasses.replace(state, opt_state=opt_state, scale_state=scale_state, configuration=self.configuration)
        return new, report

    # How it is compiled and called.

    @property
    def _cycle_in_words(self) -> str:
        turns = len(self.schedule.cycle)
        return f"accumulate={self.accumulate}" + (f", and {turns} turns in a cycle" if self.schedule.alternates else "")

    def call_of(self, state: TrainState) -> Call:
        """What kind of call comes next."""
        check_state(state)
        check_position(state, self.accumulate)
        position, length = int(state.pending), self.accumulate
        kind = "last" if position + 1 == length else "middle" if position else "first"
        return Call("whole" if length == 1 else kind, (self.schedule.turn(int(state.step)),))

    def _take(self, state: TrainState, batch: Any, lr: Any, *, measured: bool) -> tuple[TrainState, Metrics]:
        """Takes in one batch."""
        call = self.call_of(state)
        check_rates(lr, self.optim.trained)
        if call.only_adds:
            return self._programs.run(call, state, batch, None, batches=1, steps=0)
        call = call._replace(measured=measured)
        return self._programs.run(call, state, batch, lr, batches=1, steps=len(call.turns[0]))

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs(self.schedule.phases, self.steps)

    def _initial_scale(self) -> LossScaleState | None:
        return None if self.options.loss_scale is None else self.options.loss_scale.init()
