"""What an update computes: pure functions from a state and a batch to the next state and metrics."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import LossError, UpdateError
from functrain.gradients.accumulation import accumulate, zeros
from functrain.gradients.loss import Context, Loss
from functrain.optim.optimizer import Optimizer
from functrain.precision import DynamicScale
from functrain.state import TrainState
from functrain.telemetry import by_part
from functrain.tree.arrays import as_array, is_finite
from functrain.tree.paths import PyTree, flatten, structure_difference
from functrain.tree.text import listed

Metrics = dict[str, Any]
After = Callable[[PyTree, Any, Any], tuple[PyTree, Any]]
RESERVED = {"loss_scale", "nonfinite", "parts", "skipped"}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The parts of an update in one phase as functions; the options are those of `make_update` and `Phase`.

    Every one takes `(state, batch, lr, measured)` and returns `(state, metrics)`.
    """

    name: str
    index: int
    parts: tuple[str, ...]
    optim: Optimizer
    gradient: Callable[..., tuple[Any, Loss, Any]]
    accumulate: int
    microbatches: int
    skips: bool
    after: tuple[After, ...]
    loss_scale: DynamicScale | None

    def whole(
        self, state: TrainState, batch: Any, lr: Any, measured: bool, repeat: int = 0
    ) -> tuple[TrainState, Metrics]:
        """A batch that is a window of its own; the turn that it belongs to counts it. `repeat`: steps on it before."""
        grads, metrics, _, model_state = self._gradients(state, batch, repeat)
        return self._stepped(state, grads, metrics, model_state, lr, measured)

    def summed(self, state: TrainState, batch: Any, lr: Any, measured: bool) -> tuple[TrainState, Metrics]:
        """A batch that does not end its window: its gradients are added to what is pending."""
        del lr, measured
        grads, metrics, weight, model_state = self._gradients(state, batch)
        window = accumulate(state.window, (grads, _as_sums(metrics)), weight=weight)
        return dataclasses.replace(counted(state), window=window, model_state=model_state), metrics

    def last(self, state: TrainState, batch: Any, lr: Any, measured: bool) -> tuple[TrainState, Metrics]:
        """A batch that ends its window."""
        grads, metrics, weight, model_state = self._gradients(state, batch)
        grads, metrics = accumulate(state.window, (grads, _as_sums(metrics)), weight=weight).mean()
        return self._stepped(counted(state), grads, metrics, model_state, lr, measured)

    def flush(self, state: TrainState, batch: Any, lr: Any, measured: bool) -> tuple[TrainState, Metrics]:
        """No batch: what is pending ends its window."""
        del batch
        assert state.window is not None
        grads, metrics = state.window.mean()
        return self._stepped(state, grads, metrics, state.model_state, lr, measured)

    def window(self, state: TrainState, batches: Any, lr: Any, measured: bool) -> tuple[TrainState, Metrics]:
        """A whole window at once, its batches on a leading axis."""

        def summed(state: TrainState, batch: Any) -> tuple[TrainState, None]:
            return self.summed(state, batch, None, measured)[0], None

        one = jax.tree.map(lambda leaf: leaf[0], batches)
        window = jax.eval_shape(lambda state: summed(state, one)[0].window, state)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), window)
        state, _ = jax.lax.scan(summed, dataclasses.replace(state, window=empty), batches)
        return self.flush(state, None, lr, measured)

    def _key(self, state: TrainState, repeat: int) -> Any:
        """The key of a batch: it follows from its number and the phase alone."""
        if state.key is None:
            return None
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.batches), self.index)
        return jax.random.fold_in(key, repeat) if repeat else key

    def _gradients(self, state: TrainState, batch: Any, repeat: int = 0) -> tuple[Any, Metrics, Any, Any]:
        """The gradients, metrics, weight and new model state of one batch."""
        key = self._key(state, repeat)
        scale = None if state.loss_scale is None else state.loss_scale.scale

        def gradients(batch: Any, key: Any, model_state: Any) -> tuple[Any, Metrics, Any, Any]:
            context = Context(key, model_state, state.step)
            grads, loss, total = self.gradient(state.params, batch, context, scale)
            new = _like(loss.model_state, model_state, "the model_state that the loss function returned")
            if self.skips:
                new = _where(is_finite(grads), new, model_state)
            return grads, _metrics(loss, total), loss.weight, new

        if self.microbatches == 1:
            return gradients(batch, key, state.model_state)

        def microbatch(carry: Any, inputs: Any) -> tuple[Any, None]:
            acc, model_state = carry
            index, batch = inputs
            folded = None if key is None else jax.random.fold_in(key, index)
            grads, metrics, weight, model_state = gradients(batch, folded, model_state)
            return (accumulate(acc, (grads, _as_sums(metrics)), weight=weight), model_state), None

        slices = _sliced(batch, self.microbatches)
        one = jax.tree.map(lambda leaf: leaf[0], slices)
        shapes = jax.eval_shape(gradients, one, key, state.model_state)
        start = (zeros((shapes[0], jax.eval_shape(_as_sums, shapes[1]))), state.model_state)
        (acc, model_state), _ = jax.lax.scan(microbatch, start, (jnp.arange(self.microbatches), slices))
        return (*acc.mean(), acc.weights, model_state)

    def _stepped(
        self, state: TrainState, grads: Any, metrics: Metrics, model_state: Any, lr: Any, measured: bool
    ) -> tuple[TrainState, Metrics]:
        """The state after an optimizer step with these gradients, which ends the window."""
        step = state.step + 1

        def applied() -> tuple[Any, Any, Any, Any]:
            updates, opt_state = self.optim.update(grads, state.opt_state, state.params, lr=lr, value=metrics["loss"])
            params, new_model_state = self.optim.apply_updates(state.params, updates), model_state
            for after in self.after:
                returned = after(params, new_model_state, step)
                if not isinstance(returned, tuple) or len(returned) != 2:
                    raise LossError(f"after= must return (params, model_state), not {type(returned).__name__}")
                params = _like(returned[0], state.params, "the params that after= returned")
                new_model_state = _like(returned[1], model_state, "the model_state that after= returned")
            parts = {}
            if measured:
                rates = self.optim.learning_rates(opt_state)
                parts = by_part(grads, updates, self.optim.parts.split(state.params), rates)
            return params, opt_state, new_model_state, parts

        scale = state.loss_scale
        if self.skips:
            nonfinite = {part: ~is_finite(flat) for part, flat in grads.items()}
            skipped = jnp.any(jnp.stack(list(nonfinite.values())))
            no_telemetry = jax.eval_shape(applied)[3] if measured else {}
            none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), no_telemetry)
            as_it_was = (state.params, state.opt_state, model_state, none)
            params, opt_state, model_state, parts = jax.lax.cond(skipped, lambda: as_it_was, applied)
            metrics = metrics | {"skipped": skipped.astype(jnp.int32), "nonfinite": nonfinite}
            if self.loss_scale is not None:
                metrics = metrics | {"loss_scale": scale.scale}
                scale = self.loss_scale.adjusted(scale, ~skipped)
        else:
            params, opt_state, model_state, parts = applied()
        if measured:
            metrics = metrics | {"parts": parts}
        new = dataclasses.replace(
            state, params=params, opt_state=opt_state, model_state=model_state, step=step, pending=state.pending * 0,
            window=None, loss_scale=scale,
        )  # fmt: skip
        return new, metrics


def counted(state: TrainState) -> TrainState:
    """The state with one batch more."""
    return dataclasses.replace(state, batches=state.batches + 1, pending=state.pending + 1)


def _metrics(loss: Loss, total: Any) -> Metrics:
    named = dict(loss.value) if isinstance(loss.value, Mapping) else {}
    other = dict(loss.metrics) if isinstance(loss.metrics, Mapping) else {"metrics": loss.metrics}
    if twice := sorted(({"loss"} & {*named, *other}) | (named.keys() & other.keys()) | (RESERVED & {*named, *other})):
        raise LossError(f"{listed(twice)} names a loss or a metric, and something else in the metrics: rename it")
    return {"loss": total, **named, **other}


def _as_sums(metrics: Metrics) -> Any:
    """Metrics in a dtype in which they can be averaged."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32)), metrics)


def _sliced(batch: Any, count: int) -> Any:
    """A batch as slices on a new leading axis; each takes every count-th example, so that none leaves its device."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(lengths) > 1:
        shapes = {path: jnp.shape(leaf) for path, leaf in flatten(batch).items()}
        raise UpdateError(
            f"microbatches={count}: the leaves of a batch must have one leading axis, of examples: {shapes}"
        )
    for path, leaf in flatten(batch).items():
        if not jnp.shape(leaf) or jnp.shape(leaf)[0] % count:
            raise UpdateError(
                f"microbatches={count}: the leading axis of {path!r}, shaped {jnp.shape(leaf)}, is no multiple of it"
            )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1), batch)


def _where(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _like(new: Any, old: Any, what: str) -> Any:
    """The new tree, if it has the structure, shapes and dtypes of the old one: else the update would compile anew."""
    if differs := structure_difference(new, old):
        raise LossError(f"{what} must be of the structure that update.init was given: it {differs}")
    types = [
        {path: (jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in flatten(tree).items()} for tree in (new, old)
    ]
    for path, (shape, dtype) in types[0].items():
        if (shape, dtype) != types[1][path]:
            before = "{1}{0}".format(*types[1][path])
            raise LossError(f"{what} must keep its shapes and dtypes: {path!r} is {dtype}{shape}, and was {before}")
    return jax.tree.map(as_array, new)
