"""A window: the batches whose gradients make one optimizer step, while it is not finished."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import UpdateError
from functrain.gradients.accumulation import Accumulated, accumulate
from functrain.tree.arrays import wide
from functrain.tree.paths import flatten, structure_difference
from functrain.tree.text import listed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The weighted sums of the batches of a window so far, a pytree.

    >>> window = add_to_window(None, {"all": {"w": 1.0}}, {"loss": 2.0}, weight=3)
    >>> window = add_to_window(window, {"all": {"w": 5.0}}, {"loss": 6.0}, weight=1)
    >>> jax.tree.map(float, window.mean())
    ({'all': {'w': 2.0}}, {'loss': 3.0})

    Attributes:
      grads: `{part: {path: sum}}`, of the parts that its phase trains; float32 for 16-bit gradients.
      metrics: sums of the metrics, in float32 or wider.
      weight: the sum of the weights, a floating-point scalar.

    With `reduce="window"` all have a leading axis, of the shards of the batches.
    """

    grads: Any
    metrics: Any
    weight: Any

    def mean(self) -> tuple[Any, Any]:
        """The weighted means of gradients and metrics: those of the union of the batches; of one of `summed`."""
        grads, metrics = Accumulated((self.grads, self.metrics), self.weight).mean()
        return grads, metrics

    def summed(self) -> "Window":
        """The window without an axis of shards: their sums."""
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), self) if jnp.ndim(self.weight) else self


def add_to_window(window: Window | None, grads: Any, metrics: Any, weight: Any) -> Window:
    """The window with one batch more; None is a window that begins.

    Raises:
      UpdateError: the metrics are not those of the batches before it, or the gradients those of other parts.
    """
    if window is not None:
        if window.grads.keys() != grads.keys():
            raise UpdateError(
                f"the window that is pending has gradients of {listed(window.grads)}, and this batch those of"
                f" {listed(grads)}: go on with the frozen_until= with which it was begun, or end it first, with"
                " update.flush(state)"
            )
        _check_metrics(metrics, window.metrics)
    before = None if window is None else Accumulated((window.grads, window.metrics), window.weight)
    acc = accumulate(before, (grads, jax.tree.map(wide, metrics)), weight=weight)
    of_grads, of_metrics = acc.sums
    return Window(of_grads, of_metrics, acc.weights)


def empty_like(begun: Callable[[], Any]) -> Any:
    """A window like one that a function would begin, or a tree with one, with nothing in it, for a `scan` to carry."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), jax.eval_shape(begun))


def _check_metrics(metrics: Any, sums: Any) -> None:
    """Raises for metrics that can't be added, as of a loss function that was changed while its window was saved."""
    differs = structure_difference(metrics, sums)
    if not differs:
        before = {name: jnp.shape(leaf) for name, leaf in flatten(sums).items()}
        shapes = {name: jnp.shape(leaf) for name, leaf in flatten(metrics).items()}
        others = [name for name in before if shapes[name] != before[name]]
        differs = "".join(f"has {name!r} of shape {shapes[name]}, not {before[name]}" for name in others[:1])
    if differs:
        raise UpdateError(
            "the metrics of this batch do not fit those of the batches before it, in the window that is pending: the"
            f" tree {differs}; return the same until the window is ended, or go on without it, in fit in run_started of"
            " a hook: run.state = dataclasses.replace(run.state, window=None, pending=np.array(0))"
        )
