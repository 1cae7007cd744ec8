"""Results of an evaluation that are more than means."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import EvaluationError
from functrain.loop.packages.drawing import blank, draw_confusion


class Metric(Protocol):
    """What is more than a mean: gathered batch by batch, computed at the end. `names` are the outputs that it takes.

    It may have `figure(result)`, which draws what it computed, as a `matplotlib.figure.Figure`.
    """

    names: tuple[str, ...]

    def init(self) -> Any:
        """What nothing was added to yet."""

    def accumulate(self, acc: Any, outputs: Mapping[str, Any], mask: Any) -> Any:
        """Adds the outputs of a batch, (batch, ...) each; `mask`, float (batch,), is 0 for padding."""

    def compute(self, acc: Any) -> Any:
        """The number, or numbers by name, or an array, of all that was added; on the host."""


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix:
    """Counts of examples by label (rows) and prediction (columns), int (classes, classes), whatever they weigh above 0.

    >>> metric = ConfusionMatrix(classes=2)
    >>> outputs = {"label": jnp.array([0, 1, 1]), "prediction": jnp.array([0, 1, 0])}
    >>> metric.compute(metric.accumulate(metric.init(), outputs, jnp.ones(3))).tolist()
    [[1, 0], [1, 1]]

    Attributes:
      classes: how many there are.
      label: the output with the labels, int (batch,).
      prediction: the output with the predicted classes, int (batch,).
    """

    classes: int
    label: str = "label"
    prediction: str = "prediction"

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that it takes."""
        return self.label, self.prediction

    def init(self) -> Any:
        """No counts, and no examples of other classes."""
        return jnp.zeros((self.classes, self.classes), jnp.int32), jnp.zeros((), jnp.int32)

    def accumulate(self, acc: Any, outputs: Mapping[str, Any], mask: Any) -> Any:
        """Counts a batch."""
        label, prediction = (_numbered(outputs[name]) for name in self.names)
        is_in = (jnp.minimum(label, prediction) >= 0) & (jnp.maximum(label, prediction) < self.classes)
        ones = (is_in & (mask > 0)).astype(jnp.int32)
        counts = acc[0].at[label, prediction].add(ones, out_sharding=jax.typeof(acc[0]).sharding)
        return counts, acc[1] + jnp.sum(~is_in & (mask > 0), dtype=jnp.int32)

    def compute(self, acc: Any) -> Any:
        """The counts.

        Raises:
          EvaluationError: there were other classes, of which JAX's indexing would count -1 as the last.
        """
        if acc[1]:
            raise EvaluationError(
                f"ConfusionMatrix(classes={self.classes}): {acc[1]} example(s) have a label or a prediction outside of"
                f" 0 to {self.classes - 1}; give them the weight 0, or a class of their own"
            )
        return np.asarray(acc[0])

    def figure(self, result: np.ndarray) -> Any:
        """The counts, coloured by their share of the label, as a `matplotlib.figure.Figure`.

        Raises:
          EvaluationError: matplotlib is not installed.
        """
        made, axes = blank(1, 1, 6, 6)
        draw_confusion(axes, result, [str(nth) for nth in range(self.classes)])
        return made


def _numbered(classes: Any) -> Any:
    """Classes as numbers; what is true is 1."""
    return classes.astype(jnp.int32) if classes.dtype == jnp.bool_ else classes


@dataclasses.dataclass(frozen=True)
class TopK:
    """The share of examples whose label is among the k highest scores.

    >>> metric = TopK(k=2, scores="logits")
    >>> outputs = {"label": jnp.array([0, 1]), "logits": jnp.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])}
    >>> metric.compute(metric.accumulate(metric.init(), outputs, jnp.ones(2)))
    0.5

    Attributes:
      k: how many.
      scores: the output with the scores, (batch, classes).
      label: the output with the labels, int (batch,).
    """

    k: int
    scores: str = "scores"
    label: str = "label"

    def __post_init__(self) -> None:
        if not hasattr(self.k, "__index__") or self.k < 1:
            raise EvaluationError(f"TopK(k={self.k!r}): give a whole number of at least 1, TopK(5)")

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that it takes."""
        return self.label, self.scores

    def init(self) -> Any:
        """No examples."""
        return jnp.zeros(()), jnp.zeros(())

    def accumulate(self, acc: Any, outputs: Mapping[str, Any], mask: Any) -> Any:
        """Counts a batch.

        Raises:
          EvaluationError: the scores are of fewer classes than k.
        """
        shape = jnp.shape(outputs[self.scores])
        if len(shape) != 2 or shape[1] < self.k:
            most = f", or TopK({shape[1]}) at most" if len(shape) == 2 else ""
            raise EvaluationError(
                f"TopK({self.k}): the scores {self.scores!r} are of shape {shape}; give (batch, classes) with at least"
                f" {self.k} classes{most}"
            )
        _, best = jax.lax.top_k(outputs[self.scores], self.k)
        hits = jnp.any(best == outputs[self.label][:, None], axis=1)
        return acc[0] + jnp.sum(mask * hits), acc[1] + jnp.sum(mask)

    def compute(self, acc: Any) -> Any:
        """Hits by examples."""
        return float(acc[0] / acc[1])


@dataclasses.dataclass(frozen=True)
class OnHost:
    """A function of all examples at once, such as scikit-learn's: `OnHost(roc_auc_score, "label", "score")`.

    Its outputs are fetched batch by batch, and padding is left out. Any object with `names` and `function` is such a
    metric; one that has `figure(result)` too draws what the function returned.

    Attributes:
      function: called with one NumPy array for each name, (examples, ...). Where batches have weights other than 0 and
        1 it is given them as `sample_weight`, which it must declare, as scikit-learn's functions do.
      names: the outputs that it takes.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]

    def __init__(self, function: Callable[..., Any], *names: str) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "names", names)
