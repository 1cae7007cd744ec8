"""NaN and infinity end a run, before they are saved as good, or returned."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import NonFiniteError
from functrain.tree.paths import flatten
from functrain.tree.text import listed
from functrain.tree.warn import warn
from functrain.update.state import TrainState
from functrain.update.update import Update

LastSound: TypeAlias = Callable[[], str | None] | None
"""Says which checkpoint is the newest, None if there is none yet; None for a run without checkpoints."""

_ADVICE = "give checkpoints=ft.Checkpoints(...), and the error says which batch and which operation it was"


class NotFinite(NamedTuple):
    """What of a state is not finite, by path.

    Attributes:
      params: `{part: paths}` of the trained parts.
      pending: the same of the gradients of a pending window.
      model_state: paths in the model state.
    """

    params: dict[str, list[str]]
    pending: dict[str, list[str]]
    model_state: list[str]

    def __str__(self) -> str:
        said = [
            f"the {what} {listed(names)}"
            for what, names in (
                ("parameters of part", self.params),
                ("pending gradients of part", self.pending),
                ("leaves of the model state", self.model_state),
            )
            if names
        ]
        return " and ".join(said)


def not_finite(update: Update, state: TrainState) -> NotFinite:
    """Looks at all that training changes but optimizer states, in one program; one small array of it is fetched.

    Pending gradients are not looked at where an update with such gradients is left out.
    """
    split = update.optim.parts.split(state.params)
    leaves = {("params", part, path): leaf for part in update.optim.trained for path, leaf in split[part].items()}
    if state.window is not None and not update.options.skips:
        leaves |= {("pending", part, path): leaf for part, path, leaf in _pending(update, state.window.grads)}
    leaves |= {("model_state", "", path): leaf for path, leaf in _of_model_state(state).items()}
    found = NotFinite({}, {}, [])
    for kind, part, path in _bad(leaves, _are_finite([*leaves.values()])):
        if kind == "model_state":
            found.model_state.append(path)
        else:
            getattr(found, kind).setdefault(part, []).append(path)
    return found


def _pending(update: Update, grads: Any) -> Iterator[tuple[str, str, Any]]:
    """Part, name and leaf of the gradients of a window, which may be those of each loss."""
    by_loss = grads if update.options.by_loss else {"": grads}
    for loss, split in by_loss.items():
        for part, flat in split.items():
            yield from ((part, f"{path} of {loss!r}" if loss else path, leaf) for path, leaf in flat.items())


class Watch:
    """Watches the state and the results of a run.

    Args:
      update: of the run.
      state: what it is begun with. A leaf of the model state that is not finite here, a mask or the least value so far,
        is its user's, and is left out.

    Attributes:
      raised: the error that it ended the run with.
    """

    def __init__(self, update: Update, state: TrainState) -> None:
        self._update = update
        self.raised: NonFiniteError | None = None
        self._sound: Callable[[], TrainState | None] = lambda: None  # A state keeps its arrays: it is not kept.
        self._sound_step: int | None = None
        self._told: set[str] = set()
        self._at_first: tuple[list[str], Any] | None = None
        self.begin(state)

    def begin(self, state: TrainState) -> None:
        """Looks at what a run is begun with, once; a state that an earlier run consumed shows nothing."""
        leaves = _of_model_state(state)
        is_gone = any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves.values())
        if self._at_first is None and not is_gone:
            # Not fetched before something is wrong: nothing waits for the device.
            self._at_first = [*leaves], _are_finite([*leaves.values()])

    def check(self, state: TrainState, losses: Callable[[], Mapping[str, Any]], last_sound: LastSound) -> None:
        """Raises for a state that must not be saved or returned; the losses are asked for unless it was looked at.

        Raises:
          NonFiniteError: a loss, a trained parameter, a gradient of a pending window, or a leaf of the model state is
            not finite.
        """
        if self._sound() is not state:
            self._check(state, losses(), last_sound)

    def tell_results(self, step: int, results: Mapping[str, Any]) -> None:
        """Warns of results of an evaluation that are not finite, once of each name."""
        for name, value in results.items():
            if name in self._told or np.ndim(value) or isinstance(value, str) or np.isfinite(value):
                continue
            self._told.add(name)
            warn(
                f"step {step}: the result {name!r} of an evaluation is {value}: it is never best and no improvement;"
                " see which examples give it, jax.config.update('jax_debug_nans', True) says in which operation"
            )

    def found(self, state: TrainState) -> NotFinite:
        """What of a state is not finite, but for what its user began with so."""
        found = not_finite(self._update, state)
        if found.model_state:
            found.model_state[:] = [path for path in found.model_state if path not in self.users()]
        return found

    def users(self) -> list[str]:
        """The paths of the model state that were not finite when the run began."""
        return _bad(*self._at_first) if self._at_first is not None else []

    def _check(self, state: TrainState, numbers: Mapping[str, Any], last_sound: LastSound) -> None:
        names = [name for name, value in numbers.items() if is_loss(name) and not np.all(np.isfinite(value))]
        losses, found = [] if self._update.options.skips else names, self.found(state)
        if not losses and not any(found):
            self._sound, self._sound_step = weakref.ref(state), int(state.step)
            return
        what = f"{listed(losses)} is not finite{f', nor are {found}' if any(found) else ''}"
        self.raised = self._error(state, what if losses else f"{found} are not finite", last_sound)
        raise self.raised

    def _error(self, state: TrainState, what: str, last_sound: LastSound) -> NonFiniteError:
        way = 'leave such updates out: make_update(..., nonfinite="skip")'
        if self._update.options.skips:
            way = 'keep it finite where it is made: nonfinite="skip" looks at gradients alone'
        checkpoint = None if last_sound is None else last_sound()
        if checkpoint is not None:
            said = [f"the last sound checkpoint is {checkpoint}", f"restore it and lower the rate, or {way}"]
        else:
            known = self._sound_step is not None
            said = [f"all was finite at step {self._sound_step}, the last that was looked at"] if known else []
            said += [_ADVICE] if last_sound is None else []
            said += [f"lower the rate, or {way}"]
        return NonFiniteError("; ".join([f"step {int(state.step)}: {what}", *said]))


def is_loss(name: str) -> bool:
    """Whether a metric is a loss, by its name.

    >>> is_loss("train/critic/loss"), is_loss("train/accuracy")
    (True, False)
    """
    return "loss" in name.split("/")


def losses_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The losses in the metrics of an update, fetched, as a row of the log calls them."""
    losses = {f"train/{name}": value for name, value in flatten(metrics).items() if is_loss(name)}
    return dict(jax.device_get(losses))


def _of_model_state(state: TrainState) -> dict[str, Any]:
    """The leaves of the model state that can be NaN."""
    leaves = flatten(state.model_state)
    return {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)}


def _bad(names: Any, are_finite: Any) -> list[Any]:
    return [name for name, is_sound in zip(names, np.asarray(are_finite), strict=True) if not is_sound]


def _are_finite(leaves: list[Any]) -> Any:
    """For each leaf whether all of it is finite, bool (leaves,)."""
    return _each_finite(leaves) if leaves else np.zeros(0, bool)


@jax.jit
def _each_finite(leaves: list[Any]) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
