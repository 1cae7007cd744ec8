"""Figures are of matplotlib without its state, can be read, and keep what is extreme in a curve."""

import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from looked_at import pixels, texts
from sklearn.metrics import auc

import functrain as ft
from functrain.loop.packages.curves import thinned


def test_a_confusion_matrix_draws_its_counts():
    figure = ft.ConfusionMatrix(3).figure(np.array([[5, 1, 0], [0, 17, 0], [0, 0, 0]]))
    assert pixels(figure).shape == (600, 600, 3)
    (axes,) = figure.axes
    assert [*texts(axes)[:3]] == ["5", "1", "17"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "label")


def test_a_confusion_matrix_of_many_classes_has_no_counts_and_a_few_ticks():
    figure = ft.ConfusionMatrix(100).figure(np.eye(100, dtype=int))
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 10
    assert texts(figure.axes[0])[:3] == ["0", "9", "18"]


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ft.EvaluationError, match=r"^figure: .*matplotlib.*; write pip install 'functrain\[record\]'$"):
        ft.ConfusionMatrix(2).figure(np.eye(2))


@pytest.mark.parametrize("package", [ft.Classification, ft.Regression])
def test_without_scikit_learn_a_package_says_so_when_it_is_made(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    told = f"{package.__name__} computes by scikit-learn, which is not installed: write pip install 'functrain[record]'"
    with pytest.raises(ft.EvaluationError, match=f"^{re.escape(told)}$"):
        package()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 5)), min_size=1, max_size=60), st.integers(4, 30))
def test_a_thinned_curve_keeps_its_ends_and_what_is_lowest_and_highest(points, most):
    x, y = np.array(points, float).T
    x = np.cumsum(x)
    kept = thinned(x, y, most)
    assert len(kept) <= most
    assert (np.diff(kept) > 0).all()
    assert (kept[0], kept[-1]) == (0, len(x) - 1)
    assert (y[kept].min(), y[kept].max()) == (y.min(), y.max())
    assert len(x) > most or len(kept) == len(x)


def test_a_curve_of_a_million_points_is_200_and_looks_the_same():
    x = np.linspace(0, 1, 1_000_001)
    y = np.clip(x * 100, 0, 1)  # A hundredth of the points is on the steep piece, which is half of the way.
    kept = thinned(x, y)
    assert len(kept) <= 200
    assert abs(auc(x[kept], y[kept]) - auc(x, y)) < 0.001
    assert np.count_nonzero(y[kept] < 1) > 50
