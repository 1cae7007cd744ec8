"""A search is judged by the rank of the right item, of scores or of embeddings, never of all scores at once."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from looked_at import assert_same, pixels, texts
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

import functrain as ft
from functrain.loop.packages import retrieval

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(50, 20))
ITEM = RNG.integers(0, 20, 50)
WEIGHT = RNG.uniform(0.1, 3, 50)
QUERIES = RNG.normal(size=(60, 4))
ITEMS = QUERIES + RNG.normal(size=(60, 4))


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("scores", [SCORES, SCORES.round(0)])  # With ties, which count against the right item.
def test_ranks_are_those_of_scikit_learn(weight, scores):
    found = ft.Retrieval().function(scores, ITEM, sample_weight=weight)
    expected = label_ranking_average_precision_score(np.eye(20)[ITEM], scores, sample_weight=weight)
    assert found["mrr"] == pytest.approx(expected, rel=1e-12)
    if scores is SCORES:
        top = [top_k_accuracy_score(ITEM, scores, k=k, labels=range(20), sample_weight=weight) for k in (1, 5, 10)]
        assert [*found["recall"].values()] == pytest.approx(top, rel=1e-12)


@pytest.mark.parametrize("at_once", [1, 7 * 60, 2**23])
def test_the_embeddings_of_an_example_are_each_others_right_items(at_once, monkeypatch):
    monkeypatch.setattr(retrieval, "_AT_ONCE", at_once)
    found = ft.Retrieval(embeddings=("text", "image")).function(QUERIES, ITEMS)
    assert_same(found, ft.Retrieval().function(QUERIES @ ITEMS.T, np.arange(60)))
    assert 0 < found["recall"]["1"] < found["recall"]["5"] < found["recall"]["10"] < 1


def test_of_several_examples_with_one_item_each_is_right():
    """Five captions of each of 12 images: the nearest of the right ones counts, and no copy of it is a wrong one."""
    items, which = ITEMS[np.arange(60) // 5], np.arange(60) // 5 * 10**18
    package = ft.Retrieval(embeddings=("caption", "image"), item="number")
    assert package.names == ("caption", "image", "number")
    found = package.function(QUERIES, items, which)
    each = ft.Retrieval().function(QUERIES @ ITEMS[:12].T, np.arange(60) // 5)
    alone = QUERIES @ items.T
    right = which[:, None] == which
    best = np.where(right, alone, -np.inf).max(1)
    ranks = 1 + np.sum((alone >= best[:, None]) & ~right, axis=1)
    assert found["mrr"] == pytest.approx(np.mean(1 / ranks))
    assert found["recall"]["1"] == pytest.approx(each["recall"]["1"]) == np.mean(ranks == 1)


def test_all_scores_are_never_there_at_once():
    embeddings = RNG.normal(size=(8_000, 2)).astype(np.float32)
    tracemalloc.start()
    ft.Retrieval(embeddings=("query", "item")).function(embeddings, embeddings)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8_000**2 * 8 / 3


def test_a_model_that_gives_all_items_one_score_finds_nothing():
    found = ft.Retrieval(ks=(1, 20)).function(np.zeros((50, 20)), ITEM)
    assert (found["recall"], found["mrr"], found["median_rank"]) == (
        {"1": 0.0, "20": 1.0}, pytest.approx(1 / 20), 20.0
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-9, 9), st.integers(1, 3)), min_size=1, max_size=12))
def test_a_whole_weight_is_the_query_that_often(examples):
    item, score, weight = np.array(examples).T
    scores = np.stack([score, 0 * score, score**2], axis=1)
    package = ft.Retrieval(ks=(1, 3))
    weighted = package.function(scores, item, sample_weight=weight.astype(float))
    assert_same(weighted, package.function(np.repeat(scores, weight, axis=0), np.repeat(item, weight)))


def test_in_an_evaluation_short_batches_add_no_items():
    batches = [{"text": QUERIES[i : i + 16], "image": ITEMS[i : i + 16]} for i in range(0, 60, 16)]
    package = ft.Retrieval(embeddings=("text", "image"))
    found = ft.Evaluation(lambda params, batch: batch, batches, metrics={"search": package}).outcome(None)
    assert_same(found.by_metric["search"], package.function(np.float32(QUERIES), np.float32(ITEMS)))


def test_the_curve_has_200_points_at_most_and_a_figure_draws_it():
    found = ft.Retrieval(ks=(1, 5)).function(RNG.normal(size=(30, 900)), np.arange(30))
    ks, recall = found["curve"]
    assert (ks[0], ks[-1], recall[-1]) == (1, 900, 1)
    assert len(ks) <= 200
    assert recall[ks == 5] == found["recall"]["5"]
    figure = ft.Retrieval().figure(found)
    assert pixels(figure).shape == (400, 800, 3)
    assert [text for text in texts(figure.axes[0]) if " at " in text] == [
        f"{found['recall']['1']:.3g} at 1",
        f"{found['recall']['5']:.3g} at 5",
    ]


@pytest.mark.parametrize(
    ("options", "arrays", "told"),
    [
        (
            {},
            (SCORES, np.where(ITEM > 9, 20, ITEM)),
            "have a 'item' outside of 0 to 19, such as 20, and there are 20 items: give them the",
        ),
        (
            {},
            (np.where(SCORES > 2, np.nan, SCORES), ITEM),
            "have 'scores' with NaN: give these examples the weight 0, or",
        ),
        ({}, (SCORES[:, 0], ITEM), "'scores' is of shape (50,): return (batch, items)"),
        ({"ks": (1, 50)}, (SCORES, ITEM), "there are 20 items; give ks of 20 at most"),
        (
            {"embeddings": ("q", "k")},
            (QUERIES, ITEMS[:, :2]),
            "the embeddings are of shapes (60, 4) and (60, 2): return",
        ),
        ({"embeddings": ("q", "k")}, (QUERIES[:, 0], ITEMS), "'q' is of shape (60,): return one row for each example"),
        (
            {"embeddings": ("q", "k"), "item": "n"},
            (QUERIES, ITEMS, QUERIES),
            "'n' is of shape (60, 4): return one whole",
        ),
    ],
)
def test_what_can_not_be_judged_is_told_with_the_name_of_the_output(options, arrays, told):
    with pytest.raises(ft.EvaluationError, match=f"^Retrieval.*: .*{re.escape(told)}"):
        ft.Retrieval(**options).function(*arrays)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ks": 5}, "Retrieval(ks=5): give whole numbers of at least 1, ks=(1, 5, 10)"),
        ({"ks": (0, 5)}, "Retrieval(ks=(0, 5)): give whole numbers of at least 1"),
        (
            {"embeddings": "text"},
            "Retrieval(embeddings='text'): give the outputs with queries and items, embeddings=('",
        ),
        ({"embeddings": (1, 2)}, "Retrieval(embeddings=1): give the name of an output of eval_step"),
        ({"item": 3}, "Retrieval(item=3): give the name of an output of eval_step, Retrieval(item='item')"),
    ],
)
def test_an_option_that_is_none_is_told_when_it_is_made(options, told):
    with pytest.raises(ft.EvaluationError, match=re.escape(told)):
        ft.Retrieval(**options)
