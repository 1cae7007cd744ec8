"""README's Python runs as it is written."""

import pathlib
import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import functrain as ft

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.tanh(linen.Dense(4)(x)))


def test_every_python_block_runs_in_order(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from custom_loop import Model

    images = jax.random.uniform(jax.random.key(0), (7, 32, 8, 8, 1))
    labels = jax.random.randint(jax.random.key(1), (7, 32), 0, 10)
    names = {
        "Model": Model,
        "batches": [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)],
        "cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
        "jnp": jnp,
        "eqx": eqx,
        "x": jnp.ones((5, 3)),
        "nnx_model": NnxModel(nnx.Rngs(0)),
        "linen_model": LinenModel(),
        "eqx_model": eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0)),
        "haiku_model": hk.transform(lambda x: hk.nets.MLP([4, 1])(x)),
    }
    loop, rates, compiled, *models = blocks("python")
    exec(loop, names)
    (table,) = blocks("text")
    assert f"{names['optim']}\n" == table
    exec(rates, names)
    assert abs(float(names["optim"].learning_rates(names["opt_state"])["conv1"]) - 1e-4) < 1e-10
    names["batches"] = names["batches"][:6]
    exec(compiled, names)
    assert int(names["state"].step) == 3  # Four batches, two that were left over, and four in a scan.
    assert len(models) == 5
    for block in models:
        exec(block, names)
        assert jnp.isfinite(names["loss"].value)


def test_the_error_that_the_readme_quotes_is_the_one_that_is_raised():
    params = {"conv1": {"w": 1.0, "b": 1.0}, "conv2": {"w": 1.0, "b": 1.0}}
    with pytest.raises(ft.PartitionError) as raised:
        ft.partition(params, {"conv1": "conv_1", "rest": ...})
    assert str(raised.value) in " ".join(README.split())


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
