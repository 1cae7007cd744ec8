"""A run to a checkpoint, and back."""

import base64
import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import SaveError
from functrain.loop.checkpoint.checkpoints import Checkpoints
from functrain.loop.checkpoint.reading import Restored
from functrain.loop.hooks import Hooks
from functrain.loop.run import Run
from functrain.loop.same_data import check_same, described
from functrain.optim.held import RATE, settings_in
from functrain.tree.warn import warn
from functrain.update.consumed import check_not_deleted
from functrain.update.placing import with_window_in_place
from functrain.update.state import TrainState

Rates: TypeAlias = Literal["program", "checkpoint"]
Constants: TypeAlias = dict[tuple[str, str], float]
"""The hyperparameters that no schedule says, by part and name."""


class Saver:
    """Saves a run, and gives it back.

    Args:
      checkpoints: where.
      hooks: whose states are saved too.
      rates: whose constant hyperparameters a run goes on with, where the program's are others than when it was saved.
    """

    def __init__(self, checkpoints: Checkpoints, hooks: Hooks, rates: Rates = "program") -> None:
        self.checkpoints = checkpoints
        self._hooks = hooks
        self._wins = rates
        self._saved: tuple[int, ...] | None = None
        self._step = self._stands = -1
        # What the program says, and what it said when the constants that the run has were taken from it.
        self._given: Constants = {}
        self._taken: Constants = {}

    def settled(self) -> int:
        """The step before which the run never goes back, that of the newest whole checkpoint; -1 without one."""
        if self.checkpoints.is_saved:
            self._stands = self._step
        return self._stands

    def save(self, run: Run) -> None:
        """Starts to save, unless this moment is saved already.

        Raises:
          NonFiniteError: what would be saved as good is not finite.
        """
        if self._saved == _counters(run):
            return
        run.check(self.last_sound)
        extra = {
            "epoch": run.epoch,
            "read": run.reader.read,
            "seconds": run.now.seconds,
            "results": {name: _written(value) for name, value in run.results.items() if _is_numeric(value)},
            # The next row is of the updates before it, too.
            "metrics": run.means.last(),
            "means": run.means.state(),
            "hooks": self._hooks.states(),
            "rates": {part: value for (part, name), value in self._taken.items() if name == RATE},
            "hyperparameters": [[*which, value] for which, value in self._taken.items() if which[1] != RATE],
            "rows": run.rows,
            "data": described(run.reader.data),
        }
        self.settled()
        try:
            self.checkpoints.save(run.state, data=run.reader.position, metrics=scalars(run.evaluated), extra=extra)
        except SaveError as error:
            warn(str(error))
            return
        self._saved, self._step = _counters(run), run.step
        self._hooks.tell("checkpoint_saved", run)

    def restore(self, run: Run, *, regroup: bool) -> Restored | None:
        """Has a run go on from the newest sound checkpoint, if there is one.

        Raises:
          FitError: it stands within an epoch of other data.
        """
        self._given = self._taken = _constants(run.state)
        restored = self.read(run, regroup=regroup)
        if restored is None:
            return None
        _tell_of_key(run.state.key, restored.state.key)
        run.state = with_window_in_place(run.update.options, restored.state)
        # One that was saved without `fit` has nothing but the state.
        extra = restored.extra or {"epoch": 0, "read": 0, "results": {}, "seconds": 0.0, "hooks": []}
        check_same(extra.get("data"), run.reader.data, path=restored.path, epoch=extra["epoch"], read=extra["read"])
        run.go_on(
            epoch=extra["epoch"],
            seconds=extra["seconds"],
            results={name: _taken_back(value) for name, value in extra["results"].items()},
            metrics=dict(extra.get("metrics", {})),
            means=dict(extra.get("means", {})),
            rows=extra.get("rows", 0),
        )
        run.reader.resume(restored.data, extra["read"])
        self._hooks.load(extra["hooks"])
        self._saved, self._step = _counters(run), run.step
        return restored

    def read(self, run: Run, *, regroup: bool) -> Restored | None:
        """The newest sound checkpoint, with the constants that the run goes on with; None if there is none."""
        restored = self.checkpoints.restore(like=run.state, regroup=regroup)
        if restored is None:
            return None
        before = _said_before(restored.extra or {})
        program: dict[str, dict[str, float]] = {}
        for which, value in _constants(restored.state).items():
            given = self._given.get(which, value)
            # Where the program says what it said, the value is another because the run has changed it.
            if given in (value, before.get(which)):
                continue
            part, name = which
            is_taken = self._wins == "program" and which in before
            if is_taken:
                program.setdefault(part, {})[name] = given
            else:
                self._taken = {other: each for other, each in self._taken.items() if other != which}
                self._taken |= {which: before[which]} if which in before else {}
            warn(_told(part, name, value, given, taken=is_taken, known=which in before))
        opt_state = run.update.optim.with_hyperparameters(restored.state.opt_state, program)
        return restored._replace(state=dataclasses.replace(restored.state, opt_state=opt_state))

    def last_sound(self) -> str | None:
        """The newest checkpoint, for a message; None if there is none."""
        with contextlib.suppress(SaveError):
            self.checkpoints.wait()
        newest = next(reversed(self.checkpoints.steps()), None)
        return None if newest is None else f"{self.checkpoints.where}/{newest.name}"


def scalars(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results that are one number; a text, as of scikit-learn's `classification_report`, is none."""
    return {name: value for name, value in results.items() if np.ndim(value) == 0 and not isinstance(value, str)}


def _counters(run: Run) -> tuple[int, ...]:
    return int(run.state.step), int(run.state.batches), int(run.state.pending), run.epoch


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    if hasattr(value, "dtype"):
        return any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.number, jnp.bool_))
    return isinstance(value, int | float)


def _written(value: Any) -> Any:
    """A result as JSON has it: Python's numbers as they are, an array as its bytes with dtype and shape."""
    if isinstance(value, list | tuple):
        return [_written(each) for each in value]
    if not hasattr(value, "dtype"):
        return value
    array = np.asarray(value)
    return {"dtype": array.dtype.name, "shape": array.shape, "bytes": base64.b64encode(array.tobytes()).decode()}


def _taken_back(written: Any) -> Any:
    """The inverse of `_written`."""
    if isinstance(written, list):
        return [_taken_back(each) for each in written]
    if not isinstance(written, dict):
        return written
    flat = np.frombuffer(base64.b64decode(written["bytes"]), jnp.dtype(written["dtype"]))
    return flat.reshape(written["shape"]).copy()


def _told(part: str, name: str, value: float, given: float, *, taken: bool, known: bool) -> str:
    """Which hyperparameter a part goes on with, and how to have the other."""
    what = "learning rate" if name == RATE else name
    if taken:
        return (
            f"part {part!r} goes on with the {what} {given:g} of the program, not with the {value:g} of the"
            ' checkpoint; fit(..., rates="checkpoint") goes on with that'
        )
    text = f"part {part!r} goes on with the {what} {value:g} of the checkpoint, not the {given:g} of the program"
    if known:
        return f'{text}, as rates="checkpoint" says; leave it out to go on with the program\'s'
    setting = "with_learning_rates" if name == RATE else "with_hyperparameters"
    to = f"{given:g}" if name == RATE else f"{{{name!r}: {given:g}}}"
    return (
        f"{text}, as it does not say which one it began with; to change it, have a hook do so in run_started:"
        f" run.state = dataclasses.replace(run.state, opt_state=optim.{setting}(run.state.opt_state,"
        f" {{{part!r}: {to}}}))"
    )


def _constants(state: TrainState) -> Constants:
    found = {
        (part, name): value
        for part, opt_state in state.opt_state.items()
        for name, value in settings_in(opt_state).items()
    }
    check_not_deleted([*found.values()])
    return {which: float(value) for which, value in found.items()}


def _said_before(extra: Mapping[str, Any]) -> Constants:
    """What the program of a checkpoint said."""
    rates = {(part, RATE): value for part, value in extra.get("rates", {}).items()}
    return rates | {(part, name): value for part, name, value in extra.get("hyperparameters", [])}


def _tell_of_key(given: Any, kept: Any) -> None:
    """Warns of a key that is another than the one that the run goes on with."""
    is_gone = isinstance(given, jax.Array) and given.is_deleted()  # With the state of an earlier run.
    if given is None or kept is None or is_gone or _bits(given) == _bits(kept):
        return
    warn(
        f"the run goes on with the random key of the checkpoint, {_bits(kept)}, and not with the one of update.init,"
        f" {_bits(given)}; for a run with that, give another folder, or fit(..., fresh=True)"
    )


def _bits(key: Any) -> Any:
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if is_typed else key).tolist()
