"""Leaf names, `flatten` and `unflatten`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from trees import (
    TREES,
    Model,
    Pair,
    any_trees,
    equinox_model,
    haiku_params,
    identical,
    linen_params,
    nnx_model,
    nnx_params,
    quick,
    says,
)

import functrain as ft
from functrain.tree.paths import same_structure


def paths(tree):
    return list(ft.flatten(tree))


# Names.


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"conv": {"kernel": 1.0, "bias": 2.0}}, ["conv/bias", "conv/kernel"]),
        ({0: 1.0, 1: {2: 3.0}}, ["0", "1/2"]),
        ([1.0, [2.0, 3.0]], ["0", "1/0", "1/1"]),
        ((1.0, (2.0,)), ["0", "1/0"]),
        (Pair(1.0, {"a": 2.0}), ["left", "right/a"]),
        (Model(encoder=[1.0], head=2.0), ["encoder/0", "head"]),
        ({"a": None, "b": {}, "c": [(), 1.0]}, ["c/1"]),
        ({"a.b": {"[0]": 1.0, "~": 2.0, "": 3.0}}, ["a.b/", "a.b/[0]", "a.b/~"]),
        (1.0, [""]),
        ({}, []),
    ],
    ids=str,
)
def test_a_path_is_the_keys_joined_by_a_slash(tree, expected):
    assert paths(tree) == expected


NNX_PARAMS = [
    *("blocks/0/bias", "blocks/0/kernel", "blocks/1/bias", "blocks/1/kernel"),
    *("conv/bias", "conv/kernel", "lora/a", "lora/value", "norm/bias", "norm/scale"),
]
NNX_OTHERS = ["dropout/rngs/count", "dropout/rngs/key", "norm/mean", "norm/var"]


def test_the_key_beneath_an_nnx_variable_is_no_part_of_the_path():
    assert paths(nnx_params()) == NNX_PARAMS


def test_an_nnx_module_and_its_state_have_the_same_paths():
    assert paths(nnx_model()) == paths(nnx.state(nnx_model())) == sorted(NNX_PARAMS + NNX_OTHERS)


def test_a_pure_dict_of_an_nnx_state_has_the_paths_of_the_state():
    assert paths(nnx.to_pure_dict(nnx_params())) == NNX_PARAMS


def test_an_nnx_variable_that_holds_a_dict_keeps_the_keys_of_the_dict():
    assert paths(nnx.Param({"a": [1.0], "value": {"value": 2.0}})) == ["a/0", "value/value"]


def test_a_bare_nnx_variable_has_the_path_of_a_bare_array():
    assert paths(nnx.Param(jnp.ones(2))) == paths(jnp.ones(2)) == [""]


def test_a_field_called_value_that_is_no_nnx_variable_keeps_its_name():
    assert paths({"a": {"value": 1.0}}) == ["a/value"]


def test_linen_params_are_named_by_their_dict():
    names = ["layers_0/bias", "layers_0/kernel", "layers_2/bias", "layers_2/kernel"]
    assert paths(linen_params()) == [f"params/{name}" for name in names]


def test_an_equinox_module_names_its_functions_and_numbers_too():
    arrays = ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"]
    assert paths(equinox_model()) == [
        *(f"mlp/{name}" for name in [*arrays, "activation", "final_activation"]),
        "scale",
    ]


def test_a_haiku_module_name_keeps_its_slashes():
    assert paths(haiku_params()) == [f"mlp/~/linear_{i}/{name}" for i in (0, 1) for name in ("b", "w")]


def test_a_node_without_keys_is_numbered():
    class Box:
        pass

    def unpack(box):
        return (box.one, box.two), None

    jax.tree_util.register_pytree_node(Box, unpack, lambda _, children: Box())
    box = Box()
    box.one, box.two = 1.0, {"a": 2.0}
    assert paths({"box": box}) == ["box/0", "box/1/a"]


# flatten and unflatten.


def test_flatten_returns_the_leaves_themselves_in_the_order_of_the_tree():
    tree = {"b": [jnp.ones(2), np.ones(3)], "a": jnp.tanh}
    flat = ft.flatten(tree)
    assert list(flat) == ["a", "b/0", "b/1"]
    assert flat["a"] is jnp.tanh
    assert flat["b/0"] is tree["b"][0]
    assert flat["b/1"] is tree["b"][1]


def test_a_list_of_more_than_ten_stays_in_order():
    assert paths([0.0] * 12) == [str(i) for i in range(12)]


def test_flatten_leaves_a_flat_tree_as_it_is():
    flat = ft.flatten(TREES["Equinox"]())
    assert ft.flatten(flat) == flat


@pytest.mark.parametrize("name", TREES)
def test_unflatten_is_the_inverse_of_flatten(name):
    tree = TREES[name]()
    assert identical(ft.unflatten(ft.flatten(tree), like=tree), tree)


@quick
@given(any_trees)
def test_unflatten_is_the_inverse_of_flatten_for_any_tree(tree):
    assert identical(ft.unflatten(ft.flatten(tree), like=tree), tree)


def test_unflatten_goes_by_path_and_not_by_order():
    assert ft.unflatten({"right": 2.0, "left": 1.0}, like=Pair(0.0, 0.0)) == Pair(1.0, 2.0)


def test_unflatten_takes_only_the_structure_of_like():
    like = jax.eval_shape(lambda: Pair(jnp.ones(2), [jnp.ones(3)]))
    assert ft.unflatten({"left": "x", "right/0": None}, like=like) == Pair("x", [None])


def test_two_leaves_with_one_path_are_an_error():
    with pytest.raises(ft.PartitionError, match=says("two leaves have the path 'a/b'", "contains '/'", "rename one")):
        ft.flatten({"a/b": 1.0, "a": {"b": 2.0}})


def test_an_integer_key_and_its_digits_as_a_string_are_one_path():
    with pytest.raises(ft.PartitionError, match="two leaves have the path 'a/0'"):
        ft.flatten({"a": [1.0], "a/0": 2.0})


def test_unflatten_names_the_missing_paths():
    with pytest.raises(ft.PartitionError, match=r"^the flat tree lacks 'a/1', 'b'$"):
        ft.unflatten({"a/0": 1.0}, like={"a": [0.0, 0.0], "b": 0.0})


def test_unflatten_names_the_extra_paths():
    with pytest.raises(ft.PartitionError, match=r"^the flat tree has 'c', which is not expected$"):
        ft.unflatten({"a": 1.0, "c": 2.0}, like={"a": 0.0})


def test_unflatten_names_missing_and_extra_paths_together():
    with pytest.raises(ft.PartitionError, match="lacks 'a' and has 'c', which is not expected"):
        ft.unflatten({"c": 2.0}, like={"a": 0.0})


def test_at_most_ten_missing_paths_are_listed_and_the_others_counted():
    with pytest.raises(ft.PartitionError, match=r"lacks '0', .*'9' and 2 more$"):
        ft.unflatten({}, like=[0.0] * 12)


def test_a_partition_error_is_a_value_error():
    assert issubclass(ft.PartitionError, ValueError)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1.0}, {"a": jnp.ones(2)}, True),
        ({"a": 1.0}, {"b": 1.0}, False),
        ([1.0], (1.0,), False),
        (Model(1.0, 2.0, activation="relu"), Model(1.0, 2.0, activation="tanh"), False),
    ],
)
def test_a_structure_is_node_types_keys_and_static_fields(one, other, same):
    assert same_structure(one, other) is same
