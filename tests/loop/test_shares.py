"""Shardings of batches: for arrays of fewer axes, by name, unrolled, in evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functrain as ft

XS = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
ARRAYS = {"x": XS, "y": XS.sum(1)}


def model():
    params = {"w": jnp.ones(4)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})

    def losses(params, batch):
        return (batch["x"] @ params["w"] * 0.5 - batch["y"]) ** 2

    return ft.make_update(lambda params, batch: losses(params, batch).mean(), optim), params, losses


def evaluation(losses, **options):
    data = ft.from_arrays(ARRAYS, 8, shuffle=False, last="pad")
    return ft.Evaluation(lambda params, batch: {"loss": losses(params, batch)}, data, **options)


def trained(place=None, unroll=1, **options):
    """The last parameters, and what an evaluation finds of them."""
    update, params, losses = model()
    result = ft.fit(
        update, update.init(params if place is None else jax.device_put(params, place)),
        ft.from_arrays(ARRAYS, 8, seed=1), epochs=1, unroll=unroll, progress=False,
        evaluation=evaluation(losses, sharding=options.pop("evaluation_sharding", None)), **options,
    )  # fmt: skip
    return [*np.asarray(result.state.params["w"]), result.results["valid/loss"]]


@pytest.fixture
def over():
    """`over(*axes)`: a sharding over a mesh of data and sequence."""
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))


@pytest.mark.parametrize("unroll", [1, 2])
def test_a_spec_of_two_axes_serves_labels_of_one_and_the_mask_of_an_evaluation(over, unroll):
    found = trained(over(), unroll, sharding=over("data", "seq"))
    np.testing.assert_allclose(found, trained(), rtol=1e-5)


@pytest.mark.parametrize("unroll", [1, 2])
def test_a_sharding_may_be_given_by_name(over, unroll):
    by_name = {"x": over("data", "seq"), "y": over("data")}
    found = trained(over(), unroll, sharding=by_name, evaluation_sharding=by_name | {"weight": over("data")})
    np.testing.assert_allclose(found, trained(), rtol=1e-5)
