"""What the gradient of each part is the gradient of, as a function of params: for transforms that evaluate it anew."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from functrain.gradients.loss import Context, Loss, make_losses
from functrain.gradients.routes import Route, Weight, normalised, weighted_sum, weights_of_sum
from functrain.tree.paths import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The weighted sum of losses that each part learns from; made by `make_objective`."""

    losses: Callable[..., tuple[dict[str, Any], Loss]]
    cast: Callable[[PyTree], PyTree]
    routes: Mapping[str, Mapping[str, Weight]] | None
    loss_weights: Mapping[str, Weight]

    def of_batch(self, params: PyTree, batch: Any, context: Context, part: str) -> tuple[Any, Loss]:
        """What a part learns from, of one batch, and all that the loss function returned."""
        values, loss = self.losses(self.cast(params), batch, context)
        weights = weights_of_sum(list(values), self.loss_weights) if self.routes is None else self.routes[part]
        return weighted_sum(values, weights, context.step), loss

    def summed(self, by_loss: Mapping[str, Any], step: Any) -> Any:
        """The weighted sum of what there is of each loss: values, or trees of one structure."""
        weights = weights_of_sum(list(by_loss), self.loss_weights)

        def of_leaf(*leaves: Any) -> Any:
            return weighted_sum(dict(zip(by_loss, leaves, strict=True)), weights, step)

        return jax.tree.map(of_leaf, *by_loss.values())

    def by_part(self, metrics: Mapping[str, Any], step: Any) -> dict[str, Any] | None:
        """What each part learned from in a batch or a window; None where it is the "loss" for all.

        Args:
          metrics: with each loss under its name.
          step: the number of finished steps.
        """
        if self.routes is None:
            return None
        return {part: weighted_sum(metrics, weights, step) for part, weights in self.routes.items()}


def make_objective(
    loss_fn: Callable[..., Any],
    parts: Sequence[str],
    *,
    cast: Callable[[PyTree], PyTree] = lambda params: params,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
) -> Objective:
    """What the gradients that `make_gradient` makes are of.

    >>> objective = make_objective(lambda params, batch: {"a": params, "b": 2.0 * params}, ["x"], route={"x": "b"})
    >>> float(objective.of_batch(3.0, None, Context(), "x")[0])
    6.0

    Args:
      loss_fn: as for `make_train_step`.
      parts: those that learn.
      cast: given the whole params, returns those that the loss is computed with.
      route: as for `make_train_step`.
      loss_weights: as for `make_train_step`.
    """
    routes = None if route is None else normalised(route, parts)
    return Objective(make_losses(loss_fn), cast, routes, loss_weights or {})
