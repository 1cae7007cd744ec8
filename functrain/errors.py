"""Every error of functrain, under one base; each is also the builtin that fits it.

A message names what is wrong, shows what was given and what was expected, and ends with what to write instead.
"""


class FunctrainError(Exception):
    """What functrain raises of its own."""


class PartitionError(FunctrainError, ValueError):
    """A selector, a rule or a tree that does not fit the leaves it is meant for."""


class LayoutError(FunctrainError, ValueError):
    """A rule that does not fit a leaf or the mesh, or arrays that do not fit a layout."""


class LossError(FunctrainError, ValueError):
    """A loss function, what it returned, or a route of its losses, that no gradient can be taken of."""


class AccumulationError(FunctrainError, ValueError):
    """Gradients that do not fit what has been accumulated."""


class OptimizerError(FunctrainError, ValueError):
    """Transforms, gradients, rates or states that do not fit the parts of an optimizer."""


class PhaseError(FunctrainError, ValueError):
    """Phases that do not fit each other or the optimizer."""


class UpdateError(FunctrainError, ValueError):
    """A state, a batch or an option that does not fit an update."""


class AuditError(FunctrainError, ValueError):
    """A trained part that no loss reaches."""


class PlanError(FunctrainError, ValueError):
    """A plan that can't be made as asked."""


class DataError(FunctrainError, ValueError):
    """Data that cannot be batched as asked."""


class EvaluationError(FunctrainError, ValueError):
    """An evaluation step or a metric whose results cannot be computed as asked."""


class CadenceError(FunctrainError, ValueError):
    """A cadence that is none."""


class LogError(FunctrainError, ValueError):
    """A metric, a log or a file of logs that cannot be used as it is."""


class FitError(FunctrainError, ValueError):
    """Options of a run that don't fit each other or the update."""


class RecordError(FunctrainError, ValueError):
    """A record of a run that can't be kept as asked, or the folder of one that is none."""


class StartError(FunctrainError, ValueError):
    """Processes of one run that are not told who they are."""


class NonFiniteError(FunctrainError, ArithmeticError):
    """A loss or a parameter became NaN or infinite."""


class CheckpointError(FunctrainError, ValueError):
    """A checkpoint that does not fit the state that is asked for, or that cannot be used."""


class SaveError(FunctrainError, OSError):
    """A checkpoint that could not be written. The one before it is whole, and the next save is tried as ever."""


class StorageError(FunctrainError, OSError):
    """Remote storage that can't be reached or refuses what it is asked for, or an address of none."""
