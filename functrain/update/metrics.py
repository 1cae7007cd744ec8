"""What the metrics of an update are made of: what a loss function returned, and what a step adds."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from functrain.errors import LossError
from functrain.gradients.loss import Loss
from functrain.tree.text import listed

Metrics = dict[str, Any]
RESERVED = {"loss_scale", "nonfinite", "parts", "skipped"}  # What a step adds.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class KnownWeight:
    """A weight that is known when it is traced: it is no output of the program, which costs at each call."""

    value: float


class Weighed(NamedTuple):
    """The metrics of a batch or a window, and what they are means over; None where no step was made."""

    metrics: Metrics
    weight: Any


def metrics_of(loss: Loss, total: Any) -> Metrics:
    """The metrics of a batch: what was minimised, the named losses, and those of the loss function."""
    named = dict(loss.value) if isinstance(loss.value, Mapping) else {}
    other = dict(loss.metrics) if isinstance(loss.metrics, Mapping) else {"metrics": loss.metrics}
    if twice := sorted(({"loss"} & {*named, *other}) | (named.keys() & other.keys()) | (RESERVED & {*named, *other})):
        raise LossError(f"{listed(twice)} names a loss or a metric, and something else in the metrics: rename it")
    return {"loss": total, **named, **other}


def of_loss(metrics: Metrics) -> Metrics:
    """The metrics without what a step has added to them."""
    return {name: value for name, value in metrics.items() if name not in RESERVED}


def known(weight: Any) -> Any:
    """The weight, as what is known of it where that is all."""
    is_known = isinstance(weight, int | float | np.number | np.ndarray)
    return KnownWeight(float(weight)) if is_known else weight
