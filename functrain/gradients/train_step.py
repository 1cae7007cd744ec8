"""Train steps: pure functions that return the gradients of a loss, whole or by part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functrain.errors import LossError
from functrain.gradients.loss import Context, Loss, make_losses
from functrain.gradients.per_example import PerExample, check_per_example, of_examples
from functrain.gradients.reach import check_reached, recording_reach
from functrain.gradients.routes import Route, Weight, normalised, weighted_sum, weightings, weights_of_sum
from functrain.tree.arrays import conjugate, wide
from functrain.tree.model_state import state_of_model, told_of_random
from functrain.tree.partition import Partition
from functrain.tree.paths import PyTree, flatten
from functrain.tree.selectors import non_float
from functrain.tree.text import listed

Losses = Callable[..., tuple[dict[str, Any], Loss]]
"""From what is differentiated, of this batch or of another, to the losses by name and the `Loss`."""


class _Objective(NamedTuple):
    """What is differentiated: a weighted sum of losses, with the weights of a step, times a scale."""

    step: Any
    scale: Any

    def of(self, values: Mapping[str, Any], weights: Mapping[str, Weight]) -> Any:
        total = weighted_sum(values, weights, self.step)
        return total if self.scale is None else total.astype(jnp.float32) * self.scale


def make_train_step(
    loss_fn: Callable[..., Any],
    parts: Partition | None = None,
    *,
    wrt: str | Sequence[str] | None = None,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
    per_loss: bool = False,
    per_example: PerExample | None = None,
) -> Callable[..., tuple[Any, Loss]]:
    """Makes a pure function that returns the gradients of a loss.

    >>> params = {"encoder": jnp.float32(2.0), "head": jnp.float32(3.0)}
    >>> train_step = make_train_step(lambda params, batch: params["encoder"] * params["head"] * batch)
    >>> grads, loss = train_step(params, 5.0)
    >>> float(loss.value), float(grads["encoder"]), float(grads["head"])
    (30.0, 15.0, 10.0)

    Args:
      loss_fn: `loss_fn(params, batch)`, pure, returns a scalar or a `Loss`. It may also declare any of `key`,
        `model_state`, `step` and `before`, which it is then given by keyword.
      parts: with a partition the gradients come split, `{part: {path: gradient}}`; without, as a tree like params.
      wrt: the parts to differentiate, usually `optim.trained`; None for all. What is not named costs nothing: no
        backward pass, no buffer.
      route: `{part: losses}` for every differentiated part: the name of a loss, a sequence of names, or
        `{loss: weight}`. A part's gradient is of these losses alone, at the same parameters for all, from one forward
        pass and one backward pass for each distinct weighting. Without a route every part learns from the sum.
      loss_weights: `{loss: weight}` for the sum; 1 for those not named. A weight is a number or a schedule of `step`.
      per_loss: return `{loss: gradients}`, the unweighted gradient of each loss, for those who combine them themselves.
      per_example: what is done to the gradients of each example before their mean is taken, a function of its split
        gradients, or `{part: fn}`, each of a part's `{path: gradient}`; other parts have none by example.

    Returns:
      `train_step(params, batch, *, key=None, model_state=None, step=None, before=None) -> (grads, loss)`. Each gradient
      has its parameter's shape and dtype; of a complex parameter it is the conjugate of `jax.grad`'s, the direction in
      which the loss grows, as optax asks for. `loss` is always a `Loss`; its `model_state` is the new one, or the given
      one where `loss_fn` returns none. A keyword that `loss_fn` does not declare is ignored.

    Raises:
      LossError: `loss_fn` requires an argument that functrain does not know; and from `train_step`, when traced: a
        declared argument that was not given, a value that is no floating-point scalar, a negative weight, a leaf in a
        differentiated part that is not floating point.
      PartitionError: `wrt` names an unknown part, or params are not of the partition's structure.
    """
    options: Any = {"route": route, "loss_weights": loss_weights, "per_loss": per_loss, "per_example": per_example}
    gradient = make_gradient(loss_fn, parts, wrt, **options)

    def train_step(
        params: PyTree, batch: Any, *, key: Any = None, model_state: Any = None, step: Any = None, before: Any = None
    ) -> tuple[Any, Loss]:
        grads, loss, _ = gradient(params, batch, Context(key, model_state, step, before))
        return grads, loss

    return train_step


def make_gradient(
    loss_fn: Callable[..., Any],
    parts: Partition | None,
    wrt: str | Sequence[str] | None,
    *,
    cast: Callable[[PyTree], PyTree] = lambda params: params,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
    per_loss: bool = False,
    per_example: PerExample | None = None,
    audit: str | None = None,
    held: Sequence[str] = (),
) -> Callable[..., tuple[Any, Loss, Any]]:
    """What `make_train_step` and the compiled update are made of.

    Args:
      loss_fn: as for `make_train_step`.
      parts: as for `make_train_step`.
      wrt: as for `make_train_step`.
      cast: given the whole params, returns those that the loss is computed with; gradients flow through it.
      route: as for `make_train_step`.
      loss_weights: as for `make_train_step`.
      per_loss: as for `make_train_step`.
      per_example: as for `make_train_step`.
      audit: check when it is traced that the loss reaches the parts, and call it so: " of phase 'critic'". None: don't.
      held: parts that the route names and that are not differentiated for now.

    Returns:
      `gradient(params, batch, context, scale=None) -> (grads, loss, total)`; `total` is what was minimised: the
      weighted sum, or with a route the plain one. The loss is multiplied by `scale` before it is differentiated, and
      the gradients, in float32, divided by it.
    """
    evaluate = make_losses(loss_fn)
    wrt = _checked_wrt(parts, wrt)
    _check_together(parts, wrt, route, loss_weights, per_loss=per_loss, per_example=per_example)
    routes = None if route is None else normalised(route, (*wrt, *held))

    def gradient(params: PyTree, batch: Any, context: Context, scale: Any = None) -> tuple[Any, Loss, Any]:
        reached: set[tuple[str, str]] = set()

        def losses(differentiated: Any, batch: Any = batch, context: Context = context) -> tuple[dict[str, Any], Loss]:
            if audit is not None:
                differentiated = recording_reach(differentiated, reached.update)
            whole = differentiated if parts is None else parts.merge(differentiated, into=params)
            return evaluate(cast(whole), batch, context)

        def finished(grads: Any) -> Any:
            if scale is not None:
                grads = jax.tree.map(lambda grad: wide(grad) / scale, grads)
            return conjugate(grads)  # The direction in which the loss grows.

        differentiated = _differentiated(params, parts, wrt)
        objective = _Objective(context.step, scale)
        summed = _summed(losses, objective, loss_weights or {})
        if per_example is not None:
            found = of_examples(summed, differentiated, batch, context, finished=finished, per_example=per_example)
            grads, loss, total = found
        else:
            if routes is not None:
                grads, loss, total = _routed(losses, differentiated, objective, routes, reached)
            elif per_loss:
                grads, loss, total = _of_each(losses, differentiated, objective)
            else:
                grads, (loss, total) = jax.grad(summed, has_aux=True)(differentiated)
            grads = finished(grads)
        if audit is not None and parts is not None:
            check_reached(parts, wrt, reached, audit)
        return grads, loss, total

    return gradient


def _check_together(
    parts: Partition | None,
    wrt: Sequence[str],
    route: Route | None,
    loss_weights: Mapping[str, Weight] | None,
    *,
    per_loss: bool,
    per_example: PerExample | None,
) -> None:
    """Raises for options that exclude each other, or need a partition."""
    if sum(option is not None and option is not False for option in (route, loss_weights, per_loss)) > 1:
        raise LossError("route, loss_weights and per_loss exclude each other: put the weights into the route")
    if per_example is not None and (parts is None or route is not None or per_loss):
        raise LossError(
            "per_example= needs a partition, and excludes route and per_loss: make_train_step(loss_fn, parts,"
            " per_example=fn)"
        )
    if route is not None and parts is None:
        raise LossError("route needs a partition: make_train_step(loss_fn, parts, route=...)")
    check_per_example(per_example, wrt)


def _summed(losses: Losses, objective: _Objective, loss_weights: Mapping[str, Weight]) -> Callable[..., Any]:
    """The weighted sum of all losses, to be differentiated; with the `Loss` and the sum without its scale."""

    def summed(differentiated: Any, *of_other: Any) -> tuple[Any, tuple[Loss, Any]]:
        values, loss = losses(differentiated, *of_other)
        weights = weights_of_sum(list(values), loss_weights)
        return objective.of(values, weights), (loss, weighted_sum(values, weights, objective.step))

    return summed


def _of_each(losses: Losses, differentiated: Any, objective: _Objective) -> tuple[Any, Loss, Any]:
    """The gradient of each loss by its name, from one forward pass and a backward pass for each."""
    values, tangents, loss = jax.linearize(losses, differentiated, has_aux=True)
    grads = {name: _pulled_back(objective, {name: 1.0}, tangents, values, differentiated) for name in values}
    return grads, loss, loss.total


def _routed(
    losses: Losses,
    differentiated: Any,
    objective: _Objective,
    routes: Mapping[str, Mapping[str, Weight]],
    reached: set[tuple[str, str]],
) -> tuple[dict[str, Any], Loss, Any]:
    """Each part's gradient of its own weighting, from one forward pass; leaves in `reached` what these reach."""
    values, tangents, loss = jax.linearize(losses, differentiated, has_aux=True)
    grads: dict[str, Any] = {}
    of_route: set[tuple[str, str]] = set()
    for weighting in weightings(list(values), routes):
        reached.clear()
        mine = [part for part in weighting.parts if part in differentiated]
        of_all = _pulled_back(objective, weighting.weights, tangents, values, differentiated) if mine else {}
        grads |= {part: of_all[part] for part in mine}
        of_route |= {(part, path) for part, path in reached if part in mine}
    reached.clear()
    reached |= of_route
    return grads, loss, loss.total


def _pulled_back(
    objective: _Objective,
    weights: Mapping[str, Weight],
    tangents: Callable[[Any], Any],
    values: Any,
    differentiated: Any,
) -> Any:
    """One backward pass, of one weighted sum: no other loss is in it, not even multiplied by zero."""

    def weighted(named: Any) -> Any:
        return objective.of(named, weights)

    transposed = jax.linear_transpose(lambda tangent: weighted(tangents(tangent)), differentiated)
    return transposed(jnp.ones((), jax.eval_shape(weighted, values).dtype))[0]


def _differentiated(params: PyTree, parts: Partition | None, wrt: Sequence[str]) -> Any:
    """What is differentiated of whole params: some parts of them, or without a partition all."""
    if parts is None:
        _check_differentiable({"": params}, "params hold", state_of_model(params))
        return params
    split = parts.split(params)
    differentiated = {part: split[part] for part in wrt}
    _check_differentiable(differentiated, "part {!r} holds", parts.state)
    return differentiated


def _check_differentiable(trees: Mapping[str, Any], holds: str, state: Mapping[str, str]) -> None:
    for part, tree in trees.items():
        if bad := {path: leaf for path, leaf in flatten(tree).items() if non_float(path, leaf)}:
            if random := told_of_random(state, bad):
                raise LossError(f"{holds.format(part)} {random}")
            raise LossError(
                f"{holds.format(part)} {listed(bad)}, which is not floating point and has no gradient: give such leaves"
                ' a part of their own ("static": ft.non_float) and leave it out of wrt'
            )


def _checked_wrt(parts: Partition | None, wrt: str | Sequence[str] | None) -> tuple[str, ...]:
    if parts is None:
        if wrt is not None:
            raise LossError(f"wrt={wrt!r} needs a partition: make_train_step(loss_fn, parts, wrt=...)")
        return ()
    if not isinstance(parts, Partition):
        raise LossError(f"make_train_step(loss_fn, parts) takes an ft.partition(...), not {type(parts).__name__}")
    names = parts.names if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    parts.check_names(names, "wrt")
    return names
