"""functrain: train JAX models whose parts learn differently.

A pure `train_step` returns gradients; a partition splits them by path; each part has its own optax transform.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from functrain.auditing.audit import Audit, audit
from functrain.errors import (
    AccumulationError,
    AuditError,
    CadenceError,
    CheckpointError,
    DataError,
    EvaluationError,
    FitError,
    FunctrainError,
    LogError,
    LossError,
    NonFiniteError,
    OptimizerError,
    PartitionError,
    PhaseError,
    SaveError,
    UpdateError,
)
from functrain.gradients.accumulation import Accumulated, accumulate, zeros
from functrain.gradients.loss import Loss
from functrain.gradients.train_step import make_train_step
from functrain.optim.adoption import Adoption
from functrain.optim.hyperparameters import with_lr, with_state
from functrain.optim.optimizer import Optimizer
from functrain.optim.transforms import FROZEN
from functrain.tree.partition import Partition, partition
from functrain.tree.paths import flatten, unflatten
from functrain.tree.selectors import Selector, mask, non_float, take
from functrain.update.make import make_update
from functrain.update.phases import Alternation, Phase, alternate
from functrain.update.precision import DynamicScale
from functrain.update.state import TrainState
from functrain.update.target import ema
from functrain.update.update import Update
from functrain.update.window import Window

if TYPE_CHECKING:
    from functrain.loop.checkpoint.alone import load_model_state, load_params
    from functrain.loop.checkpoint.checkpoints import Checkpoints
    from functrain.loop.checkpoint.reading import Restored
    from functrain.loop.data import Data, from_arrays, from_tfds
    from functrain.loop.evaluation import Evaluation
    from functrain.loop.every import Every
    from functrain.loop.fit import Result, fit
    from functrain.loop.hooks import EarlyStopping, Hook
    from functrain.loop.logs import JsonLines, Logger, TensorBoard, read_json_lines
    from functrain.loop.metrics import ConfusionMatrix, Metric, OnHost, TopK
    from functrain.loop.plateau import ReduceOnPlateau
    from functrain.loop.run import Run
    from functrain.loop.signals import StopSignals
    from functrain.loop.sweep import Sweep, lr_sweep

__version__ = "0.2.0"

__all__ = [
    "FROZEN",
    "Accumulated",
    "AccumulationError",
    "Adoption",
    "Alternation",
    "Audit",
    "AuditError",
    "CadenceError",
    "CheckpointError",
    "Checkpoints",
    "ConfusionMatrix",
    "Data",
    "DataError",
    "DynamicScale",
    "EarlyStopping",
    "Evaluation",
    "EvaluationError",
    "Every",
    "FitError",
    "FunctrainError",
    "Hook",
    "JsonLines",
    "LogError",
    "Logger",
    "Loss",
    "LossError",
    "Metric",
    "NonFiniteError",
    "OnHost",
    "Optimizer",
    "OptimizerError",
    "Partition",
    "PartitionError",
    "Phase",
    "PhaseError",
    "ReduceOnPlateau",
    "Restored",
    "Result",
    "Run",
    "SaveError",
    "Selector",
    "StopSignals",
    "Sweep",
    "TensorBoard",
    "TopK",
    "TrainState",
    "Update",
    "UpdateError",
    "Window",
    "accumulate",
    "alternate",
    "audit",
    "ema",
    "fit",
    "flatten",
    "from_arrays",
    "from_tfds",
    "load_model_state",
    "load_params",
    "lr_sweep",
    "make_train_step",
    "make_update",
    "mask",
    "non_float",
    "partition",
    "read_json_lines",
    "take",
    "unflatten",
    "with_lr",
    "with_state",
    "zeros",
]

# The loop stands on Orbax and Grain, which take a second to import: what is of it is imported when it is asked for.
_LAZY = {
    "Checkpoints": "functrain.loop.checkpoint.checkpoints",
    "ConfusionMatrix": "functrain.loop.metrics",
    "Data": "functrain.loop.data",
    "EarlyStopping": "functrain.loop.hooks",
    "Evaluation": "functrain.loop.evaluation",
    "Every": "functrain.loop.every",
    "Hook": "functrain.loop.hooks",
    "JsonLines": "functrain.loop.logs",
    "Logger": "functrain.loop.logs",
    "Metric": "functrain.loop.metrics",
    "OnHost": "functrain.loop.metrics",
    "ReduceOnPlateau": "functrain.loop.plateau",
    "Restored": "functrain.loop.checkpoint.reading",
    "load_model_state": "functrain.loop.checkpoint.alone",
    "load_params": "functrain.loop.checkpoint.alone",
    "lr_sweep": "functrain.loop.sweep",
    "Result": "functrain.loop.fit",
    "Run": "functrain.loop.run",
    "StopSignals": "functrain.loop.signals",
    "Sweep": "functrain.loop.sweep",
    "TensorBoard": "functrain.loop.logs",
    "TopK": "functrain.loop.metrics",
    "fit": "functrain.loop.fit",
    "from_arrays": "functrain.loop.data",
    "from_tfds": "functrain.loop.data",
    "read_json_lines": "functrain.loop.logs",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'functrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
