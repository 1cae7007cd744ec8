"""Which kind of call comes next, and how its program is found, compiled and called."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from functrain.optim.optimizer import Optimizer
from functrain.update.checks import check_position, check_state, check_whole, checked_count, checked_settings
from functrain.update.compiling import calls_to_come, scans_to_come
from functrain.update.metrics import Metrics
from functrain.update.options import Options, Settings
from functrain.update.phases import Alternation, period
from functrain.update.programs import Call, Programs
from functrain.update.stages import stage_of
from functrain.update.state import TrainState
from functrain.update.step import Step


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Calling:
    """What an `Update` is made of, and its programs."""

    schedule: Alternation
    stages: tuple[tuple[Step, ...], ...]
    options: Options

    @property
    def optim(self) -> Optimizer:
        """The optimizer that it was made with."""
        return self.options.optim

    @property
    def accumulate(self) -> int:
        """Batches in a window."""
        return self.options.accumulate

    @property
    def cycle(self) -> int:
        """Batches in a whole cycle of phases; without phases, or where `phase=` says whose turn it is, in a window."""
        return self.accumulate * (len(self.schedule.cycle) if self.schedule.alternates else 1)

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
        """The program that a call with these arguments would run, as `jax.jit(...).lower` gives it; nothing is run."""
        settings = self._settings(lr, set)
        program = self._programs.program(self.call_of(state), state, batch, settings)
        return program.traced(state, batch, settings).lower()

    @property
    def _cycle_in_words(self) -> str:
        turns = len(self.schedule.cycle)
        return f"accumulate={self.accumulate}" + (f", and {turns} turns in a cycle" if self.schedule.alternates else "")

    def call_of(self, state: TrainState, *, flushes: bool = False) -> Call:
        """What kind of call comes next, or what `flush` calls."""
        check_state(state)
        step, position, length = int(state.step), int(state.pending), self.accumulate
        stage = self.optim.stage(step) if len(self.stages) > 1 else 0
        if flushes:
            return Call("flush", (self.schedule.turn(step),), stage=stage)
        check_position(state, length)
        kind = "last" if position + 1 == length else "middle" if position else "first"
        return Call("whole" if length == 1 else kind, (self.schedule.turn(step),), stage=stage)

    def _scan_of(self, state: TrainState, batches: Any) -> tuple[Call, int, int]:
        """What is called to scan, how many batches it takes in, and how many steps it makes."""
        count = checked_count(batches, self.cycle, self._cycle_in_words)
        check_state(state)
        check_whole(state, "scan")
        turns = self.schedule.turns(int(state.step), count // self.accumulate)
        stage = stage_of(self.optim, state.step, turns, "scan")
        return Call("scan", period(turns), stage=stage), count, sum(map(len, turns))

    def _take(
        self, state: TrainState, batch: Any, lr: Any, named: Any, *, measured: bool
    ) -> tuple[TrainState, Metrics]:
        """Takes in one batch."""
        call, settings = self.call_of(state), self._settings(lr, named)
        if call.only_adds:
            return self._programs.run(call, state, batch, None, batches=1, steps=0)
        call = call._replace(measured=measured)
        return self._programs.run(call, state, batch, settings, batches=1, steps=len(call.turns[0]))

    def _settings(self, lr: Any, hyperparameters: Any) -> Settings | None:
        return checked_settings(lr, hyperparameters, self.optim.owners)

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs(self.schedule.phases, self.stages)
