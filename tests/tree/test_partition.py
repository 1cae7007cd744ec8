"""What a `Partition` knows: its parts, its paths, its table."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from partitions import PARAMS, PARTS, arrays
from trees import TREES, cases, quick, says

import functrain as ft

# What a partition knows.


@pytest.mark.parametrize(
    "leaf", [len, "relu", np.float32, jnp.float32, np.dtype("float32"), object()], ids=lambda leaf: type(leaf).__name__
)
def test_a_leaf_that_is_no_array_is_kept_and_has_no_shape(leaf):
    tree = {"leaf": leaf, "w": 1.0}
    parts = ft.partition(tree, {"leaf": "leaf", "rest": ...})
    assert parts.leaves[0] == ("leaf", "leaf", None, None)
    assert "not an array" in parts.table(paths=True)
    assert parts.merge(parts.split(tree)) == tree


def test_the_parts_are_named_in_the_order_of_the_rules():
    assert ft.partition(PARAMS, {"z": "head", "a": "conv/bias", "m": ...}).names == ("z", "a", "m")


def test_the_paths_of_a_part_are_in_the_order_of_the_tree():
    assert ft.partition([0.0] * 12, {"few": ["11", "2", "0"], "rest": ...}).paths("few") == ("0", "2", "11")


def test_every_leaf_is_known_with_its_part_shape_and_dtype_in_the_order_of_the_tree():
    tree = {"b": jnp.ones((2, 3), jnp.bfloat16), "a": 1.0, "c": len}
    leaves = ft.partition(tree, {"b": "b", "rest": ...}).leaves
    assert leaves == (
        ("a", "rest", (), jnp.float32),
        ("b", "b", (2, 3), jnp.bfloat16),
        ("c", "rest", None, None),
    )


def test_the_first_rule_that_matches_takes_the_leaf():
    parts = ft.partition(PARAMS, {"conv": "conv", "bias": "**/bias", "rest": ...})
    assert [parts.paths(part) for part in parts.names] == [
        ("conv/bias", "conv/kernel"),
        ("head/bias",),
        ("head/kernel",),
    ]


def test_the_order_of_the_rules_decides():
    parts = ft.partition(PARAMS, {"bias": "**/bias", "conv": "conv", "rest": ...})
    assert parts.paths("bias") == ("conv/bias", "head/bias")
    assert parts.paths("conv") == ("conv/kernel",)


def test_the_ellipsis_takes_all_that_is_left():
    assert ft.partition(PARAMS, {"conv": "conv", "rest": ...}).paths("rest") == ("head/bias", "head/kernel")


def test_rules_that_take_everything_need_no_ellipsis():
    assert ft.partition(PARAMS, {"conv": "conv", "head": "head"}).paths("head") == ("head/bias", "head/kernel")


def test_block_1_does_not_take_block_10():
    params = {f"block_{i}": {"w": float(i)} for i in (1, 2, 10)}
    assert ft.partition(params, {"first": "block_1", "rest": ...}).paths("first") == ("block_1/w",)


def test_a_selector_may_look_at_the_leaf():
    parts = ft.partition(arrays(), {"matrices": lambda path, leaf: leaf.ndim == 2, "rest": ...})
    assert parts.paths("matrices") == ("conv/kernel", "head/kernel")


def test_non_float_leaves_have_a_part_of_their_own():
    parts = ft.partition(TREES["Equinox"](), {"static": ft.non_float, "rest": ...})
    assert parts.paths("static") == ("mlp/activation", "mlp/final_activation")


def test_a_bare_array_is_a_tree_of_one_leaf():
    parts = ft.partition(jnp.ones(2), {"all": ...})
    assert parts.split(5.0) == {"all": {"": 5.0}}
    assert parts.merge({"all": {"": 6.0}}) == 6.0


def test_unknown_part_of_paths_is_an_error_that_names_the_parts():
    with pytest.raises(
        ft.PartitionError, match=says("paths: unknown part 'cov'; the parts are 'conv', 'bias', 'rest'")
    ):
        PARTS.paths("cov")


# overlap="error".


def test_overlap_error_accepts_disjoint_rules_and_the_ellipsis():
    rules = {"conv": "conv", "head": "head/bias", "rest": ...}
    assert ft.partition(PARAMS, rules, overlap="error") == ft.partition(PARAMS, rules)


def test_overlap_error_refuses_a_leaf_that_two_rules_match():
    with pytest.raises(
        ft.PartitionError,
        match=says(
            "rule 'bias' also matches 'conv/bias' of 'conv'", "make the two selectors disjoint", "overlap='first'"
        ),
    ):
        ft.partition(PARAMS, {"conv": "conv", "bias": "**/bias", "rest": ...}, overlap="error")


@pytest.mark.parametrize("overlap", ["last", None, True])
def test_an_unknown_overlap_is_an_error(overlap):
    with pytest.raises(ft.PartitionError, match=says(f"overlap={overlap!r}: write 'first' or 'error'")):
        ft.partition(PARAMS, {"rest": ...}, overlap=overlap)


# A partition is a value.


def test_a_partition_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PARTS.names = ("other",)


def test_partitions_are_equal_if_they_were_made_alike():
    rules = {"conv": "conv", "rest": ...}
    one, other = ft.partition(arrays(), rules), ft.partition(arrays(), rules)
    assert one == other
    assert hash(one) == hash(other)


def test_partitions_of_other_shapes_parts_or_structures_differ():
    rules = {"a": "a", "rest": ...}
    given = ft.partition({"a": jnp.ones(2), "b": [1.0]}, rules)
    assert given != ft.partition({"a": jnp.ones(3), "b": [1.0]}, rules)
    assert given != ft.partition({"a": jnp.ones(2), "b": (1.0,)}, rules)
    assert given != ft.partition({"a": jnp.ones(2), "b": [1.0]}, {"b": "b", "rest": ...})
    assert given != ft.partition({"a": jnp.ones(2), "b": [1.0]}, {"rest": "b", "a": ...})


@pytest.mark.parametrize("name", TREES)
def test_a_partition_of_any_tree_is_hashable(name):
    parts = [ft.partition(TREES[name](), {"all": ...}) for _ in range(2)]
    assert len(set(parts)) == 1


def test_as_a_static_argument_an_equal_partition_compiles_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def scaled(parts, tree):
        traces.append(parts)
        return parts.merge(jax.tree.map(lambda x: 2 * x, parts.split(tree)))

    for rules in ({"conv": "conv", "rest": ...}, {"conv": "conv", "rest": ...}, {"head": "head", "rest": ...}):
        doubled = scaled(ft.partition(arrays(), rules), arrays())
        assert jax.tree.all(jax.tree.map(lambda x, y: (x == 2 * y).all(), doubled, arrays()))
    assert len(traces) == 2


# The table.


def test_the_table_counts_leaves_parameters_and_bytes():
    tree = {"a": jnp.ones((2, 3)), "b": {"w": jnp.ones(4, jnp.bfloat16), "f": len}, "c": np.zeros((1200, 1000))}
    parts = ft.partition(tree, {"first": "a", "half": ["b/w", "b/f"], "rest": ...})
    assert parts.table().splitlines() == [
        "part   leaves  parameters    bytes  selector",
        "first       1           6     24 B  'a'",
        "half        2           4      8 B  ['b/w', 'b/f']",
        "rest        1   1,200,000  9.2 MiB  ...",
        "total       4   1,200,010  9.2 MiB",
    ]


def test_the_table_shows_the_paths_on_request():
    tree = {"a": jnp.ones((2, 3)), "b": {"w": jnp.ones(4, jnp.bfloat16), "f": len}, "key": jax.random.key(0), "x": 1.0}
    parts = ft.partition(tree, {"regex": re.compile("a"), "b": "b", "others": ...})
    assert parts.table(paths=True).splitlines() == [
        "part    leaves  parameters  bytes  selector",
        "regex        1           6   24 B  re.compile('a')",
        "  a                      6   24 B  float32[2, 3]",
        "b            2           4    8 B  'b'",
        "  b/f                    0    0 B  not an array",
        "  b/w                    4    8 B  bfloat16[4]",
        "others       2           2   12 B  ...",
        "  key                    1    8 B  key<fry>[]",
        "  x                      1    4 B  float32[]",
        "total        5          12   44 B",
    ]


def test_the_table_names_a_function_that_selects():
    assert "non_float" in ft.partition({"a": 1, "b": 1.0}, {"static": ft.non_float, "rest": ...}).table()


def test_printing_a_partition_shows_the_table():
    assert str(PARTS) == PARTS.table()


def test_the_repr_is_one_line():
    assert repr(PARTS) == "Partition(conv: 2 leaves, bias: 1 leaf, rest: 1 leaf)"


# Laws.


@quick
@given(cases())
def test_every_leaf_is_in_the_part_of_the_first_rule_that_takes_it(case):
    parts = ft.partition(case.tree, case.rules)
    assert parts.names == tuple(case.rules)
    assert {path: part for part in parts.names for path in parts.paths(part)} == case.owner


@quick
@given(cases())
def test_the_parts_are_disjoint_and_total(case):
    parts = ft.partition(case.tree, case.rules)
    everything = [path for part in parts.names for path in parts.paths(part)]
    assert sorted(everything) == sorted(ft.flatten(case.tree))
    assert all(parts.paths(part) for part in parts.names)
