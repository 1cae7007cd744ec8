"""Pure gradients, by part."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import LossError
from functrain.reach import check_reached, tagged
from functrain.routes import Route, Weight, Weighting, normalised, weighted_sum, weightings
from functrain.tree.partition import Partition
from functrain.tree.paths import PyTree, flatten
from functrain.tree.selectors import non_float
from functrain.tree.text import listed

CONTEXT = ("key", "model_state", "step")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """What a loss function returns: the value to minimise, and what else came out of the forward pass.

    >>> loss = Loss(jnp.float32(0.5), weight=32, metrics={"accuracy": 0.9})
    >>> float(loss.total), loss.weight
    (0.5, 32)

    Attributes:
      value: a floating-point scalar, or a dict of named ones, of which the sum is minimised, weighted or routed.
      weight: what the mean in `value` is over (examples, unmasked tokens): a scalar >= 0, by which accumulation weighs
        gradients.
      metrics: any pytree to report; no gradient flows through it.
      model_state: state that the forward pass changes and no optimizer does (batch statistics). None: as it was.
    """

    value: Any
    weight: Any = 1
    metrics: Any = dataclasses.field(default_factory=dict)
    model_state: Any = None

    @property
    def total(self) -> Any:
        """The plain sum of the values."""
        return functools.reduce(operator.add, self.values.values())

    @property
    def values(self) -> dict[str, Any]:
        """The values by name; a single one has the name "loss"."""
        return dict(self.value) if isinstance(self.value, Mapping) else {"loss": self.value}


def make_train_step(
    loss_fn: Callable[..., Any],
    parts: Partition | None = None,
    *,
    wrt: str | Sequence[str] | None = None,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
    per_loss: bool = False,
) -> Callable[..., tuple[Any, Loss]]:
    """Makes a pure function that returns the gradients of a loss.

    >>> params = {"encoder": jnp.float32(2.0), "head": jnp.float32(3.0)}
    >>> train_step = make_train_step(lambda params, batch: params["encoder"] * params["head"] * batch)
    >>> grads, loss = train_step(params, 5.0)
    >>> float(loss.value), float(grads["encoder"]), float(grads["head"])
    (30.0, 15.0, 10.0)

    Args:
      loss_fn: `loss_fn(params, batch)`, pure, returns a scalar or a `Loss`. It may also declare any of `key`,
        `model_state` and `step`, which it is then given by keyword.
      parts: with a partition the gradients come split, `{part: {path: gradient}}`; without, as a tree like params.
      wrt: the parts to differentiate, usually `optim.trained`; None for all. What is not named costs nothing: no
        backward pass, no buffer.
      route: `{part: losses}` for every differentiated part: the name of a loss, a sequence of names, or
        `{loss: weight}`. A part's gradient is of these losses alone, at the same parameters for all, from one forward
        pass and one backward pass for each distinct weighting. Without a route every part learns from the sum.
      loss_weights: `{loss: weight}` for the sum; 1 for those not named. A weight is a number or a schedule of `step`.
      per_loss: return `{loss: gradients}`, the unweighted gradient of each loss, for those who combine them themselves.

    Returns:
      `train_step(params, batch, *, key=None, model_state=None, step=None) -> (grads, loss)`. Each gradient has its
      parameter's shape and dtype. `loss` is always a `Loss`; its `model_state` is the new one, or the given one where
      `loss_fn` returns none. A keyword that `loss_fn` does not declare is ignored.

    Raises:
      LossError: `loss_fn` requires an argument that functrain does not know; and from `train_step`, when traced: a
        declared argument that was not given, a value that is no floating-point scalar, a negative weight, a leaf in a
        differentiated part that is not floating point.
      PartitionError: `wrt` names an unknown part, or params are not of the partition's structure.
    """
    gradient = make_gradient(loss_fn, parts, wrt, route=route, loss_weights=loss_weights, per_loss=per_loss)

    def train_step(
        params: PyTree, batch: Any, *, key: Any = None, model_state: Any = None, step: Any = None
    ) -> tuple[Any, Loss]:
        grads, loss, _ = gradient(params, batch, {"key": key, "model_state": model_state, "step": step})
        return grads, loss

    return train_step


def make_gradient(
    loss_fn: Callable[..., Any],
    parts: Partition | None,
    wrt: str | Sequence[str] | None,
    cast: Callable[[PyTree], PyTree] = lambda params: params,
    *,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
    per_loss: bool = False,
    audit: str | None = None,
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
      audit: check when it is traced that the loss reaches the parts, and call it so: " of phase 'critic'". None: don't.

    Returns:
      `gradient(params, batch, given, scale=None) -> (grads, loss, total)`; `total` is what was minimised: the weighted
      sum, or with a route the plain one. `given` has a value or None for each of `CONTEXT`.
      The loss is multiplied by `scale` before it is differentiated, and the gradients, in float32, divided by it.
    """
    evaluate = make_losses(loss_fn)
    wrt = _checked_wrt(parts, wrt)
    if sum(option is not None and option is not False for option in (route, loss_weights, per_loss)) > 1:
        raise LossError("route, loss_weights and per_loss exclude each other: put the weights into the route")
    if route is not None and parts is None:
        raise LossError("route needs a partition: make_train_step(loss_fn, parts, route=...)")
    routed = None if route is None else normalised(route, wrt)

    def gradient(params: PyTree, batch: Any, given: Mapping[str, Any], scale: Any = None) -> tuple[Any, Loss, Any]:
        reached: set[tuple[str, str]] = set()

        def losses(differentiated: Any) -> tuple[dict[str, Any], Loss]:
            if audit is not None:
                differentiated = tagged(differentiated, reached.update)
            whole = differentiated if parts is None else parts.merge(differentiated, into=params)
            return evaluate(cast(whole), batch, given)

        def scaled(values: Mapping[str, Any], weights: Mapping[str, Weight]) -> Any:
            total = weighted_sum(values, weights, given["step"])
            return total if scale is None else total.astype(jnp.float32) * scale

        def summed(differentiated: Any) -> tuple[Any, tuple[Loss, Any]]:
            values, loss = losses(differentiated)
            ((_, weights),) = weightings(list(values), (), None, loss_weights or {})
            return scaled(values, weights), (loss, weighted_sum(values, weights, given["step"]))

        if parts is None:
            differentiated = params
        else:
            split = parts.split(params)
            differentiated = {part: split[part] for part in wrt}
        _check_differentiable(differentiated, split=parts is not None)
        if routed is None and not per_loss:
            grads, (loss, total) = jax.grad(summed, has_aux=True)(differentiated)
        else:
            values, tangents, loss = jax.linearize(losses, differentiated, has_aux=True)
            total = loss.total

            def pulled_back(weights: Mapping[str, Weight]) -> Any:
                return _pulled_back(lambda named: scaled(named, weights), tangents, values, differentiated)

            if per_loss:
                grads = {name: pulled_back({name: 1.0}) for name in values}
            else:
                grads = _routed(weightings(list(values), wrt, routed, {}), pulled_back, reached)
        if audit is not None and parts is not None:
            check_reached(parts, wrt, reached, audit)
        if scale is not None:
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32) / scale, grads)
        return grads, loss, total

    return gradient


def make_losses(loss_fn: Callable[..., Any]) -> Callable[..., tuple[dict[str, Any], Loss]]:
    """Makes `(whole params, batch, given) -> (values by name, Loss)`, with all that a loss function returns checked."""
    accepted = accepted_context(loss_fn)
    named_before: list[tuple[str, ...]] = []

    def losses(params: PyTree, batch: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], Loss]:
        context = {name: given[name] for name, required in accepted.items() if required or given[name] is not None}
        if absent := [name for name in context if context[name] is None]:
            raise LossError(f"{_name(loss_fn)} declares {listed(absent)}: call train_step(..., {absent[0]}=...)")
        # Flax NNX refuses Variables that were made outside of the function that is differentiated.
        inner = {name: jax.tree.map(lambda leaf: leaf, value) for name, value in context.items()}
        loss = _completed(loss_fn(params, batch, **inner), loss_fn, given["model_state"])
        _check_names_stay(loss, named_before, loss_fn)
        return {name: jnp.asarray(value) for name, value in loss.values.items()}, loss

    return losses


def _pulled_back(
    objective: Callable[[Any], Any], tangents: Callable[[Any], Any], values: Any, differentiated: Any
) -> Any:
    """One backward pass, of one weighted sum: no other loss is in it, not even multiplied by zero."""
    transposed = jax.linear_transpose(lambda tangent: objective(tangents(tangent)), differentiated)
    return transposed(jnp.ones((), jax.eval_shape(objective, values).dtype))[0]


def _routed(
    found: Sequence[Weighting], pulled_back: Callable[[Any], Any], reached: set[tuple[str, str]]
) -> dict[str, Any]:
    """Each part's gradient of its own weighting; leaves in `reached` what these reach."""
    grads: dict[str, Any] = {}
    of_route: set[tuple[str, str]] = set()
    for weighting in found:
        reached.clear()
        of_all = pulled_back(weighting.weights)
        grads |= {part: of_all[part] for part in weighting.parts}
        of_route |= {(part, path) for part, path in reached if part in weighting.parts}
    reached.clear()
    reached |= of_route
    return grads


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


def _check_names_stay(loss: Loss, before: list[tuple[str, ...]], loss_fn: Callable[..., Any]) -> None:
    """Raises if a loss function returns other names than when it was traced before: what it is logged as would jump."""
    names = tuple(sorted(loss.values))
    if before and before[0] != names:
        raise LossError(
            f"{_name(loss_fn)} returned the losses {listed(names)}, and before {listed(before[0])}: return the same"
            " names in every call, a constant 0.0 where one does not apply"
        )
    before[:] = [names]


def check_weight(weight: Any) -> None:
    """Raises a LossError for a weight that is no scalar, or is known to be negative without reading a device."""
    if jnp.shape(weight) != ():
        raise LossError(f"a weight is one number for the batch, not an array of shape {jnp.shape(weight)}: sum it")
    if isinstance(weight, int | float | np.number | np.ndarray) and np.less(weight, 0):
        raise LossError(f"a weight of {weight} is negative: give the number of examples or tokens in the mean")


def accepted_context(loss_fn: Callable[..., Any]) -> dict[str, bool]:
    """The arguments beyond params and batch that a loss function takes, and whether it requires them."""
    parameters = inspect.signature(loss_fn).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < 2 and not takes_any:
        raise LossError(f"{_name(loss_fn)} must take (params, batch), and may declare {listed(CONTEXT)} after them")
    named = [p for p in parameters if p not in positional[:2] and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [p.name for p in named if p.default is p.empty and p.name not in CONTEXT]
    if unknown:
        raise LossError(
            f"{_name(loss_fn)} requires {listed(unknown)}, which functrain does not give: it knows {listed(CONTEXT)};"
            " put the rest in the batch, or bind it with functools.partial"
        )
    accepted = {p.name: p.default is p.empty for p in named if p.name in CONTEXT}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = {name: accepted.get(name, False) for name in CONTEXT}
    return accepted


def _completed(returned: Any, loss_fn: Callable[..., Any], model_state: Any) -> Loss:
    """The `Loss` in what a loss function returned, checked, with the model state filled in."""
    if isinstance(returned, tuple):
        raise LossError(
            f"{_name(loss_fn)} returned a tuple: write Loss(value, metrics=aux) in the place of (value, aux)"
        )
    loss = returned if isinstance(returned, Loss) else Loss(returned)
    values = loss.value if isinstance(loss.value, Mapping) else {"": loss.value}
    if not values:
        raise LossError(f"{_name(loss_fn)} returned no loss: its dict of values is empty")
    for name, value in values.items():
        what = f"{_name(loss_fn)} returned for {name!r}" if name else f"{_name(loss_fn)} returned"
        if not isinstance(value, float | jax.Array | np.ndarray | np.generic):
            raise LossError(f"{what} {type(value).__name__}: return a scalar, a Loss, or Loss({{name: scalar}})")
        if jnp.shape(value) != ():
            raise LossError(f"{what} an array of shape {jnp.shape(value)}: reduce it to a scalar, e.g. with .mean()")
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise LossError(f"{what} {jnp.result_type(value)}: a loss must be a real floating-point scalar")
    check_weight(loss.weight)
    return loss if loss.model_state is not None else dataclasses.replace(loss, model_state=model_state)


def _check_differentiable(differentiated: Any, *, split: bool) -> None:
    trees = differentiated if split else {"": differentiated}
    for part, tree in trees.items():
        bad = [path for path, leaf in flatten(tree).items() if non_float(path, leaf)]
        if bad:
            where = f"part {part!r} holds {listed(bad)}" if split else f"params hold {listed(bad)}"
            raise LossError(
                f"{where}, which is not floating point and has no gradient: give such leaves a part of their own"
                ' ("static": ft.non_float) and leave it out of wrt'
            )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or repr(function)
