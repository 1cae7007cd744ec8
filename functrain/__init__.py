"""functrain: train JAX models whose parts learn differently.

A pure `train_step` returns gradients; a partition splits them by path; each part has its own optax transform.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from functrain.errors import (
    AccumulationError,
    AuditError,
    CadenceError,
    CheckpointError,
    DataError,
    EvaluationError,
    FitError,
    FunctrainError,
    LayoutError,
    LogError,
    LossError,
    NonFiniteError,
    OptimizerError,
    PartitionError,
    PhaseError,
    PlanError,
    RecordError,
    SaveError,
    StartError,
    StorageError,
    UpdateError,
)

if TYPE_CHECKING:
    from functrain.auditing.audit import Audit, audit
    from functrain.gradients.accumulation import Accumulated, accumulate, zeros
    from functrain.gradients.loss import Loss
    from functrain.gradients.train_step import make_train_step
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
    from functrain.loop.outcome import Outcome
    from functrain.loop.packages.classification import Classification
    from functrain.loop.packages.language import Language
    from functrain.loop.packages.regression import Regression
    from functrain.loop.packages.retrieval import Retrieval
    from functrain.loop.plateau import ReduceOnPlateau
    from functrain.loop.record.record import Record
    from functrain.loop.run import Run
    from functrain.loop.signals import StopSignals
    from functrain.loop.sources import from_source
    from functrain.loop.start import start
    from functrain.loop.sweep import Sweep, lr_sweep
    from functrain.loop.to_mlflow import MLflow
    from functrain.loop.to_wandb import WandB
    from functrain.mesh.layout import Layout
    from functrain.mesh.make import layout
    from functrain.mesh.specs import largest
    from functrain.optim.adoption import Adoption
    from functrain.optim.hyperparameters import with_lr, with_state
    from functrain.optim.optimizer import Optimizer
    from functrain.optim.stacked import stacked
    from functrain.optim.transforms import FROZEN
    from functrain.planning.plan import Plan, plan
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
    "Classification",
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
    "Language",
    "Layout",
    "LayoutError",
    "Limits",
    "LogError",
    "Logger",
    "Loss",
    "LossError",
    "MLflow",
    "Metric",
    "NonFiniteError",
    "OnHost",
    "Optimizer",
    "OptimizerError",
    "Outcome",
    "Partition",
    "PartitionError",
    "Phase",
    "PhaseError",
    "Plan",
    "PlanError",
    "Record",
    "RecordError",
    "ReduceOnPlateau",
    "Regression",
    "Restored",
    "Result",
    "Retrieval",
    "Run",
    "SaveError",
    "Selector",
    "StartError",
    "StopSignals",
    "StorageError",
    "Sweep",
    "TensorBoard",
    "TopK",
    "TrainState",
    "Update",
    "UpdateError",
    "WandB",
    "Window",
    "accumulate",
    "alternate",
    "audit",
    "ema",
    "fit",
    "flatten",
    "from_arrays",
    "from_source",
    "from_tfds",
    "largest",
    "layout",
    "load_model_state",
    "load_params",
    "lr_sweep",
    "make_train_step",
    "make_update",
    "mask",
    "non_float",
    "partition",
    "plan",
    "read_json_lines",
    "stacked",
    "start",
    "take",
    "unflatten",
    "with_lr",
    "with_state",
    "zeros",
]

# JAX takes a second to import, and Orbax and Grain another one: what is made of them is imported when it is asked for.
_LAZY = {
    "Accumulated": "functrain.gradients.accumulation",
    "Adoption": "functrain.optim.adoption",
    "Alternation": "functrain.update.phases",
    "Audit": "functrain.auditing.audit",
    "Checkpoints": "functrain.loop.checkpoint.checkpoints",
    "Classification": "functrain.loop.packages.classification",
    "ConfusionMatrix": "functrain.loop.metrics",
    "Data": "functrain.loop.data",
    "DynamicScale": "functrain.update.precision",
    "EarlyStopping": "functrain.loop.hooks",
    "Evaluation": "functrain.loop.evaluation",
    "Every": "functrain.loop.every",
    "FROZEN": "functrain.optim.transforms",
    "Hook": "functrain.loop.hooks",
    "JsonLines": "functrain.loop.logs",
    "Language": "functrain.loop.packages.language",
    "Layout": "functrain.mesh.layout",
    "Limits": "functrain.loop.remote.limits",
    "Logger": "functrain.loop.logs",
    "Loss": "functrain.gradients.loss",
    "MLflow": "functrain.loop.to_mlflow",
    "Metric": "functrain.loop.metrics",
    "OnHost": "functrain.loop.metrics",
    "Optimizer": "functrain.optim.optimizer",
    "Outcome": "functrain.loop.outcome",
    "Partition": "functrain.tree.partition",
    "Phase": "functrain.update.phases",
    "Plan": "functrain.planning.plan",
    "Record": "functrain.loop.record.record",
    "ReduceOnPlateau": "functrain.loop.plateau",
    "Regression": "functrain.loop.packages.regression",
    "Restored": "functrain.loop.checkpoint.reading",
    "Result": "functrain.loop.fit",
    "Retrieval": "functrain.loop.packages.retrieval",
    "Run": "functrain.loop.run",
    "Selector": "functrain.tree.selectors",
    "StopSignals": "functrain.loop.signals",
    "Sweep": "functrain.loop.sweep",
    "TensorBoard": "functrain.loop.logs",
    "TopK": "functrain.loop.metrics",
    "TrainState": "functrain.update.state",
    "Update": "functrain.update.update",
    "WandB": "functrain.loop.to_wandb",
    "Window": "functrain.update.window",
    "accumulate": "functrain.gradients.accumulation",
    "alternate": "functrain.update.phases",
    "audit": "functrain.auditing.audit",
    "ema": "functrain.update.target",
    "fit": "functrain.loop.fit",
    "flatten": "functrain.tree.paths",
    "from_arrays": "functrain.loop.data",
    "from_source": "functrain.loop.sources",
    "from_tfds": "functrain.loop.data",
    "largest": "functrain.mesh.specs",
    "layout": "functrain.mesh.make",
    "load_model_state": "functrain.loop.checkpoint.alone",
    "load_params": "functrain.loop.checkpoint.alone",
    "lr_sweep": "functrain.loop.sweep",
    "make_train_step": "functrain.gradients.train_step",
    "make_update": "functrain.update.make",
    "mask": "functrain.tree.selectors",
    "non_float": "functrain.tree.selectors",
    "partition": "functrain.tree.partition",
    "plan": "functrain.planning.plan",
    "read_json_lines": "functrain.loop.logs",
    "stacked": "functrain.optim.stacked",
    "start": "functrain.loop.start",
    "take": "functrain.tree.selectors",
    "unflatten": "functrain.tree.paths",
    "with_lr": "functrain.optim.hyperparameters",
    "with_state": "functrain.optim.hyperparameters",
    "zeros": "functrain.gradients.accumulation",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'functrain' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
