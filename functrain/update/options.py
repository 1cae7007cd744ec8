"""What all steps of an update share, and what one of them may be given."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from functrain.errors import UpdateError
from functrain.gradients.per_example import PerExample
from functrain.mesh.constraints import brought
from functrain.optim.optimizer import Optimizer
from functrain.tree.rest import Whole
from functrain.update.by_shard import ByShard
from functrain.update.ema import Averages
from functrain.update.precision import DynamicScale
from functrain.update.surgery import Surgery
from functrain.update.window import Window, add_to_window


class Settings(NamedTuple):
    """Hyperparameters of one call, as `Optimizer.step` takes them."""

    lr: Mapping[str, Any] | None
    set: Mapping[str, Mapping[str, Any]] | None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """The options of `make_update` that hold for every phase, checked.

    Raises:
      UpdateError: an option that is none of those that `make_update` says.
    """

    optim: Optimizer
    accumulate: int = 1
    microbatches: int = 1
    remainder: Literal["flush", "drop", "carry"] = "flush"
    nonfinite: Literal["ignore", "skip"] = "ignore"
    loss_scale: DynamicScale | None = None
    averages: Averages | None = None
    narrow: Any = None
    surgery: Surgery | None = None
    per_example: PerExample | None = None
    reduce: Literal["batch", "window"] = "batch"
    whole: Whole

    def __post_init__(self) -> None:
        if self.loss_scale is not None and not isinstance(self.loss_scale, DynamicScale):
            raise UpdateError(f"loss_scale={self.loss_scale!r}: write ft.DynamicScale(initial=2.0**15)")
        for name, count in (("accumulate", self.accumulate), ("microbatches", self.microbatches)):
            if not isinstance(count, int) or count < 1:
                raise UpdateError(f"{name}={count!r}: give a whole number of at least 1")
        if self.remainder not in ("flush", "drop", "carry"):
            raise UpdateError(f"remainder={self.remainder!r}: write 'flush', 'drop' or 'carry'")
        if self.nonfinite not in ("ignore", "skip"):
            raise UpdateError(f"nonfinite={self.nonfinite!r}: write 'ignore' or 'skip'")
        if self.reduce not in ("batch", "window"):
            raise UpdateError(f"reduce={self.reduce!r}: write 'batch' or 'window'")
        if self.reduce == "window":
            self._check_reduces()

    def _check_reduces(self) -> None:
        layout = self.optim.layout
        if layout is None or not layout.data_axes:
            raise UpdateError(
                "reduce='window' sums the gradients of each shard of a batch by itself, and the optimizer has no layout"
                " that cuts batches: ft.Optimizer(..., layout=ft.layout(params, mesh, rules, batch=P('data')))"
            )
        if self.accumulate == self.microbatches == 1:
            raise UpdateError(
                "reduce='window': a window of one batch is reduced once anyway: give accumulate= or microbatches= more"
                " than 1, or leave reduce= out"
            )

    @functools.cached_property
    def by_shard(self) -> ByShard | None:
        """What sums gradients by shard, where they are summed so."""
        return ByShard(self.optim.layout) if self.reduce == "window" and self.optim.layout is not None else None

    @functools.cached_property
    def places_of_sums(self) -> Any:
        """Where the sums of the gradients of a window lie, by part and path; None without a layout."""
        places = self.optim.places_of_grads
        return places if self.by_shard is None or places is None else self.by_shard.places(places)

    @property
    def by_loss(self) -> bool:
        """Whether the gradient of each loss is computed by itself."""
        return self.surgery is not None and "per_loss" in self.surgery.declares

    def in_place(self, grads: Any, parts: Sequence[str]) -> Any:
        """Gradients of some parts, or those of each loss, where the layout has them, or the sums of shards."""
        places = self.places_of_sums
        if places is None:
            return grads
        mine = {part: places[part] for part in parts}
        return brought(grads, dict.fromkeys(grads, mine) if self.by_loss else mine)

    def added(self, window: Window | None, grads: Any, metrics: Any, weight: Any) -> Window:
        """A window with one batch more, its sums in their places."""
        if self.by_shard is None:
            return add_to_window(window and window.summed(), grads, metrics, weight)
        found = self.by_shard.added(window, grads, metrics, weight)
        parts = [*(next(iter(grads.values()), ()) if self.by_loss else grads)]
        metrics, weight = self.by_shard.in_place((found.metrics, found.weight))
        return Window(self.in_place(found.grads, parts), metrics, weight)

    def means(self, window: Window) -> tuple[Any, Any]:
        """The means of a window, of each shard where it is summed so."""
        return window.mean() if self.by_shard is None else self.by_shard.means(window)

    def fitted(self, window: Window) -> Window:
        """A pending window as this update sums: by its shards, or those of others as one."""
        return window.summed() if self.by_shard is None else self.by_shard.fitted(window)

    @property
    def skips(self) -> bool:
        """Whether an update with a gradient that is not finite is left out."""
        return self.nonfinite == "skip" or self.loss_scale is not None
