"""The optional loop: fit, exact checkpoints, data, evaluation. The host side, with no arithmetic on gradients."""

from functrain.errors import (
    CadenceError,
    CheckpointError,
    DataError,
    EvaluationError,
    FitError,
    LogError,
    NonFiniteError,
    SaveError,
)
from functrain.loop.checkpoints import Checkpoints, Restored
from functrain.loop.data import Data, from_arrays, from_tfds
from functrain.loop.evaluation import Evaluation
from functrain.loop.every import Every
from functrain.loop.fit import Result, fit
from functrain.loop.hooks import EarlyStopping, Hook
from functrain.loop.logs import JsonLines, Logger, TensorBoard, flattened, read_json_lines
from functrain.loop.metrics import ConfusionMatrix, Metric, OnHost, TopK
from functrain.loop.run import Run
from functrain.loop.signals import StopSignals

__all__ = [
    "CadenceError",
    "CheckpointError",
    "Checkpoints",
    "ConfusionMatrix",
    "Data",
    "DataError",
    "EarlyStopping",
    "Evaluation",
    "EvaluationError",
    "Every",
    "FitError",
    "Hook",
    "JsonLines",
    "LogError",
    "Logger",
    "Metric",
    "NonFiniteError",
    "OnHost",
    "Restored",
    "Result",
    "Run",
    "SaveError",
    "StopSignals",
    "TensorBoard",
    "TopK",
    "fit",
    "flattened",
    "from_arrays",
    "from_tfds",
    "read_json_lines",
]
