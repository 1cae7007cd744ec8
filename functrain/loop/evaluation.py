"""Evaluation: every example once, weighted, in one compiled program."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from functrain.errors import EvaluationError
from functrain.gradients.loss import Loss
from functrain.loop.every import Every
from functrain.loop.names import named_values
from functrain.loop.on_host import check_metrics, computed, is_on_host
from functrain.loop.outcome import Outcome
from functrain.loop.shares import shared
from functrain.loop.tensors import arrays_of
from functrain.mesh.shares import Shardings, first_of, put
from functrain.tree.arrays import is_here, replicated_over, wide
from functrain.tree.paths import PyTree
from functrain.tree.text import listed

_OF_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NO_BATCH = "the evaluation data has no batch: give data that can be read more than once"


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
      metrics: by name, more than means: `ConfusionMatrix`, `TopK`, your own `Metric`, or any object with `names` and
        `function`, such as `OnHost`: its function is called with all examples of these outputs, as NumPy arrays. The
        outputs of `eval_step` that they take are not averaged. Of a batch's weight above 0 the function is told where
        it declares `sample_weight`.
      params: "ema" has `fit` evaluate the averages of `make_update(ema=...)` in the place of the last parameters. Give
        it a name of its own beside an evaluation of those.
      sharding: where batches go, as for `fit`; needed where params lie over several processes, each of which reads its
        own slice of a batch.
    """

    eval_step: Callable[..., Any]
    data: Iterable[Any]
    every: Every = dataclasses.field(default_factory=lambda: Every(epochs=1))
    name: str = "valid"
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sharding: Shardings = None
    params: Literal["last", "ema"] = "last"

    def __post_init__(self) -> None:
        if self.params not in ("last", "ema"):
            raise EvaluationError(f"Evaluation(..., params={self.params!r}): write 'last' or 'ema'")
        _check_step(self.eval_step)
        if not hasattr(self.data, "__iter__") and not hasattr(self.data, "__getitem__"):
            raise EvaluationError(
                f"data={self.data!r:.100} is no iterable of batches: write ft.Evaluation(eval_step, data)"
            )
        if not isinstance(self.every, Every):
            raise EvaluationError(f"every={self.every!r}: give an Every, ft.Every(updates={self.every!r})")
        check_metrics(self.metrics)

    def __call__(self, params: PyTree, model_state: Any = None) -> dict[str, Any]:
        """Goes through the data once.

        Returns:
          The means by name, floats, and what the metrics compute; numbers by name come as "metric/name".

        Raises:
          EvaluationError: a result that is neither a scalar nor has one value for each example, two of one name, no
            data, or params over several processes without `sharding`.
        """
        return self.outcome(params, model_state).results

    def outcome(self, params: PyTree, model_state: Any = None) -> Outcome:
        """Goes through the data once, as a call does, and returns more of what it found.

        >>> class Range:
        ...     names = ("x",)
        ...     def function(self, x):
        ...         return {"low": x.min(), "high": x.max()}
        >>> evaluation = Evaluation(lambda params, x: {"x": x}, [np.arange(3.0)], metrics={"range": Range()})
        >>> outcome = evaluation.outcome(params=None)
        >>> outcome.results, outcome.outputs["x"].tolist()
        ({'range/low': 0.0, 'range/high': 2.0}, [0.0, 1.0, 2.0])

        Returns:
          The results, what each metric returned, and what the metrics on the host took.

        Raises:
          EvaluationError: as a call does.
        """
        means, accumulated, outputs, weights = self._gathered(params, model_state)
        by_metric = {
            name: computed(name, metric, outputs, weights)
            if name in self._on_host
            else metric.compute(accumulated[name])
            for name, metric in self.metrics.items()
        }
        named = named_values(means | by_metric)
        return Outcome({name: _plain(value) for name, value in named}, by_metric, outputs)

    def _gathered(self, params: PyTree, model_state: Any) -> tuple[dict[str, Any], Any, dict[str, Any], np.ndarray]:
        """The means, what the metrics added up, what those on the host take, and the weights above 0."""
        self._check_place(params)
        sums, size = None, 0
        parts: list[dict[str, np.ndarray]] = []
        weights: list[np.ndarray] = []
        for given in shared(self.data, self.sharding):
            batch, mask = self._padded(given, size, params, model_state)
            size = size or len(mask)
            batch, mask = self._put(batch, mask)
            if sums is None:
                sums = self._zeros(params, batch, model_state, mask)
            sums, taken = self._step(sums, params, batch, model_state, mask)
            if self._on_host:
                all_weights = _fetched(mask)
                weights.append(all_weights[all_weights > 0])
                parts.append({name: _fetched(array)[all_weights > 0] for name, array in taken.items()})
        if sums is None:
            raise EvaluationError(_NO_BATCH)
        totals, accumulated = jax.tree.map(_fetched, sums)
        means = {name: float(total / weight) for name, (total, weight) in totals.items()}
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        return means, accumulated, outputs, np.concatenate(weights) if weights else np.ones(0)

    def names(self, params: PyTree, model_state: Any = None) -> list[str] | None:
        """What the results are called, by tracing one batch of the data; nothing is computed.

        Returns:
          The names; of a metric its own, also where it computes numbers by name. None where the data can be read only
          once: then it is not read.

        Raises:
          EvaluationError: what a call would raise for this batch before it computes.
        """
        if isinstance(self.data, Iterator):
            return None
        self._check_place(params)
        nothing = object()
        if (given := next(iter(shared(self.data, self.sharding)), nothing)) is nothing:
            raise EvaluationError(_NO_BATCH)
        batch, mask = self._put(*self._padded(given, 0, params, model_state))
        _, means = self._shapes.eval_shape(params, batch, model_state, mask)
        self._step.eval_shape((means, jax.eval_shape(self._no_counts)), params, batch, model_state, mask)
        return [*means, *self.metrics]

    def _put(self, batch: Any, mask: Any) -> tuple[Any, Any]:
        return put(batch, self.sharding), put(mask, first_of(self.sharding))

    def _check_place(self, params: PyTree) -> None:
        if self.sharding is None and not all(is_here(leaf) for leaf in jax.tree.leaves(params)):
            raise EvaluationError(
                "params lie over several processes, and each would evaluate its own batches alone: say how they make"
                " one, Evaluation(..., sharding=jax.NamedSharding(mesh, jax.P('data')))"
            )

    @functools.cached_property
    def _on_host(self) -> dict[str, Any]:
        return {name: metric for name, metric in self.metrics.items() if is_on_host(metric)}

    @functools.cached_property
    def _step(self) -> Any:
        def step(sums: Any, params: Any, batch: Any, model_state: Any, mask: Any) -> Any:
            outputs, new = self._new(params, batch, model_state, mask)
            means, accs = sums
            accs = {name: self.metrics[name].accumulate(acc, outputs, mask) for name, acc in accs.items()}
            taken = {each: outputs[each] for metric in self._on_host.values() for each in metric.names}
            for name, each in ((name, each) for name, metric in self._on_host.items() for each in metric.names):
                if jnp.shape(outputs[each])[:1] != mask.shape:
                    kind = type(self.metrics[name]).__name__
                    raise EvaluationError(
                        f"{kind} {name!r} takes {each!r} of shape {jnp.shape(outputs[each])}: return one value, or one"
                        f" array, for each of the {mask.shape[0]} examples"
                    )
            return (jax.tree.map(jnp.add, means, new), accs), taken

        return jax.jit(step)

    def _new(self, params: Any, batch: Any, model_state: Any, mask: Any) -> tuple[dict[str, Any], Any]:
        """The outputs of a batch, and what the means add of them."""
        outputs, weight = self._outputs(params, batch, model_state)
        taken = {name for metric in self.metrics.values() for name in metric.names}
        if unknown := sorted(taken - outputs.keys()):
            raise EvaluationError(f"metrics= takes {listed(unknown)}, but eval_step returned {listed(outputs)}")
        if twice := sorted((outputs.keys() - taken) & self.metrics.keys()):
            raise EvaluationError(f"eval_step and metrics= both give {listed(twice)}: rename one")
        return outputs, {name: _sum(name, value, weight, mask) for name, value in outputs.items() if name not in taken}

    def _no_counts(self) -> dict[str, Any]:
        return {name: metric.init() for name, metric in self.metrics.items() if name not in self._on_host}

    def _zeros(self, params: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        _, means = self._shapes.eval_shape(params, *inputs)
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), means), self._no_counts()
        # Laid out as the step returns them, or the second batch would compile a second program.
        placed_sums: tuple[Any, dict[str, Any]] = jax.device_put(sums, replicated_over(params))
        return placed_sums

    @functools.cached_property
    def _shapes(self) -> Any:
        """Traced once, where `jax.eval_shape` traces anew at each evaluation."""
        return jax.jit(self._new)

    @functools.cached_property
    def _outputs(self) -> Any:
        takes_state = "model_state" in inspect.signature(self.eval_step).parameters

        def outputs(params: Any, batch: Any, model_state: Any) -> tuple[dict[str, Any], Any]:
            given = {"model_state": model_state} if takes_state else {}
            returned = self.eval_step(params, batch, **given)
            if isinstance(returned, Loss):
                named = returned.value if isinstance(returned.value, Mapping) else {}
                metrics = returned.metrics if isinstance(returned.metrics, Mapping) else {"metrics": returned.metrics}
                return {"loss": returned.total, **named, **dict(named_values(metrics))}, returned.weight
            if not isinstance(returned, Mapping):
                raise EvaluationError(f"eval_step returned {type(returned).__name__}: return a dict by name, or a Loss")
            return dict(named_values(returned)), None

        return jax.jit(outputs)

    def _padded(self, batch: Any, size: int, params: Any, model_state: Any) -> tuple[Any, np.ndarray]:
        """A batch and the mask of its real examples; a short one is filled with its last, unless a scalar shows."""
        batch = arrays_of(batch)
        if isinstance(batch, Mapping) and "weight" in batch:
            return batch, np.asarray(batch["weight"], np.float32)
        length = _length(batch)
        mask = np.ones(length, np.float32)
        if length >= size:
            return batch, mask
        outputs, _ = self._outputs.eval_shape(params, batch, model_state)
        if any(value.ndim == 0 for value in outputs.values()):
            return batch, mask
        padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], size - length, axis=0)]), batch)
        return padded, np.pad(mask, (0, size - length))


def _check_step(eval_step: Any) -> None:
    if not callable(eval_step):
        raise EvaluationError(
            f"eval_step={eval_step!r:.100} ({type(eval_step).__name__}) is no function, which comes first: write"
            " ft.Evaluation(eval_step, data)"
        )
    declared = [*inspect.signature(eval_step).parameters.values()][2:]
    needed = [each.name for each in declared if each.default is each.empty and each.kind not in _OF_MANY]
    if unknown := [name for name in needed if name != "model_state"]:
        drawn = "; draw with a key that is made in it, jax.random.key(0)" if "key" in unknown else ""
        raise EvaluationError(
            f"eval_step declares {listed(unknown)}, which an evaluation does not give: write eval_step(params, batch),"
            f" or eval_step(params, batch, model_state){drawn}"
        )


def _sum(name: str, value: Any, weight: Any, mask: Any) -> tuple[Any, Any]:
    """The weighted sum of a result, and the sum of its weights."""
    value = wide(value)
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


def _fetched(array: Any) -> np.ndarray:
    if is_here(array) or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _plain(value: Any) -> Any:
    """NumPy's and JAX's numbers as Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0 else value
