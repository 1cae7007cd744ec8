"""What a regression is judged by: its errors, and how they are spread."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from functrain.errors import EvaluationError
from functrain.loop.packages.drawing import blank, draw_histogram
from functrain.loop.packages.given import check_installed, check_names, reals

_QUANTILES = {"least": 0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "most": 1}
_BINS = 40


@dataclasses.dataclass(frozen=True)
class Regression:
    """The mean absolute error, the root of the mean squared one, R2, and the residuals of predicted numbers.

    >>> found = Regression().function(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 4.0]))
    >>> round(found["mae"], 3), round(found["rmse"], 3), round(found["r2"], 3), found["residual"]["most"]
    (0.333, 0.577, 0.786, 1.0)

    Attributes:
      label: the output with the true numbers, (batch, ...).
      prediction: the output with the predicted ones, of the same shape.

    Raises:
      EvaluationError: scikit-learn is not installed.
    """

    label: str = "label"
    prediction: str = "prediction"

    def __post_init__(self) -> None:
        check_installed(self)
        check_names(self, label=self.label, prediction=self.prediction)

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that it takes."""
        return self.label, self.prediction

    def function(self, label: Any, prediction: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Computes it all.

        Args:
          label: (examples, ...).
          prediction: of the same shape.
          sample_weight: what each example counts, (examples,); by default 1.

        Returns:
          "mae", "rmse"; "r2", where there are two examples, and of several numbers an example their mean, each as
          scikit-learn computes it; "residual", of prediction less label the mean and, by name, quantiles that are
          residuals themselves; "histogram" of these, "edges" and "counts"; "density", counts of labels (rows) by
          predictions between the same "edges".

        Raises:
          EvaluationError: a number is NaN or infinite, or the shapes differ.
        """
        from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

        label, prediction = np.asarray(label), np.asarray(prediction)
        if label.shape != prediction.shape:
            raise EvaluationError(
                f"Regression: {self.label!r} is of shape {label.shape} and {self.prediction!r} of {prediction.shape}:"
                " return them in one shape, as by squeeze(-1)"
            )
        label, prediction = (
            reals(self, name, each).reshape(len(each), -1)
            for name, each in ((self.label, label), (self.prediction, prediction))
        )
        weight = None if sample_weight is None else np.asarray(sample_weight, np.float64)
        found = {
            "mae": float(mean_absolute_error(label, prediction, sample_weight=weight)),
            "rmse": float(root_mean_squared_error(label, prediction, sample_weight=weight)),
        }
        if len(label) > 1:
            found["r2"] = float(r2_score(label, prediction, sample_weight=weight))
        each = None if weight is None else np.repeat(weight, label.shape[1])
        return found | _residuals(label.ravel(), prediction.ravel(), each)

    def figure(self, result: Mapping[str, Any]) -> Any:
        """The residuals, and predictions by label, as a `matplotlib.figure.Figure`.

        Raises:
          EvaluationError: matplotlib is not installed.
        """
        made, (left, right) = blank(1, 2, 8, 4)
        draw_histogram(left, **result["histogram"])
        left.axvline(0, color="gray", linestyle=":")
        left.set(title=f"MAE {result['mae']:.4g}, RMSE {result['rmse']:.4g}", xlabel="prediction less label")
        edges, counts = result["density"]["edges"], result["density"]["counts"]
        right.pcolormesh(edges, edges, np.ma.masked_equal(counts.T, 0), cmap="viridis", norm="log")
        right.plot(edges[[0, -1]], edges[[0, -1]], color="gray", linestyle=":")
        title = f"R2 {result['r2']:.4g}" if "r2" in result else "one example"
        right.set(title=title, xlabel="label", ylabel="prediction", aspect="equal")
        return made


def _residuals(label: np.ndarray, prediction: np.ndarray, weight: np.ndarray | None) -> dict[str, Any]:
    residual = prediction - label
    # The one kind of quantile that takes weights; used without them too, so that the weight 2 is the example twice.
    quantiles = np.quantile(residual, [*_QUANTILES.values()], weights=weight, method="inverted_cdf")
    counts, edges = np.histogram(residual, _BINS, weights=weight)
    both = np.append(label, prediction)
    span = np.histogram_bin_edges(both, _BINS)
    density, _, _ = np.histogram2d(label, prediction, [span, span], weights=weight)
    return {
        "residual": {
            "mean": float(np.average(residual, weights=weight)),
            **{name: float(value) for name, value in zip(_QUANTILES, quantiles, strict=True)},
        },
        "histogram": {"edges": edges, "counts": counts},
        "density": {"edges": span, "counts": density},
    }
