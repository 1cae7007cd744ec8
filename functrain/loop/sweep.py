"""A sweep of learning rates: the loss while they rise from step to step."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from numbers import Real
from typing import Any

import jax
import numpy as np

from functrain.errors import FitError, NonFiniteError
from functrain.loop.given import check_data
from functrain.loop.reader import Reader
from functrain.loop.shares import shared, where_batches_lie
from functrain.mesh.shares import Shardings, put
from functrain.tree.paths import flatten
from functrain.tree.text import listed
from functrain.update.checks import check_by_part, check_state
from functrain.update.consumed import check_not_deleted
from functrain.update.state import TrainState
from functrain.update.update import Update


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The losses of a sweep by rate; made by `lr_sweep`.

    >>> losses = np.array([9.0, 9.0, 8.0, 5.0, 2.0, 1.0, 1.0, 4.0, 20.0])
    >>> Sweep({"body": 2.0 ** np.arange(-9, 0)}, losses, width=1, diverged=True).suggested
    {'body': 0.015625}

    Attributes:
      rates: `{part: rates}`, each (steps,).
      losses: (steps,), float64, of the batches that the steps were made on; a step's own rate shows in the next one.
      width: how many neighbours on each side the smoothed loss is a mean over.
      diverged: whether the loss diverged, and the sweep ended there.
    """

    rates: dict[str, np.ndarray]
    losses: np.ndarray
    width: int
    diverged: bool

    @property
    def smoothed(self) -> np.ndarray:
        """The mean of each loss and `width` neighbours on each side, at the ends of as many as both sides have."""
        last = len(self.losses) - 1
        near = [min(self.width, i, last - i) for i in range(last + 1)]
        return np.array([np.mean(self.losses[i - n : i + n + 1]) for i, n in enumerate(near)])

    @property
    def suggested(self) -> dict[str, float] | None:
        """The rate of each part where the smoothed loss falls fastest, as `lr=` takes it.

        None where the sweep does not show one: the loss falls by less than three times its noise, or is falling
        fastest where the sweep ends.
        """
        smoothed, width, last = self.smoothed, self.width, len(self.losses) - 1
        lowest = int(np.argmin(smoothed))
        noise = np.std((self.losses - smoothed)[: lowest + 1])
        between = np.arange(width, min(lowest, last - width) + 1)
        if not len(between) or np.mean(self.losses[: width + 1]) - smoothed[lowest] <= 3 * noise:
            return None
        steepest = between[np.argmin(smoothed[between + width] - smoothed[between - width])]
        if steepest == last - width and not self.diverged:
            return None
        return {part: float(rates[steepest]) for part, rates in self.rates.items()}

    def figure(self) -> Any:
        """The losses by rate, as a `matplotlib.figure.Figure`; of several parts each at its own rates.

        Raises:
          FitError: matplotlib is not installed.
        """
        try:
            figure = import_module("matplotlib.figure").Figure()
        except ImportError as error:
            raise FitError(f"Sweep.figure: {error}; write pip install matplotlib") from error
        axes, suggested = figure.subplots(), self.suggested
        for nth, (part, rates) in enumerate(self.rates.items()):
            axes.plot(rates, self.losses, color=f"C{nth}", alpha=0.3)
            axes.plot(rates, self.smoothed, color=f"C{nth}", label=part)
            if suggested is not None:
                axes.axvline(suggested[part], color=f"C{nth}", linestyle=":", label=f"{suggested[part]:.3g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        return figure


def lr_sweep(
    update: Update,
    state: TrainState,
    batches: Iterable[Any],
    rates: Mapping[str, tuple[float, float]],
    *,
    steps: int | None = None,
    loss: str | None = None,
    sharding: Shardings = None,
) -> Sweep:
    """Trains a copy of a state with rates that rise from step to step, and returns the losses.

    >>> import jax.numpy as jnp, optax
    >>> from functrain import Optimizer, make_update, partition, with_lr
    >>> params = {"w": jnp.ones(2)}
    >>> optim = Optimizer(partition(params, {"all": ...}), {"all": with_lr(optax.sgd, 1e-3)})
    >>> update = make_update(lambda params, batch: jnp.sum((params["w"] - batch) ** 2), optim)
    >>> sweep = lr_sweep(update, update.init(params), [np.zeros(2)] * 4, {"all": (1e-3, 1.0)})
    >>> [float(f"{rate:.3g}") for rate in sweep.rates["all"]], sweep.losses.round(2).tolist()
    ([0.001, 0.01, 0.1, 1.0], [2.0, 1.99, 1.91, 1.22])

    It ends early where the loss diverges: one is not finite, or the mean of the last few is above the lowest such mean
    by more than three times the size of the first or, if that is more, of all that it fell.

    Args:
      update: the program that it trains with is the one of `update(state, batch, lr=...)`.
      state: stays as it is; the sweep begins with its parameters and optimizer state.
      batches: as `fit` takes its data; read once, with `steps` again and again.
      rates: `{part: (first, last)}`, of which all rise at once, in geometric steps. Other parts keep the rates they
        have.
      steps: how many rates there are. By default as many as the batches make: one for each, with `accumulate` for each
        window, with phases for each window of the phase whose loss it is; a rate stays until it has a loss.
      loss: which of the metrics; by default "loss", with phases "phase/loss" of the only one that trains these parts.
      sharding: where batches go, as for `fit`.

    Raises:
      FitError: rates that are no pairs, a number of steps that is not known or below 2, batches that end before the
        steps, or a loss that is not there or not one number.
      UpdateError: rates of a part that is not trained; a state that was consumed.
      OptimizerError: a part without `with_lr`.
      NonFiniteError: the first loss is not finite.
    """
    check_state(state)
    check_data(batches)
    sharding = where_batches_lie(sharding, update)
    _check_ranges(update, rates)
    _check_joined(update, state, rates)
    name = loss or _default_loss(update, rates)
    count = steps if steps is not None else _count(update, state, batches, name)
    if not isinstance(count, int) or count < 2:
        raise FitError(f"a sweep of {count!r} rates: give steps= of at least 2, or more batches")
    check_not_deleted(jax.tree.leaves(state))
    by_part = {part: np.geomspace(*ends, count) for part, ends in rates.items()}
    losses: list[float] = []
    means: list[float] = []
    width, is_diverged = max(1, count // 20), False
    for value in _losses(update, copy.deepcopy(state), _read(batches, sharding), by_part, name):
        if not losses and not math.isfinite(value):
            raise NonFiniteError(f"the {name!r} of the first step is {value}: begin with another state, or other data")
        if math.isfinite(value):
            losses.append(value)
            means.append(float(np.mean(losses[-width - 1 :])))
        is_diverged = not math.isfinite(value) or _is_diverged(means)
        if is_diverged or len(losses) == count:
            break
    return Sweep({part: each[: len(losses)] for part, each in by_part.items()}, np.array(losses), width, is_diverged)


def _losses(
    update: Update, state: TrainState, batches: Iterator[Any], rates: Mapping[str, np.ndarray], name: str
) -> Iterator[float]:
    """The loss of each step that has one, with the next rates for the step after it."""
    phase, nth = _phase(update, name), 0
    for batch in batches:
        before = int(state.step)
        state, metrics = update(state, batch, lr={part: float(each[nth]) for part, each in rates.items()})
        if int(state.step) != before and (not phase or phase in metrics):
            yield _value(metrics, name, repeats=bool(phase))
            nth += 1


def _read(batches: Iterable[Any], sharding: Shardings) -> Iterator[Any]:
    """The batches of one epoch after the other."""
    reader, epoch = Reader(shared(batches, sharding)), 0
    while True:
        reader.begin(epoch)
        while chunk := reader.next_chunk():
            yield put(chunk[0], sharding)
        if not reader.read:
            raise FitError(
                f"the batches ended before the steps of the sweep, in epoch {epoch}: give a list or another iterable"
                " that begins anew, or fewer steps="
            )
        reader.end_epoch()
        epoch += 1


def _value(metrics: Mapping[str, Any], name: str, *, repeats: bool) -> float:
    """One loss, fetched; of a phase that steps several times on a batch their mean."""
    found = flatten(metrics)
    if name not in found:
        raise FitError(f"loss={name!r}: the metrics are {listed(found)}; name one of them")
    value = np.asarray(found[name], np.float64)
    if value.ndim > repeats:
        raise FitError(f"loss={name!r} has shape {value.shape}: name a metric that is one number")
    return float(np.mean(value))


def _is_diverged(means: Sequence[float]) -> bool:
    least = min(means)
    return 0 < 3 * max(abs(means[0]), means[0] - least) < means[-1] - least


def _check_ranges(update: Update, rates: Any) -> None:
    example = f"{{{update.optim.trained[0]!r}: (1e-6, 1e-1)}}"
    if not rates:
        raise FitError(f"a sweep of no rates: give the first and the last of a part, {example}")
    check_by_part(rates, update.optim.trained)
    for part, ends in rates.items():
        is_pair = isinstance(ends, tuple | list) and len(ends) == 2 and all(isinstance(end, Real) for end in ends)
        if not is_pair or not 0 < ends[0] < ends[1] < math.inf:
            raise FitError(f"the rates of part {part!r} are {ends!r}: give the first and a larger last, {example}")


def _check_joined(update: Update, state: TrainState, rates: Mapping[str, Any]) -> None:
    step = int(state.step)
    if frozen := [part for part in rates if part not in update.optim.trained_at(step)]:
        begin = update.optim.frozen_until[frozen[0]]
        raise FitError(
            f"part {frozen[0]!r} is frozen until step {begin}, and the state is at step {step}, where its rate does"
            f" nothing: sweep it with a state of that step, dataclasses.replace(state, step=np.array({begin}))"
        )


def _phase(update: Update, name: str) -> str:
    """The name of the phase that a loss is of; empty without phases."""
    phases = [phase.name for phase in update.schedule.phases if phase.name]
    of = [phase for phase in phases if name.startswith(f"{phase}/")]
    if phases and not of:
        raise FitError(f"loss={name!r}: say of which phase, of {listed(phases)}: loss='{phases[0]}/loss'")
    return of[0] if of else ""


def _default_loss(update: Update, rates: Mapping[str, Any]) -> str:
    phases = [phase.name for phase in update.schedule.phases if {*phase.trained} & {*rates}]
    if len(phases) > 1:
        raise FitError(f"{listed(phases)} train {listed(rates)}: say whose loss it is, loss='{phases[0]}/loss'")
    return f"{phases[0]}/loss" if phases[0] else "loss"


def _count(update: Update, state: TrainState, batches: Any, name: str) -> int:
    """How many losses the batches make."""
    if not hasattr(batches, "__len__"):
        raise FitError("the batches have no length: say how many rates there are, steps=100")
    windows = (int(state.pending) + len(batches)) // update.accumulate
    names = [phase.name for phase in update.schedule.phases]
    of = names.index(_phase(update, name))
    return sum(of in turn for turn in update.schedule.turns(int(state.step), windows))
