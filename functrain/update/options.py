"""What all steps of an update share, and what one of them may be given."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from functrain.errors import UpdateError
from functrain.gradients.per_example import PerExample
from functrain.mesh.constraints import brought
from functrain.optim.optimizer import Optimizer
from functrain.tree.rest import Whole
from functrain.update.ema import Averages
from functrain.update.precision import DynamicScale
from functrain.update.surgery import Surgery


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

    @property
    def by_loss(self) -> bool:
        """Whether the gradient of each loss is computed by itself."""
        return self.surgery is not None and "per_loss" in self.surgery.declares

    def in_place(self, grads: Any, parts: Sequence[str]) -> Any:
        """Gradients of some parts, or those of each loss, where the layout has them."""
        places = self.optim.places_of_grads
        if places is None:
            return grads
        mine = {part: places[part] for part in parts}
        return brought(grads, dict.fromkeys(grads, mine) if self.by_loss else mine)

    @property
    def skips(self) -> bool:
        """Whether an update with a gradient that is not finite is left out."""
        return self.nonfinite == "skip" or self.loss_scale is not None
