"""What a classifier is judged by: numbers by class, confusion, curves, calibration."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from functrain.errors import EvaluationError
from functrain.loop.packages.curves import thinned
from functrain.loop.packages.drawing import blank, draw_confusion, draw_curves, draw_sorted
from functrain.loop.packages.given import check_installed, check_names, indices, reals, refuse
from functrain.tree.text import listed
from functrain.tree.warn import warn

_BINS = 10  # Of a calibration.
_DRAWN = 20  # Classes of which there are curves.


@dataclasses.dataclass(frozen=True)
class Classification:
    """A classifier's accuracy, precision, recall, F1 and areas by class, confusion matrix, curves and calibration.

    >>> label, logits = np.array([0, 1, 1, 0]), np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0]])
    >>> found = Classification(classes=("cat", "dog")).function(label, logits)
    >>> found["accuracy"], found["recall"], found["confusion"].tolist()
    (0.75, {'macro': 0.75, 'cat': 1.0, 'dog': 0.5}, [[2, 0], [1, 1]])

    Attributes:
      label: the output with the labels, int (batch,).
      scores: the output with a score for each class, (batch, classes); of two classes also (batch,), that of class 1.
      kind: what they are: "logits", of which the softmax is taken (of (batch,) the sigmoid), or "probabilities".
      classes: their names, in order; by default "0", "1", and so on.

    Raises:
      EvaluationError: scikit-learn is not installed, or an argument is none of these.
    """

    label: str = "label"
    scores: str = "logits"
    kind: Literal["logits", "probabilities"] = "logits"
    classes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_installed(self)
        check_names(self, label=self.label, scores=self.scores)
        if self.kind not in ("logits", "probabilities"):
            raise EvaluationError(f"Classification(kind={self.kind!r}): write kind='logits' or kind='probabilities'")
        if self.classes is None:
            return
        is_many = isinstance(self.classes, Sequence) and not isinstance(self.classes, str)
        if not is_many or not all(isinstance(name, str) for name in self.classes):
            raise EvaluationError(
                f"Classification(classes={self.classes!r:.100}): give their names, classes=('cat', 'dog'), or leave it"
                " out, as the scores say how many there are"
            )
        if len({*self.classes, "macro"}) <= len(self.classes):
            raise EvaluationError(
                f"Classification(classes={self.classes!r:.200}): two have one name, or one is called 'macro', as the"
                " mean over classes is: rename it"
            )
        object.__setattr__(self, "classes", tuple(self.classes))

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that it takes."""
        return self.label, self.scores

    def function(self, label: Any, scores: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Computes it all.

        Args:
          label: int (examples,).
          scores: (examples, classes), or of two classes (examples,).
          sample_weight: what each example counts, (examples,); by default 1.

        Returns:
          "accuracy"; "precision", "recall", "f1", "auc" and "average_precision", each by class and as their mean,
          "macro"; "calibration_error"; "confusion", labels by predictions; "roc" and "pr" by class, rows of at most 200
          points (false positive rate, true positive rate, threshold; recall, precision, threshold), of at most 20
          classes; "calibration", of each bin that has examples the confidence, the accuracy and the share of examples.
          A class that is neither label nor prediction of an example has no numbers and counts in no mean; one that no
          example has, or every one, has no curve and no area. 0 of 0 is 0.

        Raises:
          EvaluationError: a score is NaN, a probability is none, or a label is not of these classes.
        """
        probabilities = self._probabilities(np.asarray(scores))
        names = self._class_names(probabilities.shape[1])
        label = indices(self, self.label, np.asarray(label), len(names), "classes")
        weight = None if sample_weight is None else np.asarray(sample_weight, np.float64)
        prediction = probabilities.argmax(axis=1)
        bins, error = _calibration(probabilities, label == prediction, weight)
        areas, curves = _curves(label, probabilities, names, weight)
        return {
            "accuracy": float(np.average(label == prediction, weights=weight)),
            **_by_class(label, prediction, names, weight),
            **areas,
            "calibration_error": error,
            "confusion": _confusion(label, prediction, len(names), weight),
            **curves,
            "calibration": bins,
        }

    def figure(self, result: Mapping[str, Any]) -> Any:
        """The confusion matrix, ROC and precision by recall, and the calibration, as a `matplotlib.figure.Figure`.

        Raises:
          EvaluationError: matplotlib is not installed.
        """
        made, ((top, roc), (pr, calibration)) = blank(2, 2, 8, 8)
        draw_confusion(top, result["confusion"], self._class_names(len(result["confusion"])))
        top.set_title(f"accuracy {result['accuracy']:.4g}, F1 {result['f1']['macro']:.4g}")
        _draw_areas(roc, result.get("roc", {}), result["auc"], "lower right")
        _draw_areas(pr, result.get("pr", {}), result["average_precision"], "lower left")
        roc.set_title(_title("ROC", result["auc"]))
        pr.set_title(_title("precision by recall", result["average_precision"]))
        if "roc" in result:
            roc.set(xlabel="false positive rate", ylabel="true positive rate")
            pr.set(xlabel="recall", ylabel="precision")
        _draw_calibration(calibration, result)
        return made

    def _class_names(self, count: int) -> Sequence[str]:
        if self.classes is None:
            return [str(nth) for nth in range(count)]
        if len(self.classes) != count:
            raise EvaluationError(
                f"Classification: {self.scores!r} has the scores of {count} classes, and classes= has"
                f" {len(self.classes)} names, {listed(self.classes)}: give one for each"
            )
        return self.classes

    def _probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Float64 (examples, classes), of two classes at least."""
        if scores.ndim == 2 and scores.shape[1] == 1:
            scores = scores[:, 0]
        if scores.ndim not in (1, 2):
            raise EvaluationError(
                f"Classification: {self.scores!r} is of shape {scores.shape}: return (batch, classes), or (batch,) of"
                " two classes"
            )
        if self.kind == "probabilities":
            return self._checked(reals(self, self.scores, scores), scores.dtype)
        # A class that is masked has the logit -inf; softmax makes NaN of +inf, and of a row of nothing else.
        shifted = np.stack([np.zeros(len(scores)), scores], axis=1) if scores.ndim == 1 else scores.astype(np.float64)
        with np.errstate(invalid="ignore"):
            shifted = shifted - shifted.max(axis=1, keepdims=True)
            powers = np.exp(shifted)
            found = reals(self, self.scores, powers / powers.sum(axis=1, keepdims=True))
        if scores.ndim == 2 and np.all(scores >= 0) and np.all(abs(scores.sum(axis=1) - 1) < 1e-3):
            warn(
                f"Classification: the logits {self.scores!r} of every example sum to 1, as probabilities do, and the"
                " calibration is another for these: write Classification(kind='probabilities')"
            )
        return found

    def _checked(self, given: np.ndarray, dtype: Any) -> np.ndarray:
        instead = "return those of a softmax or sigmoid, or write Classification(kind='logits')"
        columns = np.stack([1 - given, given], axis=1) if given.ndim == 1 else given
        outside = ((columns < 0) | (columns > 1)).any(axis=1)
        refuse(self, outside, f"a {self.scores!r} outside of 0 to 1, which is no probability", instead)
        tolerance = 1e-3 if dtype.itemsize > 2 else 0.03  # A sum of what was rounded to 16 bits.
        off = abs(columns.sum(axis=1) - 1) > tolerance
        refuse(self, off, f"{self.scores!r} that do not sum to 1 as probabilities do", instead)
        return columns


def _by_class(label: Any, prediction: Any, names: Sequence[str], weight: Any) -> dict[str, dict[str, float]]:
    from sklearn.metrics import precision_recall_fscore_support

    present = np.union1d(label, prediction)
    found = precision_recall_fscore_support(
        label, prediction, labels=present, sample_weight=weight, zero_division=0, average=None
    )
    return {
        measure: _with_mean({names[each]: float(value) for each, value in zip(present, values, strict=True)})
        for measure, values in zip(("precision", "recall", "f1"), found[:3], strict=True)
    }


def _confusion(label: Any, prediction: Any, count: int, weight: Any) -> np.ndarray:
    from sklearn.metrics import confusion_matrix

    return np.asarray(confusion_matrix(label, prediction, labels=range(count), sample_weight=weight))


def _curves(label: Any, probabilities: Any, names: Sequence[str], weight: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The areas and the curves of each class against the rest."""
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

    aucs, precisions, rocs, prs = {}, {}, {}, {}
    for nth, name in enumerate(names):
        is_in, score = label == nth, probabilities[:, nth]
        if not 0 < np.count_nonzero(is_in) < len(label):
            continue
        false, true, at = roc_curve(is_in, score, sample_weight=weight)
        aucs[name] = float(auc(false, true))
        precisions[name] = float(average_precision_score(is_in, score, sample_weight=weight))
        if len(names) <= _DRAWN:
            rocs[name] = np.stack([false, true, at])[:, thinned(false, true)]
            precision, recall, at = precision_recall_curve(is_in, score, sample_weight=weight)
            kept = thinned(recall, precision)
            prs[name] = np.stack([recall, precision, np.append(at, np.inf)])[:, kept]
    areas = {"auc": _with_mean(aucs), "average_precision": _with_mean(precisions)}
    return areas, {"roc": rocs, "pr": prs} if len(names) <= _DRAWN else {}


def _calibration(probabilities: Any, is_right: Any, weight: Any) -> tuple[np.ndarray, float]:
    """Of each bin that has examples their confidence, accuracy and share; the mean distance of the first two."""
    confidence = probabilities.max(axis=1)
    weight = np.ones(len(confidence)) if weight is None else weight
    bins = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence)
    in_bin = np.bincount(bins, weight, minlength=_BINS)
    sums = np.stack([np.bincount(bins, weight * each, minlength=_BINS) for each in (confidence, is_right)])
    sums, in_bin = sums[:, in_bin > 0], in_bin[in_bin > 0]
    confidence, accuracy = sums / in_bin
    share = in_bin / in_bin.sum()
    return np.stack([confidence, accuracy, share]), float(np.sum(share * abs(confidence - accuracy)))


def _with_mean(values: dict[str, float]) -> dict[str, float]:
    return {"macro": float(np.mean([*values.values()])), **values} if values else {}


def _title(what: str, areas: Mapping[str, float]) -> str:
    return f"{what}, mean area {areas['macro']:.4g}" if areas else what


def _draw_areas(axes: Any, curves: Mapping[str, np.ndarray], areas: Mapping[str, float], where: str) -> None:
    by_class = {name: area for name, area in areas.items() if name != "macro"}
    if curves:
        draw_curves(axes, curves, by_class, where)
    elif by_class:
        draw_sorted(axes, by_class)
    else:
        axes.text(0.5, 0.5, "no curve: all examples\nare of one class", ha="center", transform=axes.transAxes)
    axes.set(ylim=(-0.02, 1.02))


def _draw_calibration(axes: Any, result: Mapping[str, Any]) -> None:
    confidence, accuracy, share = result["calibration"]
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axes.bar(confidence, share, width=0.06, color="C0", alpha=0.3, label="share of examples")
    axes.plot(confidence, accuracy, marker="o", color="C0", label="accuracy")
    axes.set(title=f"calibration, error {result['calibration_error']:.4g}", xlabel="confidence", xlim=(0, 1.02))
    axes.set(ylim=(-0.02, 1.02))
    axes.legend(fontsize=8)
