"""Metrics that are a function of all examples at once: which they are, and what the function is given."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from functrain.errors import EvaluationError

_BY_BATCH = ("init", "accumulate", "compute")


def is_on_host(metric: Any) -> bool:
    """Whether its `function` is called with all examples; a metric that adds batch by batch has methods for that."""
    return callable(getattr(metric, "function", None)) and not _is_by_batch(metric)


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raises for what is no metric.

    Raises:
      EvaluationError: says what was given, and what to write.
    """
    for name, metric in metrics.items():
        where = f"metrics={{{name!r}: ...}}"
        if isinstance(metric, type):
            raise EvaluationError(f"{where} is the class {metric.__name__}: give one of it, {metric.__name__}(...)")
        if not is_on_host(metric) and not _is_by_batch(metric):
            called = getattr(metric, "__name__", "function") if callable(metric) else "function"
            raise EvaluationError(
                f"{where} is {metric!r:.100}, which is no metric: give an object with names and function, or with"
                f" names, init, accumulate and compute; of a function, ft.OnHost({called}, 'label', 'prediction')"
            )
        names = getattr(metric, "names", None)
        if not isinstance(names, tuple | list) or not names or not all(isinstance(each, str) for each in names):
            asked = (names,) if isinstance(names, str) else ("label", "prediction")
            raise EvaluationError(
                f"{where} has names={names!r:.100}: give the names of the outputs that it takes, names = {asked}"
            )


def computed(name: str, metric: Any, outputs: Mapping[str, np.ndarray], weights: np.ndarray) -> Any:
    """What a metric's function returns for the outputs of all examples; `weights`, (examples,), are above 0.

    Raises:
      EvaluationError: examples weigh more or less than others, and the function does not take that.
    """
    arrays: Sequence[np.ndarray] = [outputs[each] for each in metric.names]
    others = weights[weights != 1]
    if not len(others):
        return metric.function(*arrays)
    if not _takes_weight(metric.function):
        raise EvaluationError(
            f"the metric {name!r} counts all examples alike, and {len(others)} of {len(weights)} have a weight other"
            f" than 0 and 1, such as {others[0]:g}: let its function declare sample_weight=None, as scikit-learn's do,"
            " or give weights of 0 and 1"
        )
    return metric.function(*arrays, sample_weight=weights)


def _is_by_batch(metric: Any) -> bool:
    return all(callable(getattr(metric, each, None)) for each in _BY_BATCH)


def _takes_weight(function: Callable[..., Any]) -> bool:
    try:
        return "sample_weight" in inspect.signature(function).parameters
    except ValueError:  # Python can't tell of some that are written in C.
        return False
