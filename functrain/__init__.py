"""functrain: train JAX models whose parts learn differently.

A pure `train_step` returns gradients; a partition splits them by path; each part has its own optax transform.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from functrain.accumulate import Accumulated, AccumulationError, accumulate, zeros
from functrain.audit import Audit, audit
from functrain.gradients import Loss, make_train_step
from functrain.learning_rate import with_lr
from functrain.optimizer import FROZEN, Optimizer
from functrain.optimizer_state import OptimizerError
from functrain.partition import Partition, partition, take
from functrain.paths import PartitionError, flatten, non_float, unflatten
from functrain.phases import Phase, PhaseError, alternate
from functrain.precision import DynamicScale
from functrain.reach import AuditError
from functrain.routes import LossError
from functrain.state import TrainState, UpdateError
from functrain.update import Update, make_update

if TYPE_CHECKING:
    from functrain.loop import (
        Checkpoints,
        ConfusionMatrix,
        EarlyStopping,
        Evaluation,
        Every,
        Hook,
        JsonLines,
        OnHost,
        TensorBoard,
        TopK,
        fit,
        from_arrays,
        from_tfds,
    )

__all__ = [
    "FROZEN",
    "Accumulated",
    "AccumulationError",
    "Audit",
    "AuditError",
    "Checkpoints",
    "ConfusionMatrix",
    "DynamicScale",
    "EarlyStopping",
    "Evaluation",
    "Every",
    "Hook",
    "JsonLines",
    "Loss",
    "LossError",
    "OnHost",
    "Optimizer",
    "OptimizerError",
    "Partition",
    "PartitionError",
    "Phase",
    "PhaseError",
    "TensorBoard",
    "TopK",
    "TrainState",
    "Update",
    "UpdateError",
    "accumulate",
    "alternate",
    "audit",
    "fit",
    "flatten",
    "from_arrays",
    "from_tfds",
    "make_train_step",
    "make_update",
    "non_float",
    "partition",
    "take",
    "unflatten",
    "with_lr",
    "zeros",
]

# The loop stands on Orbax and Grain, which take a second to import: what is of it is imported when it is asked for.
_LOOP = {
    "Checkpoints", "ConfusionMatrix", "EarlyStopping", "Evaluation", "Every", "Hook", "JsonLines", "OnHost",
    "TensorBoard", "TopK", "fit", "from_arrays", "from_tfds",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LOOP:
        return getattr(import_module("functrain.loop"), name)
    raise AttributeError(f"module 'functrain' has no attribute {name!r}")
