"""The calls of an update: which comes next, what it compiles, and what it returns for the loop."""

import dataclasses
import functools
from typing import Any, TypeAlias

import numpy as np

from functrain.optim.optimizer import Optimizer
from functrain.update.checks import check_position, check_state, check_whole, checked_count, checked_settings
from functrain.update.metrics import Metrics
from functrain.update.options import Options, Settings
from functrain.update.phases import Alternation, period
from functrain.update.programs import Call, Programs
from functrain.update.stages import stage_of
from functrain.update.state import TrainState
from functrain.update.step import Step

Taken: TypeAlias = tuple[TrainState, Metrics, Any]
"""The next state, metrics, and their weights: an array, a `KnownWeight`, None without a step; with phases by phase."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Calls:
    """What an update is made of, and its calls.

    Attributes:
      schedule: its phases.
      stages: the steps of the phases, in each stage.
      options: what all steps share.
    """

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

    # The same calls, which also return what the metrics are means over, as the loop needs it.

    def taken(
        self, state: TrainState, batch: Any, settings: Settings | None = None, *, measured: bool = False
    ) -> Taken:
        """A call, or `measured`."""
        call = self.call_of(state)
        if call.only_adds:
            return self._programs.run(call, state, batch, None, batches=1, steps=0)
        call = call._replace(measured=measured)
        return self._programs.run(call, state, batch, settings, batches=1, steps=len(call.turns[0]))

    def scanned(
        self, state: TrainState, batches: Any, settings: Settings | None = None, *, measured: bool = False
    ) -> Taken:
        """`scan`."""
        call, count, steps = self._scan_of(state, batches)
        return self._programs.run(
            call._replace(measured=measured), state, batches, settings, batches=count, steps=steps
        )

    def flushed(self, state: TrainState) -> Taken:
        """`flush`."""
        check_state(state)
        if int(state.pending) == 0 or self.options.remainder == "carry":
            return state, {}, None
        if self.options.remainder == "drop":
            return dataclasses.replace(state, window=None, pending=np.zeros((), np.int64)), {}, None
        return self._programs.run(self.call_of(state, flushes=True), state, None, None, batches=0, steps=1)

    # How it is compiled.

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

    def _settings(self, lr: Any, hyperparameters: Any) -> Settings | None:
        return checked_settings(lr, hyperparameters, self.optim.owners)

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs(self.schedule.phases, self.stages)
