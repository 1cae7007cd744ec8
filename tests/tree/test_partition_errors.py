"""What `partition`, `split` and `merge` refuse, and what they say."""

import ast
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from partitions import PARAMS, PARTS, arrays
from trees import Model, any_trees, quick, says

import functrain as ft

# One array at two paths is for the optimizer to warn of, which knows what is trained.


def test_the_paths_of_one_array_are_known():
    one, two = jnp.ones(2), np.ones(2)
    parts = ft.partition({"a": one, "b": {"w": one, "v": two}, "c": [two, one]}, {"rest": ...})
    assert parts.shared == (("a", "b/w", "c/1"), ("b/v", "c/0"))
    assert parts == ft.partition({"a": one, "b": {"w": jnp.ones(2), "v": two}, "c": [two, one]}, {"rest": ...})


def test_equal_arrays_and_one_shape_number_or_function_at_two_paths_are_no_one_array():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    arrays = {"g": jnp.ones(2), "h": jnp.ones(2), "i": np.ones(2), "j": np.ones(2)}
    tree = {"a": shape, "b": shape, "c": len, "d": len, "e": 1.0, "f": 1.0, **arrays}
    assert not ft.partition(tree, {"rest": ...}).shared


def test_one_tracer_at_two_paths_is_no_one_array():
    found = []
    jax.make_jaxpr(lambda x: found.append(ft.partition({"a": x, "b": x}, {"rest": ...}).shared) or x)(1.0)
    assert found == [()]


# Rules that do not fit.


def fails(tree, rules, **options):
    with pytest.raises(ft.PartitionError) as failure:
        ft.partition(tree, rules, **options)
    return str(failure.value)


LAYERS = {"encoder": {"layer_0": {"w": 1.0, "b": 2.0}, "layer_1": {"w": 3.0, "b": 4.0}}, "head": {"w": 5.0}}


def test_a_misspelt_rule_names_the_nearest_path_and_its_leaves():
    message = fails(LAYERS, {"encoder": "encodr", "rest": ...})
    assert message == "rule 'encoder': no leaf matches 'encodr'; did you mean 'encoder' (4 leaves)?"


def test_a_misspelt_rule_names_the_nearest_of_the_deeper_paths():
    message = fails(LAYERS, {"first": "encoder/layr_0", "rest": ...})
    assert message.startswith(
        "rule 'first': no leaf matches 'encoder/layr_0'; did you mean 'encoder/layer_0' (2 leaves)"
    )


def test_the_right_name_from_the_wrong_root_proposes_two_stars():
    message = fails(LAYERS, {"first": "layer_0", "rest": ...})
    assert message == "rule 'first': no leaf matches 'layer_0'; did you mean '**/layer_0' (2 leaves)?"


def test_a_misspelt_name_behind_two_stars_proposes_the_nearest_name():
    message = fails({"conv": {"bias": 1.0, "kernel": 2.0}, "head": {"bias": 3.0}}, {"bias": "**/bais", "rest": ...})
    assert "no leaf matches '**/bais'; did you mean '**/bias' (2 leaves)" in message


def test_a_rule_near_to_nothing_lists_the_top_of_the_tree():
    message = fails(LAYERS, {"x": "quux", "rest": ...})
    assert message == "rule 'x': no leaf matches 'quux'; the tree has 'encoder', 'head'"


def test_the_top_of_a_wide_tree_is_cut_after_ten():
    message = fails({f"layer{i:02}": 1.0 for i in range(13)}, {"x": "quux", "rest": ...})
    assert message.endswith("'layer09' and 3 more")


def test_a_name_with_a_bracket_is_proposed_as_the_selector_that_takes_it():
    message = fails({"a[0]": {"w": 1.0}, "b": 2.0}, {"x": "a[0]", "rest": ...})
    assert message.startswith("rule 'x': no leaf matches 'a[0]'; did you mean 'a[[]0]' (1 leaf)")


def test_a_regex_that_only_finds_proposes_one_that_matches_from_end_to_end():
    message = fails(LAYERS, {"first": re.compile("layer_0"), "rest": ...})
    assert message.startswith("rule 'first': no leaf matches re.compile('layer_0') from end to end")
    assert "'encoder/layer_0/b' contains it" in message
    assert "did you mean re.compile(" in message


@pytest.mark.parametrize("pattern", ["layer_0", "layer_0|layer_1", r"_\d"])
def test_the_proposed_regex_takes_every_leaf_in_which_the_given_one_is_found(pattern):
    message = fails(LAYERS, {"first": re.compile(pattern), "rest": ...})
    proposed = ast.literal_eval(re.search(r"did you mean re\.compile\((.*)\)\?$", message)[1])
    parts = ft.partition(LAYERS, {"first": re.compile(proposed), "rest": ...})
    assert parts.paths("first") == tuple(path for path in ft.flatten(LAYERS) if re.search(pattern, path))


def test_a_regex_that_is_not_even_found_lists_the_paths():
    message = fails(PARAMS, {"x": re.compile("HEAD"), "rest": ...})
    assert message.startswith("rule 'x': no leaf matches re.compile('HEAD'); the tree has 'conv/bias', 'conv/kernel'")


def test_a_function_that_takes_nothing_is_named():
    message = fails(PARAMS, {"static": ft.non_float, "rest": ...})
    assert message.startswith("rule 'static': no leaf matches non_float; the tree has 'conv/bias'")


@pytest.mark.parametrize("selector", [["conv", "heed"], ["conv", ["head/bias", ("heed",)]], ("heed", "conv")], ids=str)
def test_one_bad_member_of_a_sequence_is_an_error_that_names_it(selector):
    assert fails(PARAMS, {"x": selector, "rest": ...}) == (
        "rule 'x': no leaf matches 'heed'; did you mean 'head' (2 leaves)?"
    )


@pytest.mark.parametrize("selector", [[], (), ["conv", []]], ids=str)
def test_an_empty_sequence_is_an_error(selector):
    message = fails(PARAMS, {"x": selector, "rest": ...})
    assert message == "rule 'x': an empty sequence takes no leaf: name at least one path in it"


@pytest.mark.parametrize("selector", [None, 3, ["conv", 3]], ids=str)
def test_a_rule_that_is_no_selector_is_an_error(selector):
    assert "is no selector: write a path like 'encoder/layers'" in fails(PARAMS, {"x": selector, "rest": ...})


def test_a_shadowed_rule_names_the_earlier_one():
    assert fails(PARAMS, {"all": "*", "conv": "conv"}) == (
        "rule 'conv' takes no leaf: 2 leaves that 'conv' matches went to the earlier rule 'all'; put 'conv' before it"
    )


def test_a_rule_behind_the_ellipsis_is_shadowed():
    message = fails(PARAMS, {"rest": ..., "bias": "head/bias"})
    assert "1 leaf that 'head/bias' matches went to the earlier rule 'rest'; put 'bias' before it" in message


def test_a_rule_that_several_shadow_names_them_all():
    assert "'conv', 'head'" in fails(PARAMS, {"conv": "conv", "head": "head", "bias": "**/bias"})


def test_an_ellipsis_with_nothing_left_is_an_error():
    assert fails(PARAMS, {"conv": "conv", "head": "head", "rest": ...}) == (
        "rule 'rest': ... takes no leaf, as earlier rules took all; remove it"
    )


def test_a_leaf_that_no_rule_takes_is_an_error():
    assert fails(PARAMS, {"conv": "conv", "bias": "head/bias"}) == (
        "no rule takes 'head/kernel': add a rule for it, or \"rest\": ... for all that is left"
    )


def test_at_most_ten_leaves_that_no_rule_takes_are_listed_and_the_others_counted():
    message = fails([0.0] * 13, {"first": "0"})
    listed = ", ".join(repr(str(i)) for i in range(1, 11))
    assert message.startswith(f"no rule takes {listed} and 2 more: add a rule for them, or")


def test_no_rules_at_all_take_nothing():
    assert fails({"a": 1.0}, {}).startswith("no rule takes 'a'")


def test_two_leaves_with_one_path_are_an_error():
    assert "two leaves have the path 'a/b'" in fails({"a/b": 1.0, "a": {"b": 2.0}}, {"rest": ...})


@pytest.mark.parametrize("tree", [{}, None, {"a": None, "b": [()]}], ids=str)
def test_a_tree_without_leaves_is_an_error(tree):
    assert fails(tree, {"rest": ...}) == "the tree has no leaves: give partition() the parameters"


# Trees that do not fit.


def split_fails(tree, parts=PARTS):
    with pytest.raises(ft.PartitionError) as failure:
        parts.split(tree)
    message = str(failure.value)
    assert message.startswith("the tree to split is not of the structure that was partitioned: it ")
    assert message.endswith("; give a tree like the one that partition() was given, or make a partition of this one")
    return message.removeprefix("the tree to split is not of the structure that was partitioned: it ").rsplit("; give")[
        0
    ]


def test_split_names_the_missing_leaves():
    assert split_fails({"conv": PARAMS["conv"]}) == "lacks 'head/bias', 'head/kernel'"


def test_split_names_the_extra_leaves():
    assert split_fails(PARAMS | {"tail": 1.0}) == "has 'tail', which is not expected"


def test_split_names_missing_and_extra_leaves_together():
    tree = {"conv": PARAMS["conv"], "head": {"kernel": 1.0, "scale": 1.0}}
    assert split_fails(tree) == "lacks 'head/bias' and has 'head/scale', which is not expected"


def test_split_of_a_tree_with_none_for_a_leaf_names_the_leaf():
    assert split_fails(PARAMS | {"head": {"kernel": None, "bias": 1.0}}) == "lacks 'head/kernel'"


def test_split_of_a_flat_tree_shows_the_node_types():
    message = split_fails(ft.flatten(PARAMS))
    assert message.startswith("has the same paths, but its node types or static fields differ: ")
    assert "'conv/bias': *" in message
    assert "'conv': {'bias': *" in message


@pytest.mark.parametrize(
    ("given", "expected", "shown"),
    [
        ({"a": (1.0, 2.0)}, {"a": [1.0, 2.0]}, ("(*, *)", "[*, *]")),
        ({"a": 1.0, "b": ()}, {"a": 1.0, "b": None}, ("'b': ()", "'b': None")),
        ({"0": 1.0}, {0: 1.0}, ("{'0': *}", "{0: *}")),
        (Model(1.0, 2.0, "tanh"), Model(1.0, 2.0, "relu"), ("tanh", "relu")),
    ],
    ids=["list or tuple", "None or empty", "type of key", "static field"],
)
def test_split_shows_where_only_node_types_or_static_fields_differ(given, expected, shown):
    message = split_fails(given, ft.partition(expected, {"all": ...}))
    assert message.startswith("has the same paths, but its node types or static fields differ: ")
    assert re.search(says(shown[0], " where ", shown[1], " was"), message)


def test_split_shows_where_a_static_field_of_an_equinox_module_differs():
    def linear(width):
        return eqx.nn.Linear(2, width, key=jax.random.key(0))

    message = split_fails(linear(4), ft.partition(linear(3), {"all": ...}))
    assert re.search(says("node types or static fields differ", ", 2, 4, True)", "where", ", 2, 3, True)"), message)


def test_split_tells_an_nnx_state_of_another_variable_type():
    state = nnx.State({"a": nnx.Param(jnp.ones(2))})
    parts = ft.partition(state, {"all": ...})
    message = split_fails(nnx.State({"a": nnx.BatchStat(jnp.ones(2))}), parts)
    assert re.search(says("node types or static fields differ", "BatchStat", "where", "Param"), message)


def test_split_does_not_look_at_shapes():
    parts = ft.partition(arrays(), {"conv": "conv", "rest": ...})
    assert parts.split(jax.tree.map(lambda _: "any", arrays()))["conv"] == {"conv/bias": "any", "conv/kernel": "any"}


# Parts that do not fit.


def test_merge_names_an_unknown_part():
    with pytest.raises(
        ft.PartitionError, match=says("merge: unknown part 'cov'; the parts are 'conv', 'bias', 'rest'")
    ):
        PARTS.merge({"cov": {}}, into=PARAMS)


def test_merge_names_the_missing_parts_and_the_way_out():
    split = PARTS.split(PARAMS)
    with pytest.raises(
        ft.PartitionError,
        match=says("merge lacks the parts 'conv', 'rest': give them, or write merge(split, into=tree)"),
    ):
        PARTS.merge({"bias": split["bias"]})


def test_merge_names_the_missing_leaves_of_a_part():
    with pytest.raises(ft.PartitionError, match=r"^part 'conv' lacks 'conv/kernel'$"):
        PARTS.merge({"conv": {"conv/bias": 1.0}}, into=PARAMS)


def test_merge_names_the_extra_leaves_of_a_part():
    split = PARTS.split(PARAMS)
    split["bias"]["head/kernel"] = 1.0
    with pytest.raises(ft.PartitionError, match=r"^part 'bias' has 'head/kernel', which is not expected$"):
        PARTS.merge(split)


def test_merge_refuses_a_part_that_is_no_dict():
    with pytest.raises(ft.PartitionError, match=says("part 'bias' must be a dict of path to leaf", "list")):
        PARTS.merge({"bias": [1.0]}, into=PARAMS)


def test_merge_refuses_to_merge_into_a_tree_of_another_structure():
    with pytest.raises(
        ft.PartitionError, match=says("the tree to merge into is not of the structure", "lacks 'head/bias'")
    ):
        PARTS.merge({"bias": {"head/bias": 1.0}}, into={"conv": PARAMS["conv"], "head": {"kernel": 1.0}})


def test_labels_name_the_parts_without_a_value():
    with pytest.raises(ft.PartitionError, match=r"^labels needs a value for every part: add 'bias', 'rest'$"):
        PARTS.labels({"conv": 1.0})


def test_labels_name_an_unknown_part():
    with pytest.raises(
        ft.PartitionError, match=says("labels: unknown part 'tail'; the parts are 'conv', 'bias', 'rest'")
    ):
        PARTS.labels({"conv": 1, "bias": 1, "rest": 1, "tail": 1})


@quick
@given(any_trees)
def test_a_tree_is_partitioned_if_and_only_if_it_has_a_leaf(tree):
    if jax.tree.leaves(tree):
        assert ft.partition(tree, {"all": ...}).paths("all") == tuple(ft.flatten(tree))
    else:
        assert "the tree has no leaves" in fails(tree, {"all": ...})
