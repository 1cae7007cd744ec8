"""What an update computes: pure functions from a state and a batch to the next state and metrics."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functrain.errors import LossError, UpdateError
from functrain.gradients.loss import Context, Loss
from functrain.gradients.objective import Objective
from functrain.optim.optimizer import Optimizer
from functrain.optim.own_tree import ByPart
from functrain.tree.arrays import is_finite
from functrain.tree.paths import PyTree
from functrain.update.checks import like_old
from functrain.update.ema import check_averages
from functrain.update.metrics import Metrics, Weighed, known, metrics_of
from functrain.update.microbatches import OfBatch, of_microbatches
from functrain.update.options import Options, Settings
from functrain.update.state import TrainState
from functrain.update.telemetry import by_part
from functrain.update.window import empty_like

After = Callable[[PyTree, Any, Any], tuple[PyTree, Any]]


class _Stepped(NamedTuple):
    """What an optimizer step leaves."""

    params: PyTree
    opt_state: Any
    model_state: Any
    ema: Any
    telemetry: Any


class _Grads(NamedTuple):
    """The gradients of a window, as they were computed, and as the optimizer is given them."""

    computed: Any
    given: Any

    def finite(self, optim: Optimizer, parts: Sequence[str]) -> dict[str, jax.Array]:
        """Whether all gradients of each part are finite."""
        given = optim.finite({part: {part: self.given[part]} for part in parts})
        if self.given is self.computed:
            return given
        computed = optim.finite({part: {part: self.computed[part]} for part in parts})
        return {part: given[part] & computed[part] for part in parts}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """The parts of an update in one phase as functions, which return the next state and metrics.

    Attributes:
      name: the phase's; empty for an update without phases.
      index: the phase's number.
      parts: the parts that it trains.
      using: the name of the optimizer's other transforms that it steps with; None for the parts' own.
      gradient: from `make_gradient`, of the phase's loss.
      objective: from `make_objective`, of the same.
      after: what is done after each optimizer step, in order.
      options: what all steps of the update share.
      see: called with the `Loss` of each batch when it is traced; a pure function is not told here.
      tell: called, when it is traced, with the metrics and gradients of each batch, before they are summed or stepped
        with.
    """

    name: str
    index: int
    parts: tuple[str, ...]
    using: str | None
    gradient: Callable[..., tuple[Any, Loss, Any]]
    objective: Objective
    after: tuple[After, ...]
    options: Options
    see: Callable[[Loss], None] = lambda loss: None
    tell: Callable[[Metrics, Any], None] = lambda metrics, grads: None

    def whole(
        self,
        state: TrainState,
        batch: Any,
        settings: Settings | None,
        *,
        measured: bool,
        repeat: int = 0,
        before: Mapping[str, Metrics] | None = None,
    ) -> tuple[TrainState, Weighed]:
        """A batch that is a window of its own; the turn that it belongs to counts it.

        `repeat`: the phase's steps on it before; `before`: the metrics of the losses of other phases on it, by phase.
        """
        grads, metrics, weight, model_state = self._gradients(state, batch, repeat, before)
        grads, metrics, weight = self._united(grads, metrics, weight)
        value = functools.partial(self._value, state, batch, repeat, before)
        value_fn = ByPart({part: functools.partial(value, part) for part in self.parts})
        grads, weighed = self._operated(state, grads, metrics, repeat), Weighed(metrics, known(weight))
        return self._end(state, grads, weighed, model_state, settings, measured=measured, value_fn=value_fn)

    def add(self, state: TrainState, batch: Any) -> tuple[TrainState, Weighed]:
        """A batch that does not end its window: its gradients are added to what is pending."""
        grads, metrics, weight, model_state = self._gradients(state, batch)
        window = self.options.added(state.window, grads, metrics, weight)
        after = dataclasses.replace(_one_batch_more(state), window=window, model_state=model_state)
        return after, Weighed(self._united({}, metrics, weight)[1], None)

    def last(
        self, state: TrainState, batch: Any, settings: Settings | None, *, measured: bool
    ) -> tuple[TrainState, Weighed]:
        """A batch that ends its window."""
        state, _ = self.add(state, batch)
        return self.flush(state, settings, measured=measured)

    def flush(self, state: TrainState, settings: Settings | None, *, measured: bool) -> tuple[TrainState, Weighed]:
        """No batch: what is pending ends its window."""
        assert state.window is not None
        window = state.window.summed()
        grads, metrics = window.mean()
        grads, weighed = self._operated(state, grads, metrics), Weighed(metrics, window.weight)
        arguments = (state, grads, weighed, state.model_state, settings)
        return self._end(*arguments, measured=measured, value_fn=_none_of(self.options.accumulate))

    def window(
        self, state: TrainState, batches: Any, settings: Settings | None, *, measured: bool
    ) -> tuple[TrainState, Weighed]:
        """A whole window at once, its batches on a leading axis."""

        def add(state: TrainState, batch: Any) -> tuple[TrainState, None]:
            return self.add(state, batch)[0], None

        one = jax.tree.map(lambda leaf: leaf[0], batches)
        empty = empty_like(lambda: self.add(state, one)[0].window)
        state, _ = jax.lax.scan(add, dataclasses.replace(state, window=empty), batches)
        return self.flush(state, settings, measured=measured)

    # The gradients of a batch.

    def _gradients(
        self, state: TrainState, batch: Any, repeat: int = 0, before: Any = None
    ) -> tuple[Any, Metrics, Any, Any]:
        """The gradients, metrics, weight and new model state of one batch."""
        key = self._key(state, repeat)
        scale = None if state.scale_state is None else state.scale_state.scale

        def gradients(batch: Any, key: Any, model_state: Any) -> tuple[Any, Metrics, Any, Any]:
            context = Context(key, model_state, state.step, before)
            grads, loss, total = self.gradient(state.params, batch, context, scale)
            if self.options.by_shard is None:
                grads = self.options.in_place(grads, self.parts)
            self.see(loss)
            if self.options.by_loss:
                total = self.objective.summed(loss.values, state.step)
            new = like_old(loss.model_state, model_state, "the model_state that the loss function returned", LossError)
            if self.options.skips and self.options.by_shard is None:  # Else no state may change.
                finite = is_finite(grads) if self.options.by_loss else self.options.optim.finite({"": grads})[""]
                new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, model_state)
            return grads, metrics_of(loss, total), loss.weight, new

        found = self._of_slices(gradients, batch, key, state.model_state)
        grads, metrics, *_ = found
        self.tell(metrics, self.of_the_sum(grads, state.step))
        return found

    def of_the_sum(self, grads: Any, step: Any) -> Any:
        """Split gradients, of what was computed, which may be those of each loss."""
        return self.objective.summed(grads, step) if self.options.by_loss else grads

    def _operated(self, state: TrainState, grads: Any, metrics: Metrics, repeat: int = 0) -> "_Grads":
        """The gradients of a window, and what they are stepped with."""
        computed, surgery = self.of_the_sum(grads, state.step), self.options.surgery
        if surgery is None:
            return _Grads(computed, computed)
        key = self._key(state, repeat)
        per_loss = grads if self.options.by_loss else None
        given = {
            "per_loss": per_loss,
            "step": state.step,
            "params": self.options.whole.tree(state.params),
            "metrics": metrics,
        }
        return _Grads(computed, surgery(computed, key=key, **given))

    def _value(self, state: TrainState, batch: Any, repeat: int, before: Any, part: str, params: PyTree) -> Any:
        """What a part learns from, of a batch, at other params: what `_gradients` took the gradient of."""

        def value(batch: Any, key: Any, model_state: Any) -> tuple[Any, Any, Any, Any]:
            context = Context(key, model_state, state.step, before)
            value, loss = self.objective.of_batch(params, batch, context, part)
            return {}, value, loss.weight, loss.model_state

        found = self._of_slices(value, batch, self._key(state, repeat), state.model_state)
        return self._united(*found[:3])[1]

    def _of_slices(self, of_batch: OfBatch, batch: Any, key: Any, model_state: Any) -> tuple[Any, Metrics, Any, Any]:
        """`(gradients, metrics, weight, model_state)` of a batch or of each shard, of slices where there are any."""
        by_shard = self.options.by_shard
        of_slice = of_batch if by_shard is None else functools.partial(by_shard.of_batch, of_batch)
        return of_microbatches(of_slice, batch, key, model_state, self.options)

    def _united(self, grads: Any, metrics: Metrics, weight: Any) -> tuple[Any, Metrics, Any]:
        """What `_of_slices` found, of all shards."""
        by_shard = self.options.by_shard
        return (grads, metrics, weight) if by_shard is None else by_shard.united(grads, metrics, weight)

    def _key(self, state: TrainState, repeat: int) -> Any:
        """The key of a batch: it follows from its number and the phase alone."""
        if state.key is None:
            return None
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.batches), self.index)
        return jax.random.fold_in(key, repeat) if repeat else key

    # The optimizer step: applied, measured, and guarded where it may be skipped.

    def _end(
        self,
        state: TrainState,
        grads: "_Grads",
        weighed: Weighed,
        model_state: Any,
        settings: Settings | None,
        *,
        measured: bool,
        value_fn: Any,
    ) -> tuple[TrainState, Weighed]:
        """The state after an optimizer step with these gradients, which ends the window."""
        metrics = weighed.metrics
        values = self.objective.by_part(metrics, state.step)
        value = metrics["loss"] if values is None else ByPart(values)
        extra = {"value": value, "value_fn": value_fn, "step": state.step}
        state = dataclasses.replace(state, model_state=model_state, step=optax.safe_increment(state.step))

        def step() -> _Stepped:
            return self._applied(state, grads.given, settings, extra, measured=measured)

        scale_state = state.scale_state
        if self.options.skips:
            nonfinite = {part: ~good for part, good in grads.finite(self.options.optim, self.parts).items()}
            skipped = jnp.any(jnp.stack(list(nonfinite.values())))
            stepped = _guarded(step, state, skipped, measured=measured)
            metrics = metrics | {"skipped": skipped.astype(jnp.int32), "nonfinite": nonfinite}
            if self.options.loss_scale is not None:
                metrics = metrics | {"loss_scale": scale_state.scale}
                scale_state = self.options.loss_scale.adjusted(scale_state, ~skipped)
        else:
            stepped = step()
        if measured:
            metrics = metrics | {"parts": stepped.telemetry}
        ended = dataclasses.replace(
            state,
            params=stepped.params,
            opt_state=stepped.opt_state,
            model_state=stepped.model_state,
            ema=stepped.ema,
            scale_state=scale_state,
            pending=state.pending * 0,
            window=None,
        )
        return ended, weighed._replace(metrics=metrics)

    def _applied(
        self, state: TrainState, grads: Any, settings: Settings | None, extra: Any, *, measured: bool
    ) -> _Stepped:
        """An optimizer step, and what is done after it."""
        optim = self.options.optim
        given = {} if settings is None else settings._asdict()
        updates, opt_state = optim.update(grads, state.opt_state, state.params, using=self.using, **given, **extra)
        params, model_state = optim.apply_updates(state.params, updates), state.model_state
        for after in self.after:
            returned = after(params, model_state, state.step)
            if not isinstance(returned, tuple) or len(returned) != 2:
                raise UpdateError(f"after= must return (params, model_state), not {type(returned).__name__}")
            params = like_old(returned[0], state.params, "the params that after= returned", UpdateError)
            model_state = like_old(returned[1], state.model_state, "the model_state that after= returned", UpdateError)
        averages, ema = self.options.averages, state.ema
        check_averages(averages, ema)
        if averages is not None:
            ema = averages.stepped(ema, params, self.parts)
        telemetry = {}
        if measured:
            used = optim.hyperparameters(opt_state)
            named = {part: used.get(name, {}) for part, name in optim.states_used(self.using).items()}
            telemetry = by_part(grads, updates, optim.parts.split(state.params), named, optim.norms)
            for part, distance in (averages.distances(ema, params, self.parts) if averages else {}).items():
                telemetry[part]["ema_distance"] = distance
        return _Stepped(params, opt_state, model_state, ema, telemetry)


def _guarded(step: Callable[[], _Stepped], state: TrainState, skipped: jax.Array, *, measured: bool) -> _Stepped:
    """The step, unless it is skipped: then all as it was."""
    telemetry = jax.eval_shape(step).telemetry if measured else {}
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), telemetry)
    as_it_was = _Stepped(state.params, state.opt_state, state.model_state, state.ema, nothing)
    stepped: _Stepped = jax.lax.cond(skipped, lambda: as_it_was, step)
    return stepped


def _none_of(accumulate: int) -> Callable[[PyTree], Any]:
    """In the place of the loss as a function of params, where the batches of a window are gone."""

    def value_fn(params: PyTree) -> Any:
        del params
        raise UpdateError(
            f"accumulate={accumulate}: a transform calls value_fn or grad_fn, the loss as a function of params (as a"
            " line search does, and SAM), for which the batches of a window are gone: write"
            f" microbatches={accumulate} in the place of accumulate, and give larger batches"
        )

    return value_fn


def _one_batch_more(state: TrainState) -> TrainState:
    return dataclasses.replace(state, batches=state.batches + 1, pending=state.pending + 1)
