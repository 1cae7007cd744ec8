"""A classification has scikit-learn's own numbers, of what an evaluation saw, and says what it can't judge."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looked_at import assert_same, is_drawn, pixels, texts
from scipy.special import expit, softmax
from sklearn import metrics
from sklearn.calibration import calibration_curve

import functrain as ft

RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, 4, 300)
LOGITS = RNG.normal(size=(300, 4)) + 2 * np.eye(4)[LABEL]
WEIGHT = RNG.uniform(0.1, 3, 300)
NAMES = ["0", "1", "2", "3"]


def without_warnings(found):
    """What the tests of edges call: a warning of scikit-learn in one is an error."""
    return pytest.mark.filterwarnings("error")(found)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_all_numbers_are_those_of_scikit_learn(weight):
    found = ft.Classification().function(LABEL, LOGITS, sample_weight=weight)
    prediction, probabilities = LOGITS.argmax(1), softmax(LOGITS, axis=1)
    is_in = np.eye(4)[LABEL]
    assert found["accuracy"] == metrics.accuracy_score(LABEL, prediction, sample_weight=weight)
    for name, score in [
        ("precision", metrics.precision_score), ("recall", metrics.recall_score), ("f1", metrics.f1_score)
    ]:  # fmt: skip
        each = score(LABEL, prediction, average=None, sample_weight=weight)
        assert [found[name][each] for each in NAMES] == each.tolist()
        assert found[name]["macro"] == pytest.approx(
            score(LABEL, prediction, average="macro", sample_weight=weight), rel=1e-12
        )
    for name, score in [("auc", metrics.roc_auc_score), ("average_precision", metrics.average_precision_score)]:
        each = score(is_in, probabilities, average=None, sample_weight=weight)
        assert [found[name][each] for each in NAMES] == pytest.approx(each.tolist(), rel=1e-12)
        assert found[name]["macro"] == pytest.approx(np.mean(each), rel=1e-12)
    confusion = metrics.confusion_matrix(LABEL, prediction, sample_weight=weight)
    assert found["confusion"].tolist() == confusion.tolist()
    assert found["confusion"].dtype.kind == ("i" if weight is None else "f")


def test_calibration_is_that_of_scikit_learn_with_the_share_of_each_bin():
    confidence = softmax(LOGITS, axis=1).max(1)
    is_right = LOGITS.argmax(1) == LABEL
    accuracy, mean = calibration_curve(is_right, confidence, n_bins=10)
    found = ft.Classification().function(LABEL, LOGITS)
    assert found["calibration"][:2].tolist() == [pytest.approx(mean.tolist()), pytest.approx(accuracy.tolist())]
    share = np.histogram(confidence, np.linspace(0, 1, 11))[0] / 300
    assert found["calibration"][2].tolist() == pytest.approx(share[share > 0].tolist())
    assert found["calibration_error"] == pytest.approx(np.sum(share[share > 0] * abs(mean - accuracy)))


def test_curves_are_those_of_scikit_learn_in_at_most_200_points():
    found = ft.Classification().function(LABEL, LOGITS)
    score = softmax(LOGITS, axis=1)[:, 2]
    assert found["roc"]["2"].tolist() == np.stack(metrics.roc_curve(LABEL == 2, score)).tolist()
    precision, recall, at = metrics.precision_recall_curve(LABEL == 2, score)
    drawn = found["pr"]["2"]
    assert drawn.shape[0] == 3
    assert 100 < drawn.shape[1] <= 200 < len(recall)
    every = {*zip(recall, precision, [*at, np.inf], strict=True)}
    assert {*zip(*drawn.tolist(), strict=True)} < every
    assert drawn[:, -1].tolist() == [0, 1, np.inf]


def test_an_evaluation_gives_it_every_example_once_and_no_padding():
    data = ft.from_arrays({"label": LABEL, "logits": LOGITS.astype(np.float32)}, batch_size=64, last="pad")
    evaluation = ft.Evaluation(
        lambda params, batch: {"label": batch["label"], "logits": batch["logits"]},
        data,
        metrics={"report": ft.Classification(), "confusion": ft.OnHost(metrics.confusion_matrix, "label", "label")},
    )
    outcome = evaluation.outcome(None)
    expected = ft.Classification().function(LABEL, LOGITS.astype(np.float32))
    assert_same(outcome.by_metric["report"], expected)
    assert outcome.results["report/f1/3"] == pytest.approx(expected["f1"]["3"])
    assert outcome.results["report/roc/1"].shape == expected["roc"]["1"].shape
    assert {name: len(array) for name, array in outcome.outputs.items()} == {"label": 300, "logits": 300}


def test_an_evaluation_gives_it_the_weights_of_its_batches():
    batches = [
        {"label": LABEL[i : i + 100], "logits": LOGITS[i : i + 100], "weight": WEIGHT[i : i + 100]}
        for i in (0, 100, 200)
    ]
    evaluation = ft.Evaluation(
        lambda params, batch: {"label": batch["label"], "logits": batch["logits"]},
        batches,
        metrics={"report": ft.Classification()},
    )
    expected = metrics.f1_score(LABEL, LOGITS.argmax(1), average="macro", sample_weight=WEIGHT)
    assert evaluation(None)["report/f1/macro"] == pytest.approx(expected, rel=1e-6)  # Weights are float32.


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=12))
def test_a_whole_weight_is_the_example_that_often(examples):
    label, high, weight = np.array(examples).T
    logits = np.eye(3)[high] * (2 + np.arange(len(label)))[:, None]
    package = ft.Classification()
    weighted = package.function(label, logits, sample_weight=weight.astype(float))
    assert_same(weighted, package.function(np.repeat(label, weight), np.repeat(logits, weight, axis=0)))


# Two classes


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("shape", [(300,), (300, 1)])
def test_of_two_classes_the_score_of_the_second_is_enough(kind, shape):
    label, logit = LABEL % 2, LOGITS[:, 1] + LOGITS[:, 3]
    scores = logit if kind == "logits" else expit(logit)
    found = ft.Classification(kind=kind, classes=("no", "yes")).function(label, scores.reshape(shape))
    assert found["confusion"].tolist() == metrics.confusion_matrix(label, logit > 0).tolist()
    assert found["auc"]["yes"] == pytest.approx(metrics.roc_auc_score(label, logit))
    assert found["auc"]["no"] == pytest.approx(found["auc"]["macro"])
    assert found["average_precision"]["yes"] == pytest.approx(metrics.average_precision_score(label, logit))
    both = np.stack([0 * logit, logit], axis=1)
    assert_same(found, ft.Classification(classes=("no", "yes")).function(label, both))


# Edges


@without_warnings
def test_a_class_that_is_neither_label_nor_prediction_has_no_numbers_and_counts_in_no_mean():
    label, logits = np.where(LABEL == 2, 0, LABEL), np.where(np.arange(4) == 2, -np.inf, LOGITS)
    found = ft.Classification().function(label, logits)
    assert found["f1"].keys() == found["auc"].keys() == found["pr"].keys() | {"macro"} == {"macro", "0", "1", "3"}
    assert found["f1"]["macro"] == pytest.approx(metrics.f1_score(label, logits.argmax(1), average="macro"))
    assert found["confusion"].shape == (4, 4)


@without_warnings
def test_a_class_that_no_example_has_and_one_that_none_is_predicted_as_are_0_and_have_no_area():
    found = ft.Classification().function(np.array([0, 1, 1]), np.array([[1, 0, 0], [0, 0, 3], [2, 0, 0.0]]))
    assert found["recall"] == {"macro": 1 / 3, "0": 1.0, "1": 0.0, "2": 0.0}
    assert found["precision"] == {"macro": 0.5 / 3, "0": 0.5, "1": 0.0, "2": 0.0}
    assert found["auc"].keys() == {"macro", "0", "1"}


@without_warnings
def test_one_example_is_judged_and_drawn():
    found = ft.Classification().function(np.array([1]), np.array([[0.0, 3.0]]))
    assert (found["accuracy"], found["f1"], found["auc"], found["roc"]) == (1.0, {"macro": 1.0, "1": 1.0}, {}, {})
    assert found["calibration"].shape == (3, 1)
    assert pixels(ft.Classification().figure(found)).shape == (800, 800, 3)


@without_warnings
def test_of_many_classes_there_are_areas_and_no_curves():
    label = np.arange(60) % 30
    found = ft.Classification().function(label, np.eye(30)[label] + RNG.normal(size=(60, 30)))
    assert len(found["auc"]) == len(found["f1"]) == 31
    assert "roc" not in found
    assert "pr" not in found
    figure = ft.Classification().figure(found)
    assert pixels(figure).shape == (800, 800, 3)
    assert figure.axes[1].get_xlabel() == "classes, the lowest first"


def test_logits_of_16_bits_and_a_class_that_is_masked_are_taken():
    logits = np.asarray(jnp.asarray(LOGITS, jnp.bfloat16))
    found = ft.Classification().function(LABEL, logits)
    assert_same(found, ft.Classification().function(LABEL, logits.astype(np.float64)))
    probabilities = np.asarray(jnp.asarray(softmax(LOGITS, axis=1), jnp.bfloat16))
    ft.Classification(kind="probabilities").function(LABEL, probabilities)


# Figures


def test_a_figure_has_the_matrix_both_curves_and_the_calibration():
    names = ("a $\\broken{$", "_birds", "a name that is much too long for a legend", "3")
    package = ft.Classification(classes=names)
    figure = package.figure(package.function(LABEL, LOGITS))
    assert pixels(figure).shape == (800, 800, 3)
    matrix, roc, pr, calibration = figure.axes
    assert all(map(is_drawn, figure.axes))
    assert [len(axes.lines) for axes in (roc, pr)] == [4, 4]
    assert {text.split("  ")[1] for text in texts(roc) if "  " in text} == {
        "a $\\broken{$", "_birds", "a name that is mu\N{HORIZONTAL ELLIPSIS}", "3"
    }  # fmt: skip
    assert "_birds" in texts(matrix)
    assert calibration.get_title().startswith("calibration, error 0.")


# Errors


@pytest.mark.parametrize(
    ("options", "label", "scores", "told"),
    [
        ({}, [0, 1], [[0, 1], [np.nan, 0]],
         "1 of 2 examples, the first is number 1, have a 'logits' that is NaN or infinite: give these examples the"
         " weight 0, or mend what eval_step returns"),
        ({}, [0], [[np.inf, 0]], "have a 'logits' that is NaN or infinite"),
        ({}, [0], [[-np.inf, -np.inf]], "have a 'logits' that is NaN or infinite"),
        ({}, [0, 2], [[0, 2], [2, 0]],
         "1 of 2 examples have a 'label' outside of 0 to 1, such as 2, and there are 2 classes: give them the weight"
         " 0, or more classes"),
        ({}, [-1, 0], [[0, 2], [2, 0]], "'label' outside of 0 to 1, such as -1"),
        ({}, [0.5, 0], [[0, 2], [2, 0]], "2 examples, the first is number 0, have a 'label' that is no whole number"),
        ({}, [[1, 0], [0, 1]], [[0, 2], [2, 0]],
         "'label' is of shape (2, 2): return one whole number for each example; of what is one-hot, label.argmax(-1)"),
        ({}, [0], [[[0, 1]]], "'logits' is of shape (1, 1, 2): return (batch, classes), or (batch,) of two classes"),
        ({"classes": ["a", "b", "c"]}, [0], [[0, 2]],
         "'logits' has the scores of 2 classes, and classes= has 3 names, 'a', 'b', 'c': give one for each"),
        ({"kind": "probabilities"}, [0, 1], [[0.5, 0.5], [0.5, 0.3]],
         "1 of 2 examples, the first is number 1, have 'logits' that do not sum to 1 as probabilities do: return those"
         " of a softmax or sigmoid, or write Classification(kind='logits')"),
        ({"kind": "probabilities"}, [0, 1], [2, -3], "have a 'logits' outside of 0 to 1, which is no probability"),
        ({}, [], np.zeros((0, 2)), "no example has a weight above 0: give data with examples"),
    ],
)  # fmt: skip
def test_what_can_not_be_judged_is_told_with_the_name_of_the_output(options, label, scores, told):
    with pytest.raises(ft.EvaluationError, match=f"^Classification: .*{re.escape(told)}"):
        ft.Classification(**options).function(np.array(label), np.array(scores, float))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "scores"}, "Classification(kind='scores'): write kind='logits' or kind='probabilities'"),
        ({"classes": 10}, "Classification(classes=10): give their names, classes=('cat', 'dog'), or leave it out"),
        ({"classes": "ab"}, "Classification(classes='ab'): give their names"),
        ({"classes": ("a", "a")}, "Classification(classes=('a', 'a')): two have one name, or one is called 'macro'"),
        ({"classes": ("a", "macro")}, "one is called 'macro', as the mean over classes is: rename it"),
        ({"label": 10}, "Classification(label=10): give the name of an output of eval_step, Classification(label="),
    ],
)  # fmt: skip
def test_an_option_that_is_none_is_told_when_it_is_made(options, told):
    with pytest.raises(ft.EvaluationError, match=re.escape(told)):
        ft.Classification(**options)


def test_probabilities_that_are_taken_for_logits_are_warned_of():
    with pytest.warns(UserWarning, match=r"sum to 1, as probabilities do, .*: write Classification\(kind='probabil"):
        ft.Classification().function(LABEL, softmax(LOGITS, axis=1))
