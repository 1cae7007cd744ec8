"""README's Python runs as it is written."""

import pathlib
import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
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


def mlp(weights, x):
    return jnp.tanh(x @ weights[0]) @ weights[1]


def gan():
    """What the block on phases takes as given."""

    def fakes(params, key):
        return mlp(params["generator"], jax.random.normal(key, (16, 2)))

    def d_loss(params, real, key):
        d = params["discriminator"]
        return mlp(d, fakes(params, key)).mean() - mlp(d, real).mean()

    def g_loss(params, real, key):
        return -mlp(params["discriminator"], fakes(params, key)).mean()

    shapes = {"discriminator": [(3, 8), (8, 1)], "generator": [(2, 8), (8, 3)]}
    params = {
        part: [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(of)] for part, of in shapes.items()
    }
    parts = ft.partition(params, {part: part for part in shapes})
    optim = ft.Optimizer(parts, dict.fromkeys(shapes, optax.adam(1e-4, b1=0.5, b2=0.9)))
    given = {"d_loss": d_loss, "g_loss": g_loss, "gan_params": params, "gan_optim": optim}
    return given | {"real": jax.random.normal(jax.random.key(9), (16, 3))}


def regression(directory):
    """What the block on the loop takes as given."""
    xs = np.random.default_rng(0).normal(size=(96, 2)).astype(np.float32)
    params = {"w": jnp.zeros(2)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.3)})

    def model(params, x):
        return x @ params["w"]

    def loss_fn(params, batch):
        return ft.Loss(jnp.mean((model(params, batch["x"]) - batch["y"]) ** 2), weight=len(batch["y"]))

    update = ft.make_update(loss_fn, optim)
    return {"update": update, "params": params, "model": model, "xs": xs, "ys": xs.sum(1), "directory": directory}


def test_every_python_block_runs_in_order(monkeypatch, capsys, tmp_path):
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
    loop, rates, compiled, phases, audit, fit, *models = blocks("python")
    exec(loop, names)
    table, audited = blocks("text")
    assert f"{names['optim']}\n" == table
    exec(rates, names)
    assert abs(float(names["optim"].learning_rates(names["opt_state"])["conv1"]) - 1e-4) < 1e-10
    names["batches"] = names["batches"][:6]
    exec(compiled, names)
    assert int(names["state"].step) == 3  # Four batches, two that were left over, and four in a scan.
    names |= gan()
    exec(phases, names)
    assert int(names["state"].step) == 9
    capsys.readouterr()
    exec(audit, names)
    shares = re.compile(r"\d+%")  # XLA counts FLOPs differently from one version to the next.
    assert shares.sub("", capsys.readouterr().out) == shares.sub("", audited)
    names |= regression(tmp_path)
    exec(fit, names)
    assert names["result"].results["valid/loss"] < 0.1
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
