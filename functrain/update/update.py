"""The compiled update as its user calls it; `make_update` makes one."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from functrain.errors import UpdateError
from functrain.optim.adoption import Adoption
from functrain.tree.paths import PyTree
from functrain.update.calls import Calls
from functrain.update.checks import (
    check_context,
    check_cycle,
    check_state,
    check_whole,
)
from functrain.update.compiling import calls_to_come, scans_to_come
from functrain.update.configuration import written
from functrain.update.consumed import check_not_deleted
from functrain.update.initial import abstract_state, adopted_state, initial_state
from functrain.update.metrics import Metrics
from functrain.update.stages import stage_of
from functrain.update.state import TrainState
from functrain.update.turns import apart, make_cycles, make_turn


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Update(Calls):
    """A compiled update, `state, metrics = update(state, batch)`; made by `make_update`.

    It holds options and compiled programs and nothing of a run: that is all in the `TrainState`.
    """

    @functools.cached_property
    def configuration(self) -> str:
        """What it is made of, as JSON, for a checkpoint to be checked against."""
        return written(self.schedule, self.options)

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
        functions = [phase.loss_fn for phase in self.schedule.phases]
        check_context(functions, self.options.surgery, key=key, model_state=model_state)
        return initial_state(
            self.options, params, model_state=model_state, key=key, configuration=self.configuration, copy=copy
        )

    def abstract(self, params: PyTree, *, key: Any = None, model_state: Any = None) -> TrainState:
        """What `init` would return, as `jax.ShapeDtypeStruct`s with shardings: what to restore a checkpoint like.

        The arguments may be arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
        """
        return abstract_state(self.options, params, model_state=model_state, key=key, configuration=self.configuration)

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        *,
        lr: Mapping[str, Any] | None = None,
        set: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> tuple[TrainState, Metrics]:
        """Takes in one batch; the batch that ends a window makes the optimizer step.

        Args:
          state: its arrays that change are consumed: they are deleted, and the returned state has the new ones.
          batch: what the loss function takes.
          lr: learning rates of this step alone, by part; see `Optimizer.step`. They count at the call that ends a
            window. Other values never recompile.
          set: hyperparameters of this step alone, `{part: {name: scalar}}`, of parts made by `with_state`. The same
            holds of them.

        Returns:
          The new state, and metrics: "loss", the named losses, the loss function's metrics. They are the batch's; the
          call that ends a window returns the window's weighted means. With `nonfinite="skip"` that call also returns
          "skipped", 1 or 0, and "nonfinite", `{part: bool}`.

        Raises:
          UpdateError: called under a trace: use `update.pure` there; or an earlier call has consumed the state.
        """
        state, metrics, _ = self.taken(state, batch, self._settings(lr, set))
        return state, metrics

    def measured(
        self,
        state: TrainState,
        batch: Any,
        *,
        lr: Mapping[str, Any] | None = None,
        set: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> tuple[TrainState, Metrics]:
        """As a call, with telemetry under "parts" in the metrics of the call that ends a window.

        It is a program of its own, so that the steps that are not measured pay nothing. See `telemetry.by_part`.
        """
        state, metrics, _ = self.taken(state, batch, self._settings(lr, set), measured=True)
        return state, metrics

    def scan(
        self,
        state: TrainState,
        batches: Any,
        *,
        lr: Mapping[str, Any] | None = None,
        set: Mapping[str, Any] | None = None,  # noqa: A002
        measured: bool = False,
    ) -> tuple[TrainState, Metrics]:
        """Takes in many batches in one dispatch.

        The state has the bits of call after call, unless XLA fuses a scan otherwise (seen with JAX 0.12 and `phase=`).

        Args:
          state: consumed; no window may be pending.
          batches: batches stacked on a leading axis: whole windows of them, and with phases whole cycles.
          lr: learning rates of all these steps, by part.
          set: hyperparameters of all these steps, `{part: {name: scalar}}`.
          measured: with telemetry of every step under "parts"; a program of its own.

        Returns:
          The new state, and the metrics of every window, stacked on a leading axis; with phases, of every window of a
          phase under its name.

        Raises:
          UpdateError: the leading axis is no multiple of `accumulate`, or of a cycle's batches, or a window is pending.
        """
        state, metrics, _ = self.scanned(state, batches, self._settings(lr, set), measured=measured)
        return state, metrics

    def pure(
        self,
        state: TrainState,
        batch: Any,
        *,
        lr: Mapping[str, Any] | None = None,
        set: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> tuple[TrainState, Metrics]:
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
        if self.optim.layout is not None:
            batch = self.optim.layout.constrained(batch, stacked=self.cycle > 1)
        settings = self._settings(lr, set)
        steps = self.stages[stage_of(self.optim, state.step, self.schedule.cycle, "pure")]
        if self.schedule.alternates:
            state, found = make_cycles(steps, self.schedule.cycle)(state, batch, settings)
        else:
            state, found = make_turn(steps, self.schedule.cycle[0])(state, batch, settings)
        return state, apart(found)[0]

    def compile(
        self,
        state: TrainState,
        batch: Any = None,
        *,
        scan: Any = None,
        measured: bool = True,
        flush: bool = True,
        until: int | None = None,
    ) -> None:
        """Compiles the programs of calls to come side by side, in threads, so that none of them waits for another.

        The first call then begins after about as long as the slowest program takes, where there are free cores. `fit`
        does so. Nothing is run, and the state is not consumed.

        Args:
          state: as the first call will be given it.
          batch: one like those to come, for calls with one batch: the first, the middle and the last of a window, of
            every phase. Arrays or `jax.ShapeDtypeStruct`s; None for no such calls.
          scan: batches on a leading axis, for `scan`; None for none.
          measured: the programs with telemetry, too.
          flush: that of a window that is cut short, too.
          until: the step at which the run ends: programs with parts that join later are left out.
        """
        check_state(state)
        with_telemetry, asked = (True, False) if measured else (False,), []
        if scan is not None:
            _, count, _ = self._scan_of(state, scan)
            calls = scans_to_come(self._programs, self.schedule, state, count // self.accumulate, until)
            asked += [(call._replace(measured=each), state, scan) for call in calls for each in with_telemetry]
        if batch is not None:
            found = calls_to_come(self._programs, self.schedule, state, batch, with_telemetry, until)
            asked += [each for each in found if flush or each[0].kind != "flush"]
        self._programs.compile(asked)

    def lower(
        self,
        state: TrainState,
        batch: Any,
        *,
        lr: Mapping[str, Any] | None = None,
        set: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> Any:
        """The program that a call with these arguments would run, as `jax.jit(...).lower` gives it; nothing is run.

        Of `abstract(...)` it is that of the first call.
        """
        settings = self._settings(lr, set)
        if isinstance(state.step, jax.ShapeDtypeStruct):
            zero = np.zeros((), np.int64)
            state = dataclasses.replace(state, step=zero, batches=zero, pending=zero)
        return (
            self._programs.program(self.call_of(state), state, batch, settings).traced(state, batch, settings).lower()
        )

    def flush(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """Ends a window that was cut short, as at the end of an epoch, in the way that `remainder` says.

        Returns:
          The new state, and the means over the window if it made a step, else no metrics.
        """
        state, metrics, _ = self.flushed(state)
        return state, metrics

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
        return adopted_state(self.options, other.options, state, configuration=self.configuration)

    def ema(self, state: TrainState) -> PyTree:
        """The whole params with the averages of `make_update(ema=...)` in place, debiased, each leaf of its own dtype.

        A part that made no step yet has its parameters there. Leaves without an average are the state's own: the next
        update consumes them.

        Raises:
          UpdateError: the update keeps no average.
        """
        if self.options.averages is None or state.ema is None:
            raise UpdateError('this update keeps no average: make_update(..., ema={"body": 0.999})')
        check_not_deleted([*jax.tree.leaves(state.ema), *jax.tree.leaves(state.params)])
        return self.options.whole.tree(self.options.averages.in_params(state.ema, state.params))

    def params(self, state: TrainState) -> PyTree:
        """The params of a state, with what of those given to `init` is no array; the next update consumes them."""
        return self.options.whole.tree(state.params)
