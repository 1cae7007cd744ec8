"""`partition`, what a `Partition` does, and `take`."""

import ast
import dataclasses
import functools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trees import TREES, Model, Pair, any_trees, cases, identical, nnx_params, quick, rules_for, says, trees

import functrain as ft
from functrain.tree.selectors import matcher

PARAMS = {"conv": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}
PARTS = ft.partition(PARAMS, {"conv": "conv", "bias": "**/bias", "rest": ...})


def arrays():
    return {
        "conv": {"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)},
        "head": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.zeros(2)},
    }


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


# split and merge.


def test_split_gives_plain_dicts_of_every_part_by_path():
    assert PARTS.split(PARAMS) == {
        "conv": {"conv/bias": 2.0, "conv/kernel": 1.0},
        "bias": {"head/bias": 4.0},
        "rest": {"head/kernel": 3.0},
    }


def test_split_keeps_the_order_of_the_rules_and_of_the_tree():
    split = ft.partition([0.0] * 12, {"odd": lambda path, leaf: int(path) % 2, "even": ...}).split(list(range(12)))
    assert list(split) == ["odd", "even"]
    assert list(split["odd"].values()) == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("name", TREES)
def test_merge_is_the_inverse_of_split(name):
    tree = TREES[name]()
    first = next(iter(ft.flatten(tree)))
    rules = {"first": first, "rest": ...} if len(ft.flatten(tree)) > 1 else {"all": ...}
    parts = ft.partition(tree, rules)
    merged = parts.merge(parts.split(tree))
    assert type(merged) is type(tree)
    assert identical(merged, tree)


def test_merge_keeps_none_and_empty_containers():
    tree = {"a": 1.0, "none": None, "dict": {}, "list": [None, ()], "pair": Pair(None, [2.0])}
    parts = ft.partition(tree, {"a": "a", "rest": ...})
    assert parts.merge(parts.split(tree)) == tree


def test_merge_goes_by_path_and_not_by_order():
    split = PARTS.split(PARAMS)
    shuffled = {part: dict(reversed(split[part].items())) for part in reversed(split)}
    assert PARTS.merge(shuffled) == PARAMS


def test_a_merged_equinox_model_runs():
    model = TREES["Equinox"]()
    parts = ft.partition(model, {"static": ft.non_float, "rest": ...})
    x = jnp.ones(2)
    assert (parts.merge(parts.split(model)).mlp(x) == model.mlp(x)).all()


def test_a_merged_nnx_module_runs():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    parts = ft.partition(model, {"bias": "bias", "rest": ...})
    x = jnp.ones(2)
    assert (parts.merge(parts.split(model))(x) == model(x)).all()


def test_merge_into_takes_absent_parts_from_a_whole_tree():
    merged = PARTS.merge({"bias": {"head/bias": 9.0}}, into=PARAMS)
    assert merged == {"conv": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 9.0}}


def test_merge_into_leaves_the_whole_tree_as_it_was():
    into = {"conv": dict(PARAMS["conv"]), "head": dict(PARAMS["head"])}
    PARTS.merge({"bias": {"head/bias": 9.0}}, into=into)
    assert into == PARAMS


def test_merge_of_nothing_into_a_tree_is_the_tree():
    assert PARTS.merge({}, into=PARAMS) == PARAMS


def test_merge_of_every_part_uses_nothing_of_into():
    assert PARTS.merge(PARTS.split(PARAMS), into=jax.tree.map(lambda _: -1.0, PARAMS)) == PARAMS


def test_split_and_merge_leave_no_operation_behind():
    parts = ft.partition(arrays(), {"conv": "conv", "rest": ...})
    jaxpr = jax.make_jaxpr(lambda tree: parts.merge(parts.split(tree), into=tree))(arrays())
    assert jaxpr.eqns == []
    assert jaxpr.jaxpr.outvars == jaxpr.jaxpr.invars


def test_split_and_merge_of_an_nnx_state_leave_no_operation_behind():
    parts = ft.partition(nnx_params(), {"conv": "conv", "rest": ...})
    assert jax.make_jaxpr(lambda state: parts.merge(parts.split(state)))(nnx_params()).eqns == []


def test_a_partition_made_of_shapes_splits_arrays():
    shapes = jax.eval_shape(arrays)
    rules = {"conv": "conv", "rest": ...}
    parts = ft.partition(shapes, rules)
    assert parts == ft.partition(arrays(), rules)
    tree = arrays()
    assert parts.split(tree)["conv"]["conv/kernel"] is tree["conv"]["kernel"]
    assert identical(parts.merge(parts.split(tree)), tree)


def test_a_partition_made_of_shapes_splits_arrays_under_jit():
    parts = ft.partition(jax.eval_shape(arrays), {"conv": "conv", "rest": ...})
    split = jax.jit(parts.split)(arrays())
    assert {path: leaf.shape for path, leaf in split["conv"].items()} == {"conv/bias": (3,), "conv/kernel": (3, 3)}


def test_a_partition_of_an_abstract_nnx_state_splits_a_real_one():
    def make():
        return nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))

    parts = ft.partition(jax.eval_shape(make), {"bias": "bias", "rest": ...})
    state = make()
    assert parts.split(state)["bias"]["bias"].shape == (3,)
    assert identical(parts.merge(parts.split(state)), state)


def test_a_partition_may_be_made_under_jit():
    @jax.jit
    def biases(tree):
        parts = ft.partition(tree, {"bias": "**/bias", "rest": ...})
        return parts.split(tree)["bias"]

    assert {path: leaf.shape for path, leaf in biases(arrays()).items()} == {"conv/bias": (3,), "head/bias": (2,)}


def test_a_mask_splits():
    assert PARTS.split(jax.tree.map(lambda x: x > 2, PARAMS))["bias"] == {"head/bias": True}


def test_shardings_split():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    assert PARTS.split(jax.tree.map(lambda _: sharding, PARAMS))["bias"] == {"head/bias": sharding}


def test_partition_specs_split():
    assert PARTS.split(jax.tree.map(lambda _: P("data", None), PARAMS))["bias"] == {"head/bias": P("data", None)}


def test_per_example_gradients_split():
    def loss(params, x):
        return jnp.sum((x @ params["conv"]["kernel"] + params["conv"]["bias"]) @ params["head"]["kernel"])

    params = arrays()
    parts = ft.partition(params, {"conv": "conv", "rest": ...})
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, jnp.ones((5, 3)))
    assert parts.split(grads)["conv"]["conv/kernel"].shape == (5, 3, 3)


# labels.


def test_labels_hold_the_name_of_the_part_at_each_leaf():
    assert PARTS.labels() == {"conv": {"kernel": "conv", "bias": "conv"}, "head": {"kernel": "rest", "bias": "bias"}}


def test_labels_hold_the_value_of_the_part_at_each_leaf():
    assert PARTS.labels({"conv": 0.1, "rest": P(), "bias": "x"}) == {
        "conv": {"kernel": 0.1, "bias": 0.1},
        "head": {"kernel": P(), "bias": "x"},
    }


def test_labels_are_of_the_type_of_the_tree():
    tree = Model(encoder=Pair(1.0, None), head=[2.0, {}])
    assert ft.partition(tree, {"head": "head", "rest": ...}).labels() == Model(Pair("rest", None), ["head", {}])


def test_labels_split_like_any_tree():
    assert PARTS.split(PARTS.labels())["conv"] == {"conv/bias": "conv", "conv/kernel": "conv"}


def test_labels_of_shardings_lay_a_tree_out():
    params = {"wide": jnp.ones((16, 2)), "rest": {"w": jnp.ones(3)}}
    mesh = jax.make_mesh((8,), ("model",))
    parts = ft.partition(params, {"wide": "wide", "rest": ...})
    shardings = parts.labels({"wide": NamedSharding(mesh, P("model")), "rest": NamedSharding(mesh, P())})
    placed = jax.device_put(params, shardings)
    assert placed["wide"].addressable_shards[0].data.shape == (2, 2)
    assert placed["rest"]["w"].is_fully_replicated
    assert not placed["wide"].is_fully_replicated


@pytest.mark.parametrize("make", [arrays, nnx_params], ids=["dict", "nnx.State"])
def test_labels_drive_optax_multi_transform(make):
    params = make()
    parts = ft.partition(params, {"conv": "conv", "bias": "**/bias", "rest": ...})
    transforms = {"conv": optax.scale(-1.0), "bias": optax.scale(-2.0), "rest": optax.set_to_zero()}
    transform = optax.multi_transform(transforms, parts.labels())
    updates, _ = transform.update(jax.tree.map(jnp.ones_like, params), transform.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    values = {
        part: {float(x) for leaf in flat.values() for x in leaf.ravel()} for part, flat in parts.split(updates).items()
    }
    assert values == {"conv": {-1.0}, "bias": {-2.0}, "rest": {0.0}}


# One array at two paths.


@pytest.mark.parametrize("array", [jnp.ones(2), np.ones(2), jax.random.key(0)], ids=["jax", "numpy", "key"])
def test_one_array_at_two_paths_is_warned_of(array):
    with pytest.warns(
        UserWarning, match=says("'a' and 'b/w' are one array, but two parameters", "to tie them")
    ) as record:
        ft.partition({"a": array, "b": {"w": array}}, {"rest": ...})
    assert [one.filename for one in record] == [__file__]


def test_each_further_path_of_one_array_is_warned_of():
    array = jnp.ones(2)
    with pytest.warns(UserWarning, match="are one array") as record:
        ft.partition([array, array, array], {"rest": ...})
    assert len(record) == 2
    assert "'0' and '2' are one array" in str(record[1].message)


def test_equal_arrays_are_not_warned_of():
    with warnings.catch_warnings(action="error"):
        ft.partition({"a": jnp.ones(2), "b": jnp.ones(2), "c": np.ones(2), "d": np.ones(2)}, {"rest": ...})


def test_one_shape_number_or_function_at_two_paths_is_not_warned_of():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    with warnings.catch_warnings(action="error"):
        ft.partition({"a": shape, "b": shape, "c": len, "d": len, "e": 1.0, "f": 1.0}, {"rest": ...})


def test_one_tracer_at_two_paths_is_not_warned_of():
    @jax.jit
    def twice(x):
        return ft.partition({"a": x, "b": x}, {"rest": ...}).split({"a": x, "b": x})

    with warnings.catch_warnings(action="error"):
        twice(jnp.ones(2))


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


# take.


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


@quick
@given(cases())
def test_split_holds_each_leaf_under_its_part_and_path(case):
    split = ft.partition(case.tree, case.rules).split(case.tree)
    flat = ft.flatten(case.tree)
    assert split == {part: {path: flat[path] for path in flat if case.owner[path] == part} for part in case.rules}


@quick
@given(cases())
def test_split_and_merge_are_inverse(case):
    parts = ft.partition(case.tree, case.rules)
    split = parts.split(case.tree)
    assert identical(parts.merge(split), case.tree)
    assert parts.split(parts.merge(split)) == split


@quick
@given(cases(), st.data())
def test_merge_into_changes_the_given_parts_alone(case, data):
    parts = ft.partition(case.tree, case.rules)
    given_parts = data.draw(st.sets(st.sampled_from(parts.names)))
    new = jax.tree.map(lambda x: -1.0 - x, case.tree)
    merged = parts.merge({part: parts.split(new)[part] for part in given_parts}, into=case.tree)
    old, new = ft.flatten(case.tree), ft.flatten(new)
    assert jax.tree.structure(merged) == jax.tree.structure(case.tree)
    assert ft.flatten(merged) == {path: (new if case.owner[path] in given_parts else old)[path] for path in old}


@quick
@given(cases())
def test_labels_agree_with_split(case):
    parts = ft.partition(case.tree, case.rules)
    assert ft.flatten(parts.labels()) == case.owner
    assert all(set(flat.values()) == {part} for part, flat in parts.split(parts.labels()).items())
    values = {part: i for i, part in enumerate(parts.names)}
    assert parts.labels(values) == jax.tree.map(values.get, parts.labels())


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


@quick
@given(any_trees)
def test_a_tree_is_partitioned_if_and_only_if_it_has_a_leaf(tree):
    if jax.tree.leaves(tree):
        assert ft.partition(tree, {"all": ...}).paths("all") == tuple(ft.flatten(tree))
    else:
        assert "the tree has no leaves" in fails(tree, {"all": ...})
