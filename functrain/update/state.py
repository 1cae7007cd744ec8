"""The state of a run."""

import dataclasses
from typing import Any, ClassVar

import jax

from functrain.tree.paths import PyTree
from functrain.update.packed import Packable
from functrain.update.window import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainState(Packable):
    """All that a resumed run needs; made by `update.init`, a pytree.

    Attributes:
      params: the whole tree.
      opt_state: `{part: state}` of the trained parts.
      model_state: what the loss function returns as such; None if it has none.
      scale_state: the state of the dynamic loss scale; None without one.
      ema: `{part: Average(count, mean)}`, what `update.ema(state)` debiases; None without averages.
      key: the run's key; it never changes. The key of a batch follows from it and from `batches`.
      step: finished windows, skipped ones included; a 0-d int64 of the host. Programs are given 32 bits of it: past
        2**31 - 1 a loss function sees that number.
      batches: batches seen; a 0-d int64 of the host. Keys follow from its last 32 bits.
      pending: batches in the unfinished window; a 0-d int64 of the host.
      window: what is summed of the unfinished window; None where none is pending.
      configuration: what the update is made of, as JSON: the parts, their paths and optimizers, the accumulation, the
        phases. Static; a checkpoint is checked against it.
    """

    params: PyTree
    opt_state: dict[str, Any]
    model_state: Any
    scale_state: Any
    ema: Any
    key: Any
    step: Any
    batches: Any
    pending: Any
    window: Window | None
    configuration: str = dataclasses.field(default="{}", metadata={"static": True})

    packed: ClassVar[tuple[str, ...]] = ("params", "opt_state", "model_state", "scale_state", "ema")
