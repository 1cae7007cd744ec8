"""The stages of a run whose parts join on the way: which one a call is in, and that it is in one alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from functrain.errors import UpdateError
from functrain.optim.optimizer import Optimizer
from functrain.tree.text import listed
from functrain.update.phases import Turn


def joins_within(optim: Optimizer, step: int, turns: Sequence[Turn]) -> int | None:
    """The step at which parts join while some turns are taken, after the first of them has begun; None without one.

    A turn of several steps, or a window, belongs to the stage in which it begins.

    Args:
      optim: says which parts join when.
      step: the steps that are finished before the first turn.
      turns: those to come.
    """
    last = step + sum(map(len, turns[:-1]))
    return next((begin for begin in optim.stages if step < begin <= last), None)


def stage_of(optim: Optimizer, step: Any, turns: Sequence[Turn], where: str) -> int:
    """The number of the stage in which some turns are taken.

    Raises:
      UpdateError: the step is traced, or a part joins in between.
    """
    if len(optim.stages) == 1:
        return 0
    if isinstance(step, jax.core.Tracer):
        raise UpdateError(
            f"{where} can't tell which parts have joined (frozen_until={dict(optim.frozen_until)}) at a step that is"
            " traced: use update(...) or update.scan(...), which read it on the host"
        )
    if (begin := joins_within(optim, int(step), turns)) is not None:
        joining = [part for part, at in optim.frozen_until.items() if at == begin]
        raise UpdateError(
            f"{where} would take {sum(map(len, turns))} steps after step {int(step)}, and {listed(joining)} joins at"
            f" step {begin}: call update(state, batch) up to there, and {where} from there on"
        )
    return optim.stage(int(step))


def stages_to_come(optim: Optimizer, step: int, until: int | None) -> list[int]:
    """The step where a run stands, and those at which parts join from there to its end, if it has one."""
    return [step, *(begin for begin in optim.stages if step < begin and (until is None or begin < until))]


def with_reach_checked(gradient: Callable[..., Any], of_all: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of some parts; when it is traced, so is that of all, and thereby checked. It is not computed."""

    def checked(params: Any, batch: Any, context: Any, scale: Any = None) -> Any:
        jax.eval_shape(lambda *given: of_all(*given)[0], params, batch, context)
        return gradient(params, batch, context, scale)

    return checked
