"""A regression has scikit-learn's numbers, and its residuals."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from looked_at import assert_same, is_drawn, pixels
from sklearn import metrics

import functrain as ft

RNG = np.random.default_rng(0)
LABEL = RNG.normal(size=(200, 3)) * [1, 10, 100]
PREDICTION = LABEL + RNG.normal(size=(200, 3))
WEIGHT = RNG.uniform(0.1, 3, 200)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("columns", [np.s_[:], np.s_[:, 0]])
def test_all_numbers_are_those_of_scikit_learn(weight, columns):
    label, prediction = LABEL[columns], PREDICTION[columns]
    found = ft.Regression().function(label, prediction, sample_weight=weight)
    for name, score in [
        ("mae", metrics.mean_absolute_error), ("rmse", metrics.root_mean_squared_error), ("r2", metrics.r2_score)
    ]:  # fmt: skip
        assert found[name] == score(label, prediction, sample_weight=weight), name


def test_quantiles_are_residuals_and_the_histogram_has_all_of_them():
    found = ft.Regression().function(LABEL, PREDICTION)
    residual = (PREDICTION - LABEL).ravel()
    quantiles = found["residual"]
    assert {*quantiles.values()} - {quantiles["mean"]} <= {*residual.tolist()}
    assert (quantiles["least"], quantiles["most"]) == (residual.min(), residual.max())
    assert np.mean(residual <= quantiles["q25"]) == 0.25
    assert found["histogram"]["counts"].sum() == found["density"]["counts"].sum() == 600
    assert found["histogram"]["edges"][[0, -1]].tolist() == [residual.min(), residual.max()]


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)), min_size=2, max_size=12))
def test_a_whole_weight_is_the_example_that_often(examples):
    label, prediction, weight = np.array(examples, float).T
    package, often = ft.Regression(), weight.astype(int)
    expected = package.function(np.repeat(label, often), np.repeat(prediction, often))
    assert_same(package.function(label, prediction, sample_weight=weight), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("label", "prediction"), [([2.0], [3.0]), ([2.0, 2.0], [2.0, 2.0])])
def test_one_example_and_equal_ones_are_judged_and_drawn(label, prediction):
    found = ft.Regression().function(np.array(label), np.array(prediction))
    assert found["mae"] == prediction[0] - label[0]
    assert ("r2" in found) == (len(label) > 1)
    assert pixels(ft.Regression().figure(found)).shape == (400, 800, 3)


def test_a_figure_has_the_residuals_and_the_predictions_by_label():
    figure = ft.Regression().figure(ft.Regression().function(LABEL, PREDICTION))
    assert pixels(figure).shape == (400, 800, 3)
    assert all(map(is_drawn, figure.axes))
    assert [axes.get_xlabel() for axes in figure.axes] == ["prediction less label", "label"]


@pytest.mark.parametrize(
    ("label", "prediction", "told"),
    [
        ([[1], [2]], [1, 2], "'label' is of shape (2, 1) and 'y' of (2,): return them in one shape, as by squeeze(-1)"),
        ([1, 2], [1, np.nan], "1 of 2 examples, the first is number 1, have a 'y' that is NaN or infinite: give these"),
        ([], [], "no example has a weight above 0: give data with examples"),
    ],
)
def test_what_can_not_be_judged_is_told_with_the_name_of_the_output(label, prediction, told):
    with pytest.raises(ft.EvaluationError, match=f"^Regression: {re.escape(told)}"):
        ft.Regression(prediction="y").function(np.array(label, float), np.array(prediction, float))
