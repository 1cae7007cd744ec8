"""Microbatches have the loss of the whole batch where that is a mean over examples; where it is not, `fit` warns."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functrain as ft

PARAMS = {"w": jnp.array([[1.0, -0.5, 0.2], [0.3, 1.0, -1.0]])}
X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)


def mean(params, batch):
    weight = batch["weight"].sum()
    return ft.Loss(jnp.sum(batch["weight"] * jnp.sum((batch["x"] @ params["w"]) ** 2, axis=1)) / weight, weight=weight)


def summed(params, batch):
    return ft.Loss(jnp.sum((batch["x"] @ params["w"]) ** 2), weight=len(batch["x"]))


def contrastive(params, batch):
    found = batch["x"] @ params["w"]
    return {"pairs": -jnp.mean(jnp.diag(jax.nn.log_softmax(found @ found.T)))}


def masked(params, batch):
    """A mean over what is not masked, that does not say over how much."""
    return mean(params, batch).value


def normalised(params, batch, model_state):
    """With statistics of the batch, as batch norm has: each slice has others."""
    found = batch["x"] @ params["w"]
    found = found / found.std(axis=0)
    return ft.Loss(jnp.abs(found + 1).mean(), weight=len(found), model_state={"std": found.std(axis=0)})


def random(params, batch, key):
    return ft.Loss(mean(params, batch).value * jax.random.uniform(key))


def warned(loss_fn, key=None, per_example=None, model_state=None, microbatches=2, weight=range(1, 9), **options):
    """What is said in a run of two epochs, with slices of a batch, or with each example by itself."""
    optim = ft.Optimizer(ft.partition(PARAMS, {"all": ...}), {"all": optax.sgd(1e-3)})
    apart = {"microbatches": microbatches} if per_example is None else {"per_example": per_example}
    update = ft.make_update(loss_fn, optim, **apart)
    data = [{"x": X, "weight": np.float32([*weight])}] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ft.fit(update, update.init(PARAMS, key=key, model_state=model_state), data, epochs=2, **options)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(("loss_fn", "key"), [(mean, None), (random, jax.random.key(0))])
def test_a_mean_over_examples_and_what_can_not_be_told_are_not_told_of(loss_fn, key):
    assert not warned(loss_fn, key)


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [(summed, {}), (contrastive, {}), (ft.alternate(ft.Phase("pull", contrastive, parts="all")), {"unroll": 2})],
)
def test_a_loss_that_is_no_mean_over_examples_is_told_once_with_both_values(loss_fn, options):
    (told,) = warned(loss_fn, **options)
    of, name = (summed, "loss") if loss_fn is summed else (contrastive, "pairs")
    numbers = re.fullmatch(
        f"microbatches=2 computes another loss than the whole batch has: of a slice {of.__name__} returns the '{name}'"
        " (.*), of the same twice (.*), so that it is no mean over examples; write microbatches=1, or return a sum"
        r" as a mean, ft.Loss\(sum / count, weight=count\)",
        told,
    )
    losses = (of(PARAMS, {"x": examples}) for examples in (X[::2], np.concatenate([X[::2]] * 2)))
    expected = [each.value if of is summed else each["pairs"] for each in losses]
    np.testing.assert_allclose([*map(float, numbers.groups())], expected, rtol=1e-4)  # Six digits are told.


def test_a_mean_that_does_not_say_what_it_is_over_is_told_with_both_values():
    (told,) = warned(masked)
    numbers = re.fullmatch(
        "microbatches=2 computes another loss than the whole batch has: masked returns the 'loss' (.*) of two parts of"
        " it together, and of each by itself such that their mean, by its weight, is (.*); return what its mean is"
        r" over, such as unmasked tokens, ft.Loss\(mean, weight=mask.sum\(\)\), or write microbatches=1",
        told,
    )
    weight = np.arange(1.0, 9.0, dtype=np.float32)
    of = [float(masked(PARAMS, {"x": X[rows], "weight": weight[rows]})) for rows in (slice(0, 8, 2), slice(1, 8, 2))]
    expected = [float(masked(PARAMS, {"x": X, "weight": weight})), sum(of) / 2]
    np.testing.assert_allclose([*map(float, numbers.groups())], expected, rtol=1e-4)


def test_a_mean_that_does_not_say_what_it_is_over_is_told_whichever_slices_the_mask_tells_apart():
    weight = [1, 1, 1, 1, 1, 1, 0, 1]  # Of the third of four slices.
    assert len(warned(masked, weight=weight, microbatches=4)) == 1
    assert not warned(mean, weight=weight, microbatches=4)


def test_statistics_of_a_batch_that_are_state_are_not_told_of():
    assert not warned(normalised, model_state={"std": jnp.ones(3)})


def test_a_loss_of_pairs_of_which_each_example_is_taken_by_itself_is_told():
    (told,) = warned(contrastive, per_example=lambda grads: grads)
    assert "has the loss of each of the 8 examples by itself, which is not that of the batch" in told
    assert re.search(
        r"of one contrastive returns the 'pairs' -?0, of the same twice 0.69\d+, so that it is no mean", told
    )
    assert "give each example what it is compared with (its own negatives)" in told
    assert not warned(mean, per_example=lambda grads: grads)


@pytest.mark.parametrize(("loss_fn", "is_told"), [(mean, False), (masked, True), (summed, True), (contrastive, True)])
def test_shards_that_sum_their_own_gradients_are_told_of_a_loss_that_is_no_mean(loss_fn, is_told):
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    layout = ft.layout(
        PARAMS, mesh, {...: jax.P()}, batch={"x": jax.P("data"), "weight": jax.P("data"), "scale": jax.P()}
    )
    optim = ft.Optimizer(ft.partition(PARAMS, {"all": ...}), {"all": optax.sgd(1e-3)}, layout=layout)
    update = ft.make_update(loss_fn, optim, accumulate=2, reduce="window")
    data = [{"x": X, "weight": np.arange(1.0, 9.0, dtype=np.float32), "scale": np.float32(1)}] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ft.fit(update, update.init(PARAMS), data, epochs=2, progress=False)
    told = [str(each.message) for each in caught]
    assert len(told) == is_told
    for each in told:
        assert each.startswith("reduce='window' computes another loss than the whole batch has, the mean of those of 4")
        advice = (
            "or leave reduce='window' out" if loss_fn is masked else "leave reduce='window' out, or return a sum as"
        )
        assert advice in each
