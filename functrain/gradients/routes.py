"""Which losses each part learns from, and with which weights."""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from functrain.errors import LossError
from functrain.tree.scalars import wrong_scalar
from functrain.tree.text import listed

Weight = float | Callable[[Any], Any]
Route = Mapping[str, str | Sequence[str] | Mapping[str, Weight]]


class Weighting(NamedTuple):
    """A weighted sum of losses, and the parts whose gradient is of it."""

    parts: tuple[str, ...]
    weights: dict[str, Weight]


def normalised(route: Route, parts: Sequence[str]) -> dict[str, dict[str, Weight]]:
    """A route as `{part: {loss: weight}}`.

    >>> normalised({"encoder": {"main": 1.0, "aux": 0.3}, "head": "main"}, ["encoder", "head"])
    {'encoder': {'main': 1.0, 'aux': 0.3}, 'head': {'main': 1.0}}

    Raises:
      LossError: an unknown part, or a differentiated part that has no loss.
    """
    if unknown := [part for part in route if part not in parts]:
        raise LossError(f"route: {listed(unknown)} is no part that is differentiated: these are {listed(parts, 30)}")
    if absent := [part for part in parts if not route.get(part)]:
        raise LossError(f'route gives no loss to {listed(absent)}: add e.g. {{{absent[0]!r}: "main"}}, or freeze it')
    full: dict[str, dict[str, Weight]] = {}
    for part, losses in route.items():
        names = [losses] if isinstance(losses, str) else losses
        full[part] = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        check_weights(full[part], f"route of part {part!r}")
    return full


def weights_of_sum(losses: Sequence[str], loss_weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weight of each loss that was returned in their sum, 1 where none is given.

    Raises:
      LossError: a loss is named that was not returned.
    """
    _check_returned(loss_weights, losses, "loss_weights")
    check_weights(loss_weights, "loss_weights")
    return {name: loss_weights.get(name, 1.0) for name in losses}


def weightings(losses: Sequence[str], routes: Mapping[str, Mapping[str, Weight]]) -> list[Weighting]:
    """The distinct weighted sums of the losses that were returned; each is differentiated once.

    Raises:
      LossError: a loss is named that was not returned, or one was returned that no part takes.
    """
    for part, weights in routes.items():
        _check_returned(weights, losses, f"route of part {part!r}")
    taken = {name for weights in routes.values() for name in weights}
    if idle := [name for name in losses if name not in taken]:
        raise LossError(f"no part takes the loss {listed(idle)}: add it to the route, or report it under metrics")
    found: list[Weighting] = []
    for part, weights in routes.items():
        same = next((i for i, other in enumerate(found) if other.weights == weights), None)
        if same is None:
            found.append(Weighting((part,), dict(weights)))
        else:
            found[same] = found[same]._replace(parts=(*found[same].parts, part))
    return found


def weighted_sum(values: Mapping[str, Any], weights: Mapping[str, Weight], step: Any) -> Any:
    """The sum of some values with constant weights, or with schedules of the step."""
    terms = []
    for name, weight in weights.items():
        if callable(weight) and step is None:
            raise LossError(f"the weight of the loss {name!r} is a schedule: call train_step(..., step=...)")
        factor = weight(step) if callable(weight) else weight
        is_one = isinstance(factor, int | float) and factor == 1
        terms.append(values[name] if is_one else factor * values[name])
    return functools.reduce(operator.add, terms)


def check_weights(weights: Mapping[str, Weight], what: str) -> None:
    """Raises for a weight that is neither a finite number nor a schedule."""
    for name, weight in weights.items():
        if not callable(weight) and (wrong := wrong_scalar(weight, least=-math.inf)):
            raise LossError(f"{what}: the weight of the loss {name!r} is {wrong}: give a finite number, or a schedule")


def _check_returned(named: Mapping[str, Any], losses: Sequence[str], what: str) -> None:
    if unknown := [name for name in named if name not in losses]:
        raise LossError(f"{what} names {listed(unknown)}, but the loss function returned {listed(losses)}")
