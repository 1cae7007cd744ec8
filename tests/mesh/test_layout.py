"""A layout: which rule takes which leaf, what is refused, where arrays come to lie."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import functrain as ft

SHAPES = {"embed": (16, 8), "body": {"kernel": (8, 32), "bias": (32,)}, "head": {"kernel": (32, 12), "scale": ()}}
PARAMS = jax.tree.map(lambda shape: jnp.ones(shape), SHAPES, is_leaf=lambda node: isinstance(node, tuple))
MESH = AbstractMesh((4, 2), ("fsdp", "tensor"))


def mesh_of(*shape, names=("fsdp", "tensor"), kind=AxisType.Auto):
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(kind,) * len(shape))


def specs(layout):
    return {path: tuple(spec) for path, spec in layout.specs.items()}


def test_the_first_rule_that_matches_takes_a_leaf():
    layout = ft.layout(PARAMS, MESH, {"embed": P("tensor"), "**/kernel": P("fsdp", "tensor"), ...: P()})
    assert specs(layout) == {
        "embed": ("tensor",), "body/kernel": ("fsdp", "tensor"), "head/kernel": ("fsdp", "tensor"),
        "body/bias": (), "head/scale": (),
    }  # fmt: skip


def test_largest_cuts_the_largest_dimension_that_divides_and_leaves_scalars_whole():
    assert specs(ft.layout(PARAMS, MESH, {...: ft.largest("fsdp")})) == {
        "embed": ("fsdp",), "body/kernel": (None, "fsdp"), "head/kernel": ("fsdp",), "body/bias": ("fsdp",),
        "head/scale": (),
    }  # fmt: skip


def test_leaves_below_the_least_size_are_whole_and_named_in_the_table():
    layout = ft.layout(PARAMS, MESH, {...: ft.largest(("fsdp", "tensor"), least=100)})
    assert layout.specs["body/bias"] == P()
    assert tuple(layout.specs["embed"]) == (("fsdp", "tensor"),)
    assert "whole on every device: 'body/bias', 'head/scale'" in str(layout)


def test_a_selector_is_whatever_a_partition_takes():
    by_rank = {lambda path, leaf: leaf.ndim == 1: P("tensor"), re.compile(".*kernel"): P(), ("embed", "head"): P()}
    assert specs(ft.layout(PARAMS, MESH, by_rank))["body/bias"] == ("tensor",)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"embd": P(), ...: P()}, "rule 'embd': no leaf matches 'embd'; did you mean 'embed' (1 leaf)?"),
        ({"embed": P()}, "no rule takes 'body/bias', 'body/kernel', 'head/kernel', 'head/scale': add one, or ...: P()"),
        ({"**": P(), "embed": P()}, "rule 'embed' takes no leaf: 1 leaf that 'embed' matches went to the earlier rule"),
        ({...: P("data")}, "rule ... names the axis 'data', which the mesh has not: its axes are 'fsdp' of 4,"),
        ({...: ft.largest("fdsp")}, "its axes are 'fsdp' of 4, 'tensor' of 2; did you mean 'fsdp'"),
        ({"embed": P("fsdp", "fsdp"), ...: P()}, "rule embed names the axis 'fsdp' twice"),
        ({"body": P("fsdp", "tensor"), ...: P()}, "rule body: P('fsdp', 'tensor') is for arrays of at least 2"
         " dimensions, and 'body/bias' has 1, (32,): write a rule of its own before it, {'body/bias': P('fsdp')}"),
        ({"head/kernel": P(None, ("fsdp", "tensor")), ...: P()}, "rule head/kernel: dimension 1 of 'head/kernel',"
         " shaped (32, 12), is 12, which 'fsdp', 'tensor' of 8 does not divide: pad it to 16, or write a rule of its"
         " own before, {'head/kernel': P()} for all of it on every device"),
        ({...: "fsdp"}, "rule ...: 'fsdp' is no spec: write P('fsdp', None), P() for all on every device"),
        ({...: P(P.UNCONSTRAINED)}, "write None in the place of P.UNCONSTRAINED"),
        ({}, "rules are a dict of specs by selector"),
    ],
)  # fmt: skip
def test_a_rule_that_does_not_fit_says_what_to_write(rules, said):
    with pytest.raises(ft.LayoutError) as error:
        ft.layout(PARAMS, MESH, rules)
    assert said in str(error.value)


def test_nothing_is_whole_because_it_did_not_fit():
    with pytest.raises(ft.LayoutError) as error:
        ft.layout({"w": jnp.ones((9, 6))}, MESH, {...: ft.largest("fsdp")})
    assert str(error.value) == (
        "rule ...: no dimension of 'w', shaped (9, 6), is a multiple of 4, the size of 'fsdp': pad 9 to 12, write a"
        ' rule of its own before, {"w": P()} for all of it on every device, or least=55 in ft.largest'
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"zero": "data"}, "zero= names the axis 'data', which the mesh has not"),
        (
            {"memory": {"body": "host"}},
            "memory={'body': 'host'}: write one of 'device', 'pinned_host', 'unpinned_host'",
        ),
        ({"batch": "fsdp"}, "batch='fsdp': write P(\"data\"), or a spec by name"),
        ({"batch": P("rows")}, "batch= names the axis 'rows', which the mesh has not"),
    ],
)
def test_an_option_that_does_not_fit_says_what_to_write(options, said):
    with pytest.raises(ft.LayoutError) as error:
        ft.layout(PARAMS, MESH, {...: P()}, **options)
    assert said in str(error.value)


def test_a_zero_that_cuts_nothing_is_an_error():
    with pytest.raises(ft.LayoutError, match="zero='fsdp' cuts nothing"):
        ft.layout(PARAMS, MESH, {"head/scale": P(), ...: ft.largest("fsdp")}, zero="fsdp")


def test_zero_cuts_the_largest_dimension_that_is_left_and_the_table_names_what_it_cannot():
    rules = {"**/kernel": P(None, "tensor"), ...: P()}
    layout = ft.layout(PARAMS | {"odd": jnp.ones(3)}, MESH, rules, zero="fsdp")
    found = {path: tuple(layout.of_state(path).spec) for path in layout.specs}
    assert found == {
        "embed": ("fsdp",), "body/kernel": (None, ("tensor", "fsdp")), "head/kernel": ("fsdp", "tensor"),
        "body/bias": ("fsdp",), "head/scale": (), "odd": (),
    }  # fmt: skip
    assert "zero cuts no dimension of 'head/scale', 'odd'" in str(layout)


def test_the_table_says_what_lies_where_and_how_much():
    layout = ft.layout(
        PARAMS, MESH, {"embed": P("tensor"), "**/kernel": P("fsdp", "tensor"), ...: P()},
        batch={"x": P("fsdp"), "y": P("fsdp")}, memory={"body": "pinned_host"},
    )  # fmt: skip
    assert str(layout).splitlines() == [
        "rule       spec                 leaves  bytes a device",
        "embed      P('tensor')               1           256 B",
        "**/kernel  P('fsdp', 'tensor')       2           320 B",
        "...        P()                       2           132 B",
        "total                                5           708 B",
        "mesh: fsdp 4 x tensor 2",
        "batch: x P('fsdp'), y P('fsdp')",
        "whole on every device: 'body/bias', 'head/scale'",
        "memory: the optimizer state of 'body' in pinned_host",
    ]


def test_a_batch_that_is_forgotten_is_told_in_the_table():
    assert "batch: P(), so that every device computes all of it" in str(ft.layout(PARAMS, MESH, {...: P()}))


def test_put_and_init_leave_no_device_more_than_its_share():
    layout = ft.layout(PARAMS, mesh_of(4, 2), {"head/scale": P(), ...: ft.largest(("fsdp", "tensor"))})
    made = layout.init(lambda key: jax.tree.map(lambda leaf: leaf * jax.random.normal(key), PARAMS), jax.random.key(0))
    for placed in (layout.put(PARAMS), layout.put(jax.tree.map(np.asarray, PARAMS)), made):
        for path, leaf in ft.flatten(placed).items():
            assert leaf.sharding == layout.sharding(path)
            share = 1 if path == "head/scale" else 8
            assert leaf.addressable_shards[0].data.size * share == leaf.size
    assert ft.flatten(layout.abstract(PARAMS))["embed"].sharding == layout.sharding("embed")


def test_what_is_put_is_a_copy_of_what_was_given():
    layout = ft.layout(PARAMS, mesh_of(8), {...: P()})
    jax.jit(lambda tree: tree, donate_argnums=0)(layout.put(PARAMS))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(PARAMS))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"embed": np.ones((16, 8))}, "the tree lacks 'body/bias', 'body/kernel', 'head/kernel', 'head/scale'"),
        (PARAMS | {"more": np.ones(2)}, "the tree has 'more', which is not expected"),
        (PARAMS | {"embed": np.ones((8, 8))}, "'embed' has shape (8, 8), and was laid out with (16, 8)"),
    ],
)
def test_a_tree_that_was_not_laid_out_is_told(tree, said):
    layout = ft.layout(PARAMS, mesh_of(8), {...: P()})
    for call in (layout.put, layout.abstract, lambda tree: layout.init(lambda: tree)):
        with pytest.raises(ft.LayoutError, match=re.escape(said)):
            call(tree)


def test_what_is_no_array_stays_where_it_is():
    tree = {"w": jnp.ones(8), "activation": jnp.tanh}
    layout = ft.layout(tree, mesh_of(8), {...: ft.largest("fsdp")})
    assert layout.put(tree)["activation"] is jnp.tanh


def test_batches_go_where_the_layout_says():
    layout = ft.layout(PARAMS, mesh_of(4, 2), {...: P()}, batch=P("fsdp", "tensor"))
    batch = layout.batch({"x": np.ones((8, 4)), "y": np.ones(8)})
    assert [tuple(batch[name].sharding.spec) for name in "xy"] == [("fsdp", "tensor"), ("fsdp",)]
    assert (layout.data_axes, layout.data_shards) == (("fsdp",), 4)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            {"x": np.ones((6, 4)), "y": np.ones(6)},
            "a leaf of the batch has the shape (6, 4), of which 'fsdp' of 4 does not divide dimension 0: give batches"
            " of a multiple of 4 rows; a short last one is filled up with ft.from_arrays(..., last='pad')",
        ),
        (
            {"x": np.ones((8, 4)), "y": np.ones(8), "weight": np.ones(8)},
            "laid out by name, 'x', 'y', and this one has 'weight', which they do not name: name exactly what a batch",
        ),
        ({"x": np.ones((8, 4))}, "laid out by name, 'x', 'y', and this one lacks 'y': name exactly what a batch has"),
        (np.ones(8), "laid out by name, 'x', 'y', and this one is no dict (ndarray): give one for all arrays, batch="),
    ],
)
def test_a_batch_that_does_not_fit_is_told(batch, said):
    layout = ft.layout(PARAMS, mesh_of(4, 2), {...: P()}, batch={"x": P("fsdp"), "y": P("fsdp")})
    with pytest.raises(ft.LayoutError) as error:
        layout.batch(batch)
    assert said in str(error.value)


def test_init_makes_a_tree_with_what_is_no_array_and_tells_of_params_in_the_place_of_a_function():
    def make(key):
        return {"w": jax.random.normal(key, (8, 4)), "act": jnp.tanh, "flag": True}

    layout = ft.layout(make(jax.random.key(0)), mesh_of(4, 2), {...: ft.largest("fsdp")})
    made = layout.init(make, jax.random.key(0))
    assert (made["act"], made["flag"], made["w"].sharding.spec) == (jnp.tanh, True, P("fsdp"))
    assert (np.asarray(made["w"]) == make(jax.random.key(0))["w"]).all()
    with pytest.raises(
        ft.LayoutError, match=r"a function that makes params, no dict: .*placed by layout.put\(params\)"
    ):
        layout.init(made)


def test_a_batch_that_is_a_tuple_has_a_tuple_of_specs():
    layout = ft.layout(PARAMS, mesh_of(4, 2), {...: P()}, batch=(P("fsdp"), P()))
    assert str(layout).endswith("batch: (P('fsdp'), P())")
    assert [leaf.sharding.spec for leaf in layout.batch((np.ones(8), np.ones(3)))] == [P("fsdp"), P()]
