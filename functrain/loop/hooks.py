"""What watches a run: hooks, and the one that stops it early."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from functrain.errors import FitError
from functrain.loop.checkpoint.retention import Mode, mode_of
from functrain.loop.run import Run
from functrain.tree.text import listed
from functrain.tree.warn import warn

_EVENT = re.compile("(on|before|after)_.*|[^_].*_(start|started|begin|began|end|ended|save|saved)")


class Hook:
    """Something that is done in a run; override what you need. `run` has all that there is to know.

    >>> class Norm(Hook):
    ...     def epoch_ended(self, run):
    ...         run.log({"norm": optax.global_norm(run.state.params)})
    """

    def run_started(self, run: Run) -> None:
        """Before the first update, after a checkpoint was restored."""

    def update_ended(self, run: Run) -> None:
        """After each optimizer step, or each scan; what reads the device here holds it up."""

    def evaluation_ended(self, run: Run) -> None:
        """After an evaluation; its results are in `run.results`."""

    def epoch_ended(self, run: Run) -> None:
        """At the end of an epoch, after its evaluations, before it is saved."""

    def checkpoint_saved(self, run: Run) -> None:
        """After a save was started."""

    def run_ended(self, run: Run, error: BaseException | None) -> None:
        """At the end, and when an exception ends the run."""

    def state(self) -> Any:
        """What to save of this hook with each checkpoint: what JSON can hold."""
        return None

    def load(self, state: Any) -> None:
        """Takes back what `state` returned."""


class OnResult(Hook):
    """A hook that watches whether a result of the evaluations becomes better.

    Args:
      result: the name of a result, such as "valid/loss".
      mode: "min" if a smaller result is better, "max" if a larger one; of a loss or an error it need not be said.
      least: an improvement is larger than this.
    """

    def __init__(self, result: str, mode: Mode | None, least: float) -> None:
        try:
            self.mode = mode_of(result, mode)
        except ValueError as error:
            raise FitError(f"{self.name}({result!r}): {error}") from None
        self.result, self.least = result, least
        self.forget()

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return type(self).__name__

    def forget(self) -> None:
        """Begins anew."""
        self.best, self.without, self._is_loaded = math.nan, 0, False

    def improves(self, value: float) -> bool:
        """Takes in the result of an evaluation, and says whether it is the best so far. NaN is no improvement."""
        gain = self.best - value if self.mode == "min" else value - self.best
        is_best = gain > self.least or (math.isnan(self.best) and not math.isnan(value))
        self.best, self.without = (value, 0) if is_best else (self.best, self.without + 1)
        return is_best

    def run_started(self, run: Run) -> None:
        """Forgets an earlier run."""
        if not self._is_loaded:
            self.forget()
        self._is_loaded = False

    def evaluation_ended(self, run: Run) -> None:
        """Looks at the result, if it is one of this evaluation.

        Raises:
          FitError: the evaluations have no result of that name.
        """
        if self.result in run.evaluated:
            self.evaluated(run, float(run.evaluated[self.result]))
        elif self.result not in run.results:
            raise FitError(f"{self.name}({self.result!r}): the results are {sorted(run.results)}; name one of them")

    def evaluated(self, run: Run, value: float) -> None:
        """What it does with a result."""

    def state(self) -> Any:
        """The best result, and the evaluations since."""
        return {"best": self.best, "without": self.without}

    def load(self, state: Any) -> None:
        """Goes on from there."""
        self.best, self.without, self._is_loaded = state["best"], state["without"], True


class EarlyStopping(OnResult):
    """Ends a run when a result has not become better for some evaluations.

    >>> stopping = EarlyStopping("valid/loss", patience=2)
    >>> [stopping.is_over(loss) for loss in (3.0, 2.0, 2.5, 2.0)]
    [False, False, False, True]

    Args:
      result: the name of a result, such as "valid/loss".
      patience: evaluations in a row without an improvement after which the run ends.
      mode: "min" if a smaller result is better, "max" if a larger one; of a loss or an error it need not be said.
      least: an improvement is larger than this.
    """

    def __init__(self, result: str, *, patience: int, mode: Mode | None = None, least: float = 0.0) -> None:
        if not hasattr(patience, "__index__") or patience < 1:
            raise FitError(f"EarlyStopping(patience={patience!r}): give a whole number of at least 1, patience=3")
        super().__init__(result, mode, least)
        self.patience = patience

    def is_over(self, value: float) -> bool:
        """Takes in the result of an evaluation, and says whether the run is over. NaN is no improvement."""
        self.improves(value)
        return self.without >= self.patience

    def run_started(self, run: Run) -> None:
        """Forgets an earlier run; ends one that was over already when it was saved."""
        super().run_started(run)
        if self.without >= self.patience:
            self._end(run)

    def evaluated(self, run: Run, value: float) -> None:
        """Stops the run when it is over."""
        if self.is_over(value):
            self._end(run)

    def _end(self, run: Run) -> None:
        run.stop(f"{self.result} has not improved for {self.without} evaluations")


class Hooks:
    """The hooks of a run, in order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = hooks
        for kind in {type(hook): None for hook in hooks}:
            _tell_uncalled(kind)
        self._watching = [hook for hook in hooks if type(hook).update_ended is not Hook.update_ended]

    def tell(self, event: str, run: Run, *details: Any) -> None:
        """Calls every hook for an event; after an update, only those that listen."""
        for hook in self._watching if event == "update_ended" else self._hooks:
            getattr(hook, event)(run, *details)

    def states(self) -> list[dict[str, Any]]:
        """What to save of each."""
        return [{"of": _kind(hook), "state": hook.state()} for hook in self._hooks]

    def load(self, saved: Sequence[dict[str, Any]]) -> None:
        """Gives back what was saved, to each hook what the first of its name left; says what found no one.

        The name is that of the class, in the module where it was if there is one: a module may be renamed.
        """
        left, states = list(saved), {}
        for is_of in (_is_of, _is_named_like):
            for place, hook in enumerate(self._hooks):
                mine = next((each for each in left if is_of(each["of"], hook)), None)
                if place not in states and mine is not None:
                    left.remove(mine)
                    states[place] = mine["state"]
        for place in sorted(states):
            self._hooks[place].load(states[place])
        lost = [each["of"] for each in left if each["state"] is not None]
        anew = [hook for place, hook in enumerate(self._hooks) if place not in states]
        _tell(lost, [_kind(hook) for hook in anew if type(hook).state is not Hook.state])


def _tell_uncalled(kind: type[Hook]) -> None:
    """Warns of methods that are called like an event, and that no event calls."""
    events = [name for name in vars(Hook) if not name.startswith("_")]
    named_so = [name for name in dir(kind) if _EVENT.fullmatch(name) and callable(getattr(kind, name))]
    for name in sorted({*named_so} - {*events}):
        near = difflib.get_close_matches(re.sub("^(on|before|after)_", "", name), events, 1, 0.5)
        meant = f"; did you mean {near[0]}?" if near else ""
        warn(f"{kind.__qualname__}.{name}: no event of a run calls it, they are {listed(events)}{meant}")


def _kind(hook: Hook) -> str:
    return f"{type(hook).__module__}.{type(hook).__qualname__}"


def _is_of(saved: str, hook: Hook) -> bool:
    return saved == _kind(hook)


def _is_named_like(saved: str, hook: Hook) -> bool:
    return saved.endswith(f".{type(hook).__qualname__}")


def _tell(lost: Sequence[str], anew: Sequence[str]) -> None:
    said = [f"the checkpoint has the state of {listed(lost)}, which no hook takes back"] if lost else []
    said += [f"{listed(anew)} finds no state in the checkpoint and begins anew"] if anew else []
    if said:
        warn(f"hooks: {'; '.join(said)}; to go on with it, give the class the name under which it was saved")
