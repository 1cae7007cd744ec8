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
from functrain.optim.learning_rate import rates_in
from functrain.tree.warn import warn
from functrain.update.consumed import check_not_deleted
from functrain.update.state import TrainState

Rates: TypeAlias = Literal["program", "checkpoint"]


class Saver:
    """Saves a run, and gives it back.

    Args:
      checkpoints: where.
      hooks: whose states are saved too.
      rates: whose constant learning rates a run goes on with, where the program's are others than when it was saved.
    """

    def __init__(self, checkpoints: Checkpoints, hooks: Hooks, rates: Rates = "program") -> None:
        self.checkpoints = checkpoints
        self._hooks = hooks
        self._wins = rates
        self._saved: tuple[int, ...] | None = None
        # What the program says, and what it said when the rates that the run has were taken from it.
        self._given: dict[str, float] = {}
        self._taken: dict[str, float] = {}

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
            "rates": self._taken,
            "rows": run.rows,
            "data": described(run.reader.data),
        }
        try:
            self.checkpoints.save(run.state, data=run.reader.position, metrics=scalars(run.evaluated), extra=extra)
        except SaveError as error:
            warn(str(error))
            return
        self._saved = _counters(run)
        self._hooks.tell("checkpoint_saved", run)

    def restore(self, run: Run, *, regroup: bool) -> Restored | None:
        """Has a run go on from the newest sound checkpoint, if there is one.

        Raises:
          FitError: it stands within an epoch of other data.
        """
        self._given = self._taken = _constant_rates(run.state)
        restored = self.read(run, regroup=regroup)
        if restored is None:
            return None
        _tell_of_key(run.state.key, restored.state.key)
        run.state = restored.state
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
        self._saved = _counters(run)
        return restored

    def read(self, run: Run, *, regroup: bool) -> Restored | None:
        """The newest sound checkpoint, with the rates that the run goes on with; None if there is none."""
        restored = self.checkpoints.restore(like=run.state, regroup=regroup)
        if restored is None:
            return None
        before = (restored.extra or {}).get("rates", {})
        program = {}
        for part, rate in _constant_rates(restored.state).items():
            given = self._given.get(part, rate)
            # Where the program says what it said, the rate is another because the run has changed it.
            if given in (rate, before.get(part)):
                continue
            if self._wins == "program" and part in before:
                program[part] = given
            else:
                self._taken = {name: each for name, each in self._taken.items() if name != part}
                self._taken |= {part: before[part]} if part in before else {}
            warn(_told(part, rate, given, taken=part in program, known=part in before))
        opt_state = run.update.optim.with_learning_rates(restored.state.opt_state, program)
        return restored._replace(state=dataclasses.replace(restored.state, opt_state=opt_state))

    def last_sound(self) -> str | None:
        """The newest checkpoint, for a message; None if there is none."""
        with contextlib.suppress(SaveError):
            self.checkpoints.wait()
        return next(map(str, reversed(self.checkpoints.steps())), None)


def scalars(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results that are one number."""
    return {name: value for name, value in results.items() if np.ndim(value) == 0}


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


def _told(part: str, rate: float, given: float, *, taken: bool, known: bool) -> str:
    """Which learning rate a part goes on with, and how to have the other."""
    if taken:
        return (
            f"part {part!r} goes on with the learning rate {given:g} of the program, not with the {rate:g} of the"
            ' checkpoint; fit(..., rates="checkpoint") goes on with that'
        )
    text = f"part {part!r} goes on with the learning rate {rate:g} of the checkpoint, not the {given:g} of the program"
    if known:
        return f'{text}, as rates="checkpoint" says; leave it out to go on with the program\'s'
    return (
        f"{text}, as it does not say which rate it began with; to change it, have a hook do so in run_started:"
        " run.state = dataclasses.replace(run.state, opt_state=optim.with_learning_rates(run.state.opt_state,"
        f" {{{part!r}: {given:g}}}))"
    )


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


def _constant_rates(state: TrainState) -> dict[str, float]:
    """The learning rates that no schedule says, by part."""
    found = {part: rates_in(opt_state) for part, opt_state in state.opt_state.items()}
    settings = {part: rates[0].setting for part, rates in found.items() if rates and rates[0].setting is not None}
    check_not_deleted([*settings.values()])
    return {part: float(setting) for part, setting in settings.items()}
