"""What `split`, `merge` and `labels` do with a tree."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from partitions import PARAMS, PARTS, arrays
from trees import TREES, Model, Pair, cases, identical, nnx_params, quick

import functrain as ft


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


def test_a_tree_masked_to_a_part_has_optaxs_masked_nodes_in_the_place_of_other_leaves():
    masked = PARTS.masked(PARTS.labels(), PARTS.names[0])
    assert set(jax.tree.leaves(masked)) == {PARTS.names[0]}
    assert len(jax.tree.leaves(masked)) == len(PARTS.paths(PARTS.names[0]))
    leaves = jax.tree.leaves(masked, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    assert len(leaves) == len(PARTS.leaves)


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


# Laws.


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
