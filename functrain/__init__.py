"""functrain: train JAX models whose parts learn differently.

A pure `train_step` returns gradients; a partition splits them by path; each part has its own optax transform.
"""

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

__all__ = [
    "FROZEN",
    "Accumulated",
    "AccumulationError",
    "Audit",
    "AuditError",
    "DynamicScale",
    "Loss",
    "LossError",
    "Optimizer",
    "OptimizerError",
    "Partition",
    "PartitionError",
    "Phase",
    "PhaseError",
    "TrainState",
    "Update",
    "UpdateError",
    "accumulate",
    "alternate",
    "audit",
    "flatten",
    "make_train_step",
    "make_update",
    "non_float",
    "partition",
    "take",
    "unflatten",
    "with_lr",
    "zeros",
]
