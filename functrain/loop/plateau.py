"""A learning rate that falls when a result of the evaluations no longer becomes better."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from functrain.errors import FitError
from functrain.loop.checkpoint.retention import Mode
from functrain.loop.hooks import OnResult
from functrain.loop.run import Run
from functrain.optim.held import RATE, settings_in
from functrain.tree.scalars import wrong_scalar
from functrain.tree.text import did_you_mean, listed


class ReduceOnPlateau(OnResult):
    """Lowers learning rates when a result has not become better for some evaluations.

    >>> import functrain as ft
    >>> hooks = [ft.ReduceOnPlateau("valid/loss", "head", factor=0.5, patience=3)]

    As `ReduceLROnPlateau` of PyTorch: the evaluation after `patience` ones in a row without an improvement lowers the
    rates, and then they are counted anew. All of it is saved with each checkpoint.

    Args:
      result: the name of a result, such as "valid/loss".
      parts: the part or parts whose rate it is, each with a constant one, `ft.with_lr(optax.adam, 1e-3)`; None for all
        whose rate is state.
      factor: what a rate is multiplied by.
      patience: evaluations in a row without an improvement that lower nothing.
      mode: "min" if a smaller result is better, "max" if a larger one; of a loss or an error it need not be said.
      least: an improvement is larger than this.
      cooldown: evaluations after a rate was lowered that do not count.
      lowest: no rate falls below this.

    Raises:
      FitError: a factor that is not between 0 and 1, a negative patience, cooldown or lowest rate, a result whose mode
        must be said; and when a run starts, a part whose rate can't be set.
    """

    def __init__(
        self,
        result: str,
        parts: str | Sequence[str] | None = None,
        *,
        factor: float = 0.1,
        patience: int = 10,
        mode: Mode | None = None,
        least: float = 0.0,
        cooldown: int = 0,
        lowest: float = 0.0,
    ) -> None:
        if wrong_scalar(factor) or not 0 < factor < 1:
            raise FitError(f"ReduceOnPlateau(factor={factor!r}): give a number between 0 and 1")
        given = {"patience": patience, "cooldown": cooldown, "lowest": lowest}
        if wrong := [name for name, value in given.items() if wrong_scalar(value)]:
            raise FitError(f"ReduceOnPlateau({wrong[0]}={given[wrong[0]]!r}): give a number of at least 0")
        self._parts = (parts,) if isinstance(parts, str) else parts
        self.factor, self.patience, self.cooldown, self.lowest = factor, patience, cooldown, lowest
        super().__init__(result, mode, least)

    def forget(self) -> None:
        """Begins anew."""
        super().forget()
        self.cooling = 0

    def run_started(self, run: Run) -> None:
        """Forgets an earlier run.

        Raises:
          FitError: a part that is unknown, has no rate that is state, or one that a schedule says.
        """
        super().run_started(run)
        optim = run.update.optim
        rates = optim.learning_rates(run.state.opt_state)
        parts = [*rates] if self._parts is None else self._parts
        if unknown := [part for part in parts if part not in rates]:
            raise FitError(
                f"ReduceOnPlateau({self.result!r}): part {unknown[0]!r} has no rate to set, those that have are"
                f" {listed(rates) or 'none'}{did_you_mean(unknown, rates)}; make it with ft.with_lr(optax.adam, 1e-3)"
            )
        if not parts:
            raise FitError(
                f"ReduceOnPlateau({self.result!r}): no part has a rate to set: make one with ft.with_lr(optax.adam,"
                " 1e-3)"
            )
        if scheduled := [part for part in parts if RATE not in settings_in(run.state.opt_state[part])]:
            raise FitError(
                f"ReduceOnPlateau({self.result!r}): the rate of part {scheduled[0]!r} follows a schedule, and can't be"
                " set for good: give it a constant, or name the other parts"
            )

    def evaluated(self, run: Run, value: float) -> None:
        """Lowers the rates when it is time."""
        self.improves(value)
        if self.cooling:
            self.cooling, self.without = self.cooling - 1, 0
        if self.without > self.patience:
            self.cooling, self.without = self.cooldown, 0
            self._lower(run)

    def _lower(self, run: Run) -> None:
        optim, opt_state = run.update.optim, run.state.opt_state
        parts = self._parts or optim.learning_rates(opt_state)
        before = {part: float(settings_in(opt_state[part])[RATE]) for part in parts}
        # A rate that is below the lowest already is not raised to it.
        after = {part: min(rate, max(self.lowest, rate * self.factor)) for part, rate in before.items()}
        run.state = dataclasses.replace(run.state, opt_state=optim.with_learning_rates(opt_state, after))

    def state(self) -> Any:
        """The best result, the evaluations since, and those that do not count."""
        return {**super().state(), "cooling": self.cooling}

    def load(self, state: Any) -> None:
        """Goes on from there."""
        super().load(state)
        self.cooling = state["cooling"]
