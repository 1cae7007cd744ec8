"""A language model is judged by the loss of all tokens, however they are spread over examples."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from looked_at import assert_same, pixels
from sklearn.metrics import log_loss

import functrain as ft

RNG = np.random.default_rng(0)
NLL = RNG.uniform(1, 50, 40)
TOKENS = RNG.integers(1, 30, 40)


def test_the_loss_is_that_of_all_tokens_at_once():
    """Of 3 sequences of 5 tokens, the last of 2: scikit-learn's log loss of the 12 tokens."""
    probabilities = RNG.dirichlet(np.ones(7), size=(3, 5))
    token, is_there = RNG.integers(0, 7, (3, 5)), np.arange(5) < np.array([5, 5, 2])[:, None]
    nll = np.sum(is_there * -np.log(np.take_along_axis(probabilities, token[..., None], -1)[..., 0]), axis=1)
    found = ft.Language().function(nll, is_there.sum(1))
    expected = log_loss(token[is_there], probabilities[is_there], labels=range(7))
    assert found["loss"] == pytest.approx(expected, rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-9)
    assert found["tokens"] == 12


def test_bits_per_byte_need_bytes():
    package = ft.Language(bytes="length")
    assert package.names == ("nll", "tokens", "length")
    found = package.function(NLL, TOKENS, 4 * TOKENS)
    assert found["bits_per_byte"] == pytest.approx(NLL.sum() / np.log(2) / (4 * TOKENS.sum()), rel=1e-12)
    without = ft.Language().function(NLL, TOKENS)
    assert "bits_per_byte" not in without
    title = ft.Language().figure(without).axes[0].get_title()
    assert title.endswith("bits per byte need Language(bytes=)")


def test_in_an_evaluation_its_bytes_are_asked_for_by_name():
    batch = {"nll": NLL, "tokens": TOKENS}
    evaluation = ft.Evaluation(
        lambda params, batch: batch, [batch], metrics={"text": ft.Language(bytes="length")}
    )  # fmt: skip
    with pytest.raises(ft.EvaluationError, match="metrics= takes 'length', but eval_step returned 'nll', 'tokens'"):
        evaluation(None)
    results = ft.Evaluation(lambda params, batch: batch, [batch], metrics={"text": ft.Language()})(None)
    assert results["text/loss"] == pytest.approx(NLL.sum() / TOKENS.sum(), rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 99), st.integers(1, 50), st.integers(1, 3)), min_size=1, max_size=12))
def test_a_whole_weight_is_the_example_that_often(examples):
    nll, tokens, weight = np.array(examples).T
    package, often = ft.Language(bytes="bytes"), weight.astype(int)
    expected = package.function(*(np.repeat(each, often) for each in (nll, tokens, 3 * tokens)))
    assert_same(package.function(nll, tokens, 3 * tokens, sample_weight=weight), expected)


@pytest.mark.filterwarnings("error")
def test_a_loss_without_bounds_has_an_infinite_perplexity_and_one_of_no_tokens_is_in_no_histogram():
    found = ft.Language().function(np.array([1e6, 0.0]), np.array([1, 0]))
    assert (found["loss"], found["perplexity"]) == (1e6, math.inf)
    assert found["histogram"]["counts"].sum() == 1
    assert pixels(ft.Language().figure(found)).shape == (400, 800, 3)


@pytest.mark.parametrize(
    ("nll", "tokens", "told"),
    [
        (
            [-5, 3],
            [2, 2],
            "1 of 2 examples, the first is number 0, have a 'nll' below 0: return the log-likelihood's neg",
        ),
        ([np.nan, 3], [2, 2], "have a 'nll' that is NaN or infinite: give these examples the weight 0, or mend what"),
        ([1, 3], [2, -2], "1 of 2 examples, the first is number 1, have a 'tokens' below 0"),
        ([1, 3], [0, 0], "'tokens' is 0 for every example: return how many each example has"),
        ([[1, 3]], [2], "'nll' is of shape (1, 2): return one number for each example"),
    ],
)
def test_what_can_not_be_judged_is_told_with_the_name_of_the_output(nll, tokens, told):
    with pytest.raises(ft.EvaluationError, match=f"^Language: .*{re.escape(told)}"):
        ft.Language().function(np.array(nll, float), np.array(tokens))


def test_the_name_of_an_output_is_told_when_it_is_made():
    told = "Language(bytes=4): give the name of an output of eval_step, Language(bytes='bytes')"
    with pytest.raises(ft.EvaluationError, match=re.escape(told)):
        ft.Language(bytes=4)
