"""`take`."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from partitions import PARAMS
from trees import cases, quick, rules_for, says, trees

import functrain as ft
from functrain.tree.selectors import matcher


def test_take_returns_what_it_took_and_what_is_left_both_flat():
    taken, rest = ft.take(PARAMS, "conv")
    assert taken == {"conv/bias": 2.0, "conv/kernel": 1.0}
    assert rest == {"head/bias": 4.0, "head/kernel": 3.0}


def test_take_goes_on_from_the_rest_as_burn_does():
    grads = {
        "conv1": {"kernel": 1.0, "bias": 2.0},
        "conv2": {"kernel": 3.0, "bias": 4.0},
        "linear1": {"kernel": 5.0, "bias": 6.0},
        "linear2": {"kernel": 7.0, "bias": 8.0},
    }
    conv1, rest = ft.take(grads, "conv1")
    bias, rest = ft.take(rest, "linear1/bias")
    assert conv1 == {"conv1/bias": 2.0, "conv1/kernel": 1.0}
    assert bias == {"linear1/bias": 6.0}
    assert rest == {
        "conv2/bias": 4.0,
        "conv2/kernel": 3.0,
        "linear1/kernel": 5.0,
        "linear2/bias": 8.0,
        "linear2/kernel": 7.0,
    }
    assert ft.take(rest, ...) == (rest, {})


def test_take_leaves_the_tree_as_it_was():
    tree = {"conv": {"kernel": 1.0}, "head": 2.0}
    ft.take(tree, "conv")
    assert tree == {"conv": {"kernel": 1.0}, "head": 2.0}


@pytest.mark.parametrize("selector", ["conv", re.compile("conv/.*"), ["conv"], lambda path, leaf: "conv" in path])
def test_to_take_twice_is_an_error_that_says_an_earlier_take_may_have_it(selector):
    _, rest = ft.take(PARAMS, selector)
    with pytest.raises(
        ft.PartitionError, match=says("take: no leaf matches", "(or an earlier take has it: what one takes")
    ):
        ft.take(rest, selector)


def test_to_take_twice_by_part_of_a_sequence_is_an_error():
    _, rest = ft.take(PARAMS, "conv")
    with pytest.raises(ft.PartitionError, match=says("take: no leaf matches 'conv'", "or an earlier take has it")):
        ft.take(rest, ["conv", "head"])


def test_to_take_from_nothing_is_an_error():
    _, rest = ft.take(PARAMS, ...)
    with pytest.raises(
        ft.PartitionError, match=says("take: there is no leaf left to take", "or an earlier take has it")
    ):
        ft.take(rest, ...)


def test_to_take_by_a_misspelt_name_names_the_nearest():
    with pytest.raises(ft.PartitionError, match=says("take: no leaf matches 'cov'; did you mean 'conv' (2 leaves)")):
        ft.take(PARAMS, "cov")


def test_what_is_no_selector_can_not_be_taken():
    with pytest.raises(ft.PartitionError, match="is no selector"):
        ft.take(PARAMS, None)


# Laws.


@quick
@given(st.data())
def test_take_gives_the_leaf_to_one_side_or_the_other(data):
    tree = data.draw(trees)
    rule = data.draw(rules_for(tree))
    flat = ft.flatten(tree)
    taken, rest = ft.take(tree, rule.selector)
    assert taken == {path: flat[path] for path in flat if path in rule.takes}
    assert rest == {path: flat[path] for path in flat if path not in rule.takes}


@quick
@given(st.data())
def test_to_take_twice_is_always_an_error(data):
    tree = data.draw(trees)
    selector = data.draw(rules_for(tree)).selector
    _, rest = ft.take(tree, selector)
    with pytest.raises(ft.PartitionError, match="or an earlier take has it"):
        ft.take(rest, selector)


@quick
@given(cases())
def test_takes_in_the_order_of_the_rules_are_the_split(case):
    rest, split = ft.flatten(case.tree), {}
    for part, selector in case.rules.items():
        split[part], rest = ft.take(rest, matcher(selector))
    assert split == ft.partition(case.tree, case.rules).split(case.tree)
    assert rest == {}
