"""What an evaluation found, whole: for logs by name, and for those who draw it or keep it."""

from typing import Any, NamedTuple

import numpy as np


class Outcome(NamedTuple):
    """What an evaluation found, as `Evaluation.outcome` returns it.

    Attributes:
      results: the means and what the metrics returned, flat: numbers by name as "metric/name".
      by_metric: what each metric returned, by its name in `metrics=`, as it returned it.
      outputs: what the metrics on the host took, by the name that `eval_step` gave it, (examples, ...); no padding.
    """

    results: dict[str, Any]
    by_metric: dict[str, Any]
    outputs: dict[str, np.ndarray]
