"""Evaluation: every example once, weighted, in one compiled program."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.gradients import Loss
from functrain.loop.every import Every
from functrain.loop.metrics import OnHost
from functrain.paths import PyTree, listed


class EvaluationError(ValueError):
    """An evaluation step or a metric whose results have no mean."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Means of an evaluation step over data, for `fit` or for a loop of one's own.

    >>> evaluation = Evaluation(lambda params, batch: {"loss": (batch["x"] - params) ** 2}, [{"x": np.arange(3.0)}] * 2)
    >>> evaluation(1.0)
    {'loss': 0.6666666865348816}

    Attributes:
      eval_step: `eval_step(params, batch)`, pure; it may also declare `model_state`. It returns a dict of results by
        name, each with a value for every example, (batch,), which are averaged over all examples of all batches: a last
        short batch is padded, so that nothing recompiles, and the padding left out. A scalar in it, or a `Loss`, is a
        mean of the batch already, over its `weight`: then a short batch is not padded, and compiles a second program.
        A batch with the key "weight" is weighted by it, and is not padded.
      data: batches, in any iterable that can be read again and again.
      every: when `fit` evaluates; by default at the end of each epoch.
      name: what the results come under in `fit`: "valid/loss".
      metrics: by name, more than means: `ConfusionMatrix`, `TopK`, `OnHost`, or your own `Metric`. The outputs of
        `eval_step` that they take are not averaged.
    """

    eval_step: Callable[..., Any]
    data: Iterable[Any]
    every: Every = dataclasses.field(default_factory=lambda: Every(epochs=1))
    name: str = "valid"
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, params: PyTree, model_state: Any = None) -> dict[str, Any]:
        """Goes through the data once.

        Returns:
          The means by name, floats, and what the metrics compute.

        Raises:
          EvaluationError: a result that is neither a scalar nor has one value for each example, or no data.
        """
        sums, size = None, 0
        on_host: dict[str, list[Any]] = {name: [] for name in self._on_host}
        for given in self.data:
            batch, mask = self._padded(given, size, params, model_state)
            size = size or len(mask)
            if sums is None:
                sums = self._zeros(params, batch, model_state, mask)
            sums, gathered = self._step(sums, params, batch, model_state, mask)
            for name, arrays in gathered.items():
                on_host[name].append([np.asarray(array)[mask > 0] for array in arrays])
        if sums is None:
            raise EvaluationError("the evaluation data has no batch: give data that can be read more than once")
        means, accumulated = jax.device_get(sums)
        results: dict[str, Any] = {name: float(total / weight) for name, (total, weight) in means.items()}
        for name, metric in self.metrics.items():
            if name in on_host:
                columns = zip(*on_host[name], strict=True)
                results[name] = metric.function(*(np.concatenate(column) for column in columns))
            else:
                results[name] = metric.compute(accumulated[name])
        return results

    @property
    def _on_host(self) -> dict[str, OnHost]:
        return {name: metric for name, metric in self.metrics.items() if isinstance(metric, OnHost)}

    @functools.cached_property
    def _step(self) -> Callable[..., Any]:
        def step(sums: Any, params: Any, batch: Any, model_state: Any, mask: Any) -> Any:
            outputs, new = self._new(params, batch, model_state, mask)
            means, accs = sums
            accs = {name: self.metrics[name].accumulate(acc, outputs, mask) for name, acc in accs.items()}
            gathered = {name: [outputs[each] for each in metric.names] for name, metric in self._on_host.items()}
            return (jax.tree.map(jnp.add, means, new), accs), gathered

        return jax.jit(step)

    def _new(self, params: Any, batch: Any, model_state: Any, mask: Any) -> tuple[dict[str, Any], Any]:
        """The outputs of a batch, and what the means add of them."""
        outputs, weight = self._outputs(params, batch, model_state)
        taken = {name for metric in self.metrics.values() for name in metric.names}
        if unknown := sorted(taken - outputs.keys()):
            raise EvaluationError(f"metrics= takes {listed(unknown)}, but eval_step returned {listed(outputs)}")
        return outputs, {name: _sum(name, value, weight, mask) for name, value in outputs.items() if name not in taken}

    def _zeros(self, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        _, means = jax.eval_shape(self._new, *inputs)
        accs = {name: metric.init() for name, metric in self.metrics.items() if name not in self._on_host}
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), means), accs

    @functools.cached_property
    def _outputs(self) -> Callable[..., tuple[dict[str, Any], Any]]:
        takes_state = "model_state" in inspect.signature(self.eval_step).parameters

        def outputs(params: Any, batch: Any, model_state: Any) -> tuple[dict[str, Any], Any]:
            given = {"model_state": model_state} if takes_state else {}
            returned = self.eval_step(params, batch, **given)
            if isinstance(returned, Loss):
                named = returned.value if isinstance(returned.value, Mapping) else {}
                return {"loss": returned.total, **named, **returned.metrics}, returned.weight
            if not isinstance(returned, Mapping):
                raise EvaluationError(f"eval_step returned {type(returned).__name__}: return a dict by name, or a Loss")
            return dict(returned), None

        return outputs

    def _padded(self, batch: Any, size: int, params: Any, model_state: Any) -> tuple[Any, np.ndarray]:
        """A batch and the mask of its real examples; a short one is filled with its last, unless a scalar shows."""
        if isinstance(batch, Mapping) and "weight" in batch:
            return batch, np.asarray(batch["weight"], np.float32)
        length = _length(batch)
        mask = np.ones(length, np.float32)
        if length >= size:
            return batch, mask
        outputs, _ = jax.eval_shape(self._outputs, params, batch, model_state)
        if any(value.ndim == 0 for value in outputs.values()):
            return batch, mask
        padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], size - length, axis=0)]), batch)
        return padded, np.pad(mask, (0, size - length))


def _sum(name: str, value: Any, weight: Any, mask: Any) -> tuple[Any, Any]:
    """The weighted sum of a result, and the sum of its weights."""
    value = jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))
    if value.ndim == 0:
        weight = jnp.sum(mask) if weight is None else jnp.asarray(weight, value.dtype)
        return value * weight, weight
    if value.shape != mask.shape:
        raise EvaluationError(
            f"eval_step returned {name!r} of shape {value.shape}: return a scalar or one value for each of the"
            f" {mask.shape[0]} examples, or give it to one of metrics="
        )
    return jnp.sum(jnp.where(mask > 0, value * mask, 0)), jnp.sum(mask)


def _length(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves or not np.ndim(leaves[0]):
        raise EvaluationError("a batch of evaluation data has no leading axis of examples: stack them, (batch, ...)")
    return int(np.shape(leaves[0])[0])
