"""Filters of Flax NNX, and its types of Variables, as selectors."""

import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx
from trees import says

import functrain as ft


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv1, self.conv10 = nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
        self.lora = nnx.LoRA(2, 1, 2, base_module=nnx.Linear(2, 2, rngs=rngs), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def model():
    return Model(nnx.Rngs(0))


FILTERS = {
    "PathContains": nnx.PathContains("conv1"),
    "not exact": nnx.PathContains("conv1", exact=False),
    "an index": nnx.PathContains(1),
    "a type": nnx.LoRAParam,
    "OfType": nnx.OfType(nnx.BatchStat),
    "Any": nnx.Any(nnx.LoRAParam, nnx.PathContains("conv10")),
    "All": nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam), nnx.PathContains("lora")),
    "Not": nnx.Not(nnx.Param),
    "PathIn": nnx.filterlib.PathIn(("conv1", "bias"), ("blocks", 0, "kernel")),
    "a function in Any": nnx.Any(lambda path, variable: path[-1] == "bias" and isinstance(variable, nnx.Variable)),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("make", [lambda: nnx.state(model()), model], ids=["state", "module"])
def test_a_filter_takes_what_it_takes_in_nnx(name, make):
    tree = make()
    parts = ft.partition(tree, {"mine": FILTERS[name], "rest": ...})
    expected = set(ft.flatten(nnx.state(model(), FILTERS[name])))
    assert set(parts.paths("mine")) == expected
    assert set(ft.take(tree, FILTERS[name])[0]) == expected
    assert {path for path, taken in ft.flatten(ft.mask(FILTERS[name])(tree)).items() if taken} == expected


def test_a_filter_in_a_sequence_is_one_of_its_members():
    parts = ft.partition(nnx.state(model()), {"mine": ["conv10", nnx.LoRAParam], "rest": ...})
    assert parts.paths("mine") == ("conv10/bias", "conv10/kernel", "lora/lora_a", "lora/lora_b")
    masked = ft.flatten(ft.mask(["conv10", nnx.LoRAParam], invert=True)(nnx.state(model())))
    assert {path for path, taken in masked.items() if not taken} == set(parts.paths("mine"))


def test_the_table_names_the_filter():
    parts = ft.partition(nnx.state(model()), {"conv": FILTERS["PathContains"], "lora": nnx.LoRAParam, "rest": ...})
    assert parts.selectors == ("PathContains('conv1', exact=True)", "LoRAParam", "...")


def test_a_filter_that_takes_nothing_is_an_error_that_names_it():
    with pytest.raises(ft.PartitionError, match=says("rule 'lora': no leaf matches Cache; the tree has")):
        ft.partition(nnx.state(model(), nnx.Param), {"lora": nnx.Cache, "rest": ...})


@pytest.mark.parametrize("selector", [nnx.LoRAParam, nnx.PathContains("conv")], ids=["type", "filter"])
def test_a_filter_on_a_tree_without_variables_is_refused_by_name(selector):
    name = getattr(selector, "__name__", None) or repr(selector)
    message = says("rule 'mine'", f"{name} is a filter of NNX", "nnx.state(model)", "select by path")
    with pytest.raises(ft.PartitionError, match=message):
        ft.partition({"conv1": jnp.ones(2)}, {"mine": selector, "rest": ...})


@pytest.mark.parametrize("selector", [nnx.Linear, int, [jnp.ndarray]], ids=["module", "int", "in a sequence"])
def test_another_class_is_refused_by_name(selector):
    name = (selector[0] if isinstance(selector, list) else selector).__name__
    with pytest.raises(ft.PartitionError, match=says(f"{name} is a class, and no selector", "nnx.Param")):
        ft.partition(nnx.state(model()), {"mine": selector, "rest": ...})


def test_selectors_of_other_kinds_do_not_import_flax():
    program = (
        "import sys, functrain as ft; ft.partition({'a': 1.0, 'b': 2.0}, {'a': ['a'], 'b': lambda path, leaf: True});"
        "ft.mask('a')({'a': 1.0}); assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
