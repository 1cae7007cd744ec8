"""Alternating phases: which loss updates which parts, and when."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from functrain.errors import PartitionError, PhaseError, UpdateError
from functrain.gradients.routes import Route, Weight
from functrain.optim.optimizer import Optimizer
from functrain.tree.text import listed

Turn = tuple[int, ...]
"""The phases, by index, that make a step each on one batch, or with accumulation on one window, in order."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A loss and the parts that learn from it, in a schedule made by `alternate`.

    >>> Phase("critic", lambda params, batch: params["critic"] * batch, parts="critic", repeat=3).repeat
    3

    Attributes:
      name: what its metrics come under.
      loss_fn: as for `make_train_step`.
      parts: the part or parts that it updates; no other is differentiated.
      repeat: its steps in a cycle, one after the other, each with a batch (or a window) of its own.
      same_batch: it takes no batch but that of the phase before it, in the same call, with a key of its own and the
        parameters that the phase before has left. Its repeats all take that batch.
      route: which losses each of its parts learns from, as for `make_train_step`.
      loss_weights: the weights of named losses in the sum, as for `make_train_step`.
      after: `fn(params, model_state, step) -> (params, model_state)`, compiled in after each step of this phase.
    """

    name: str
    loss_fn: Callable[..., Any]
    parts: str | Sequence[str]
    repeat: int = 1
    same_batch: bool = False
    route: Route | None = None
    loss_weights: Mapping[str, Weight] | None = None
    after: Callable[..., Any] | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts as a tuple."""
        return (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Alternation:
    """Phases in their order; made by `alternate`, for `make_update` to take in the place of a loss function."""

    phases: tuple[Phase, ...]
    phase: Callable[[int], str] | None = None

    @functools.cached_property
    def cycle(self) -> tuple[Turn, ...]:
        """The turns of a whole cycle, a batch or a window each.

        >>> d, g = Phase("d", lambda p, b: 0.0, "d", repeat=3), Phase("g", lambda p, b: 0.0, "g")
        >>> alternate(d, g).cycle
        ((0,), (0,), (0,), (1,))
        """
        turns: list[Turn] = []
        for index, phase in enumerate(self.phases):
            if phase.same_batch:
                turns[-1] += (index,) * phase.repeat
            else:
                turns += [(index,)] * phase.repeat
        return tuple(turns)

    @property
    def alternates(self) -> bool:
        """Whether it has a cycle of several turns."""
        return self.phase is None and len(self.cycle) > 1

    @functools.cached_property
    def _turn_at(self) -> dict[int, Turn]:
        starts = [sum(map(len, self.cycle[:i])) for i in range(len(self.cycle))]
        return dict(zip(starts, self.cycle, strict=True))

    @functools.cached_property
    def _turn_of(self) -> dict[str, Turn]:
        return {self.phases[turn[0]].name: turn for turn in self.cycle[::-1]}

    @property
    def every_turn(self) -> tuple[Turn, ...]:
        """Each turn that there may be, once.

        >>> d, g = Phase("d", lambda p, b: 0.0, "d", repeat=3), Phase("g", lambda p, b: 0.0, "g")
        >>> alternate(d, g).every_turn
        ((0,), (1,))
        """
        return tuple(dict.fromkeys(self.cycle if self.phase is None else self._turn_of.values()))

    def turn(self, step: int) -> Turn:
        """The turn that begins after a number of steps.

        Raises:
          PhaseError: none begins there, or `phase=` returned no phase that can begin one.
        """
        if self.phase is None:
            turn = self._turn_at.get(step % sum(map(len, self.cycle)))
            if turn is None:
                raise PhaseError(
                    f"step {step} is inside of a turn of several phases: the state was trained with another schedule;"
                    " go on with that one, or set step to the beginning of a turn with dataclasses.replace"
                )
            return turn
        name = self.phase(step)
        if not isinstance(name, str) or name not in self._turn_of:
            raise PhaseError(
                f"phase= returned {name!r} for step {step}: return the name of a phase that takes a batch of its own,"
                f" of {listed(self._turn_of)}"
            )
        return self._turn_of[name]

    def begin(self, step: int) -> int:
        """The first step from this one on at which a turn may begin."""
        if self.phase is not None:
            return step
        length = sum(map(len, self.cycle))
        return next(each for each in range(step, step + length) if each % length in self._turn_at)

    def turns(self, step: int, count: int) -> tuple[Turn, ...]:
        """The next turns after a number of steps."""
        found: list[Turn] = []
        for _ in range(count):
            found.append(self.turn(step))
            step += len(found[-1])
        return tuple(found)

    def check(self, optim: Optimizer) -> None:
        """Raises unless the phases train the parts that the optimizer trains, and no others, and each has one to train.

        Raises:
          PhaseError: a phase with a frozen part, a trained part that no phase updates, or without `phase=` a phase
            whose parts are all to join later.
          PartitionError: a phase with an unknown part.
        """
        for phase in self.phases:
            where = f"phase {phase.name!r}"
            try:
                optim.parts.check_names(phase.trained, where)
            except PartitionError as error:
                raise PhaseError(str(error)) from None
            if frozen := [part for part in phase.trained if part not in optim.trained]:
                raise PhaseError(
                    f"{where} updates {listed(frozen)}, which is frozen: give it a transform in the place of"
                    f" ft.FROZEN, or leave it out; the trained parts are {listed(optim.trained, 30)}"
                )
            if self.phase is None and not {*phase.trained} & {*optim.trained_at(0)}:
                raise PhaseError(
                    f"{where} would have no part to train in its first turns: frozen_until has {listed(phase.trained)};"
                    " leave one out, or say whose turn it is, ft.alternate(..., phase=lambda step: ...)"
                )
        idle = [part for part in optim.trained if not any(part in phase.trained for phase in self.phases)]
        if idle:
            raise PhaseError(f"no phase updates {listed(idle)}: name it in the parts of one, or freeze it: ft.FROZEN")


def alternate(*phases: Phase, phase: Callable[[int], str] | None = None) -> Alternation:
    """A schedule of phases, each with its own loss function and parts, for `make_update`.

    >>> gan = alternate(
    ...     Phase("discriminator", lambda params, batch: 0.0, parts="discriminator", repeat=3),
    ...     Phase("generator", lambda params, batch: 0.0, parts="generator"),
    ... )
    >>> [gan.phases[gan.turn(step)[0]].name for step in (0, 1, 2, 3, 4)][2:]
    ['discriminator', 'generator', 'discriminator']

    The phase of a call follows from the state's `step` alone, across epochs and resumed runs. The metrics of a call
    come under the name of its phase; those of a phase that steps several times in one call are stacked.

    Args:
      *phases: in the order of their turns; the first takes a batch of its own.
      phase: `phase(step) -> name`, of the phase whose turn it is (a critic's warm-up), in the place of the order and
        the repeats; phases with `same_batch` still follow the one before them. `step` counts the steps of all phases.

    Raises:
      PhaseError: no phase; two of one name; repeats below 1, or with `phase=` above; a first phase with `same_batch`.
    """
    if not phases or not all(isinstance(each, Phase) for each in phases):
        raise PhaseError(f"alternate takes phases, alternate(ft.Phase(name, loss_fn, parts), ...), not {phases!r}")
    names = [each.name for each in phases]
    for each in phases:
        if not isinstance(each.name, str) or not each.name or names.count(each.name) > 1:
            raise PhaseError(f"phase {each.name!r}: give each phase a name of its own; these are {listed(names)}")
        if not callable(each.loss_fn):
            raise PhaseError(f"phase {each.name!r}: {each.loss_fn!r} is no loss function: give loss_fn(params, batch)")
        if not each.trained:
            raise PhaseError(f"phase {each.name!r} updates no part: name one, parts=...")
        if not isinstance(each.repeat, int) or each.repeat < 1:
            raise PhaseError(f"phase {each.name!r}: repeat={each.repeat!r}: give a whole number of at least 1")
        if phase is not None and each.repeat > 1 and not each.same_batch:
            raise PhaseError(f"phase {each.name!r}: repeat={each.repeat} and phase= exclude each other: leave one out")
    if phases[0].same_batch:
        raise PhaseError(f"phase {names[0]!r} is the first, and has no batch before it: write same_batch=False")
    return Alternation(phases, phase)


def period(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The shortest sequence of turns of which these are repetitions.

    >>> period(((0,), (1,), (0,), (1,)))
    ((0,), (1,))
    """
    lengths = (length for length in range(1, len(turns) + 1) if len(turns) % length == 0)
    return next(turns[:length] for length in lengths if turns == turns[:length] * (len(turns) // length))


def scheduled(
    loss_fn: Any,
    optim: Optimizer,
    accumulate: int,
    *,
    route: Route | None,
    loss_weights: Mapping[str, Weight] | None,
) -> Alternation:
    """The phases of an update; a loss function alone is one phase without a name."""
    if not isinstance(loss_fn, Alternation):
        return Alternation((Phase("", loss_fn, optim.trained, route=route, loss_weights=loss_weights),))
    if route is not None or loss_weights is not None:
        raise UpdateError("with phases, route= and loss_weights= belong to one: ft.Phase(name, loss_fn, parts, route=)")
    loss_fn.check(optim)
    same = [phase.name for phase in loss_fn.phases if phase.same_batch]
    if accumulate > 1 and same:
        raise PhaseError(
            f"accumulate={accumulate}: phase {listed(same)} takes the batch of the phase before it, which is one of"
            f" a window: use microbatches={accumulate} and larger batches, or give it batches of its own"
        )
    return loss_fn
