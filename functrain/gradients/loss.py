"""What a loss function may take, and what it returns: a `Loss`, checked."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import LossError
from functrain.tree.model_state import NNX_MODEL_STATE
from functrain.tree.paths import PyTree
from functrain.tree.text import listed


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


class Context(NamedTuple):
    """What a loss function may declare beyond params and batch; None where it was not given.

    Attributes:
      key: the random key of this batch.
      model_state: state that the forward pass changes and no optimizer does.
      step: the number of finished steps.
      before: `{phase: metrics}`, of the phases that stepped before this one on the same batch.
    """

    key: Any = None
    model_state: Any = None
    step: Any = None
    before: Any = None


def make_losses(loss_fn: Callable[..., Any]) -> Callable[..., tuple[dict[str, Any], Loss]]:
    """Makes `(whole params, batch, context) -> (values by name, Loss)`; all that a loss function returns is checked."""
    accepted = accepted_context(loss_fn)

    def losses(params: PyTree, batch: Any, context: Context) -> tuple[dict[str, Any], Loss]:
        values = context._asdict()
        given = {name: values[name] for name, required in accepted.items() if required or values[name] is not None}
        if absent := [name for name in given if given[name] is None]:
            other = "give its phase same_batch=True" if absent[0] == "before" else f"ft.audit(..., {absent[0]}=...)"
            raise LossError(
                f"{name_of(loss_fn)} declares {listed(absent)}: call train_step(..., {absent[0]}=...), or {other}"
            )
        # Flax NNX refuses Variables that were made outside of the function that is differentiated.
        inner = {name: jax.tree.map(lambda leaf: leaf, value) for name, value in given.items()}
        try:
            returned = loss_fn(params, batch, **inner)
        except Exception as error:
            if type(error).__name__ == "TraceContextError":  # Of Flax, which need not be installed.
                raise _of_another_trace(error, loss_fn) from error
            raise
        loss = _completed(returned, loss_fn, context.model_state)
        return {name: jnp.asarray(value) for name, value in loss.values.items()}, loss

    return losses


def accepted_context(loss_fn: Callable[..., Any]) -> dict[str, bool]:
    """The arguments beyond params and batch that a loss function takes, and whether it requires them."""
    if not callable(loss_fn):
        raise LossError(
            f"{loss_fn!r} is no loss function: give loss_fn(params, batch); several take turns with"
            " ft.alternate(ft.Phase(name, loss_fn, parts), ...)"
        )
    parameters = inspect.signature(loss_fn).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = listed(Context._fields)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < 2 and not takes_any:
        raise LossError(f"{name_of(loss_fn)} must take (params, batch), and may declare {known} after them")
    named = [p for p in parameters if p not in positional[:2] and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [p.name for p in named if p.default is p.empty and p.name not in Context._fields]
    if unknown:
        raise LossError(
            f"{name_of(loss_fn)} requires {listed(unknown)}, which functrain does not give: it knows {known};"
            " put the rest in the batch, or bind it with functools.partial"
        )
    accepted = {p.name: p.default is p.empty for p in named if p.name in Context._fields}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = {name: accepted.get(name, False) for name in Context._fields}
    return accepted


def required_context(loss_fn: Callable[..., Any]) -> set[str]:
    """The arguments beyond params and batch that a loss function can't do without."""
    return {name for name, is_required in accepted_context(loss_fn).items() if is_required}


def _completed(returned: Any, loss_fn: Callable[..., Any], model_state: Any) -> Loss:
    """The `Loss` in what a loss function returned, checked, with the model state filled in."""
    if isinstance(returned, tuple):
        raise LossError(
            f"{name_of(loss_fn)} returned a tuple: write Loss(value, metrics=aux) in the place of (value, aux)"
        )
    loss = returned if isinstance(returned, Loss) else Loss(returned)
    values = loss.value if isinstance(loss.value, Mapping) else {"": loss.value}
    if not values:
        raise LossError(f"{name_of(loss_fn)} returned no loss: its dict of values is empty")
    for name, value in values.items():
        what = f"{name_of(loss_fn)} returned for {name!r}" if name else f"{name_of(loss_fn)} returned"
        if not isinstance(value, float | jax.Array | np.ndarray | np.generic):
            raise LossError(f"{what} {type(value).__name__}: return a scalar, a Loss, or Loss({{name: scalar}})")
        if jnp.shape(value) != ():
            raise LossError(f"{what} an array of shape {jnp.shape(value)}: reduce it to a scalar, e.g. with .mean()")
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise LossError(f"{what} {jnp.result_type(value)}: a loss must be a real floating-point scalar")
    check_weight(loss.weight)
    return loss if loss.model_state is not None else dataclasses.replace(loss, model_state=model_state)


def _of_another_trace(error: Exception, loss_fn: Callable[..., Any]) -> LossError:
    """What to write where a loss function changes Variables of Flax NNX that were made outside of it."""
    return LossError(
        f"{name_of(loss_fn)} changes what was made outside of it (Flax: {str(error).partition(' (http')[0]}), such as a"
        f" model that it closes over. Split it outside, {NNX_MODEL_STATE}"
    )


def check_weight(weight: Any) -> None:
    """Raises a LossError for a weight that is no scalar, or is known to be negative without reading a device."""
    if jnp.shape(weight) != ():
        raise LossError(f"a weight is one number for the batch, not an array of shape {jnp.shape(weight)}: sum it")
    if isinstance(weight, int | float | np.number | np.ndarray) and np.less(weight, 0):
        raise LossError(f"a weight of {weight} is negative: give the number of examples or tokens in the mean")


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called, for a message."""
    return getattr(function, "__name__", None) or repr(function)
