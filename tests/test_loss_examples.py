"""The examples with several losses: WGAN-GP and the four ways of multi_loss, against numbers worked out by hand."""

import importlib
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from PIL import Image

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    """Imports an example by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module


def adam_counts(state):
    """The steps that the Adam of each part has made."""

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    found = {part: jax.tree.leaves(of_part, is_leaf=is_adam) for part, of_part in state.opt_state.items()}
    return {part: [int(node.count) for node in nodes if is_adam(node)] for part, nodes in found.items()}


# WGAN-GP.


@pytest.fixture(scope="module")
def gan(example, tmp_path_factory):
    """A short run of whole scans and a cycle that is cut short."""
    wgan_gp, out = example("wgan_gp"), tmp_path_factory.mktemp("gan") / "new" / "digits.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgan_gp, "STEPS_A_SCAN", 400)
        results = wgan_gp.main(["--steps", "1210", "--out", str(out)])
    return results, out


def test_every_fourth_step_is_the_generators(gan):
    state = gan[0]["state"]
    assert (int(state.step), int(state.batches)) == (1210, 1210)
    assert adam_counts(state) == {"discriminator": [1210 - 302], "generator": [302]}  # 1210 // 4 = 302.


def test_generated_digits_are_of_all_kinds_and_more_like_digits_than_mixtures_are(gan):
    results, _ = gan
    confidence = {name: results[name]["confidence"] for name in ("two real ones mixed", "generated", "real")}
    assert list(confidence.values()) == sorted(confidence.values())
    assert results["generated"]["classes"] >= 8
    assert results["real"]["classes"] == 10
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(results["state"].params))


def test_the_picture_shows_200_digits_in_squares_with_black_borders(gan):
    with Image.open(gan[1]) as image:
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", "L", (800, 400))
        squares = np.asarray(image)[::4, ::4].reshape(10, 10, 20, 10).swapaxes(1, 2).reshape(200, 10, 10)
    assert not squares[:, [0, -1]].any()
    assert not squares[:, :, [0, -1]].any()
    assert np.all(squares.max(axis=(1, 2)) > 127)
    assert len(np.unique(squares, axis=0)) == 200


def numpy_scores(params, images):
    """The scores of a discriminator, and of each image the norm of its gradient, by the chain rule."""
    kernels, biases = zip(*((np.float64(of["kernel"][...]), np.float64(of["bias"][...])) for of in params), strict=True)
    first = images.reshape(len(images), -1) @ kernels[0] + biases[0]
    second = np.maximum(first, 0) @ kernels[1] + biases[1]
    scores = np.maximum(second, 0) @ kernels[2] + biases[2]
    slopes = (((second > 0) * kernels[2].T) @ kernels[1].T * (first > 0)) @ kernels[0].T
    return scores[:, 0], np.linalg.norm(slopes, axis=1)


@pytest.mark.parametrize("variant", ["published", "nemo"])
def test_the_discriminators_loss_is_that_of_the_paper_or_of_nemo(example, tmp_path, monkeypatch, variant):
    wgan_gp = example("wgan_gp")
    made = []
    make_update = wgan_gp.ft.make_update
    monkeypatch.setattr(wgan_gp.ft, "make_update", lambda *given: made.append(given) or make_update(*given))
    arguments = ["--variant", variant, "--steps", "7", "--out", str(tmp_path / "7.png")]
    state = wgan_gp.main(arguments)["state"]
    assert adam_counts(state) == {"discriminator": [6], "generator": [1]}

    (schedule, _), real = made[0], np.random.default_rng(0).random((16, 8, 8, 1), np.float32)
    key = jax.random.key(5)
    loss = schedule.phases[0].loss_fn(state.params, real, key)

    z_key, mix_key = jax.random.split(key)
    g, d = ([state.params[name][f"linear{i}"] for i in (1, 2, 3)] for name in ("generator", "discriminator"))
    x = np.float64(jax.random.normal(z_key, (16, 32)))
    for layer in g[:2]:
        x = np.maximum(x @ layer["kernel"][...] + layer["bias"][...], 0)
    fake = (1 / (1 + np.exp(-(x @ g[2]["kernel"][...] + g[2]["bias"][...])))).reshape(16, 8, 8, 1)
    share = np.float64(jax.random.uniform(mix_key, (16, 1, 1, 1)))
    mixed = share * real + (1 - share) * fake
    scored_mixed, norms = numpy_scores(d, mixed)
    first, weight = (numpy_scores(d, fake)[0], 10) if variant == "published" else (scored_mixed, 3)
    expected = first.mean() - numpy_scores(d, real)[0].mean() + weight * np.mean((norms - 1) ** 2)
    np.testing.assert_allclose(float(loss.value), expected, rtol=1e-5)  # float32, where the norms are about 1 or less.


# Two losses on one encoder.


@pytest.fixture(scope="module")
def modes(example):
    return example("multi_loss").main(["--epochs", "4"])


def test_each_mode_learns_both_losses(modes):
    for results in modes.values():
        assert results["accuracy"] > 0.5  # Chance is 0.1.
        assert results["main"] < np.log(10)  # Of a classifier that knows nothing.
        assert results["aux"] < 0.1


def test_each_mode_begins_with_the_gradients_that_it_says(example, modes):
    multi_loss = example("multi_loss")
    batch = next(multi_loss.load()[0].epoch(0))
    params = multi_loss.init(jax.random.key(0))
    main = jax.grad(lambda params: multi_loss.main_loss(params, batch).value)(params)
    aux = jax.grad(multi_loss.aux_loss)(params, batch)
    norm = jnp.linalg.norm
    both = {"head": norm(main["head"]), "decoder": norm(aux["decoder"])}
    expected = {
        "summed": {**both, "encoder": norm(main["encoder"] + 0.3 * aux["encoder"]), "decoder": 0.3 * both["decoder"]},
        "routed": {**both, "encoder": norm(main["encoder"])},
        "alternating": {"main/encoder": norm(main["encoder"]), "main/head": both["head"]},
        "PCGrad": both,
    }
    for mode, norms in expected.items():
        seen = modes[mode]["norms"][0]
        assert {part: seen[part] for part in norms} == pytest.approx(jax.tree.map(float, norms), rel=1e-5)
    assert set(modes["alternating"]["norms"][0]) == {"main/encoder", "main/head", "aux/encoder", "aux/decoder"}


# PCGrad.


def as_lists(tree):
    return jax.tree.map(lambda leaf: leaf.tolist(), tree)


def test_pcgrad_of_two_vectors_worked_out_by_hand(example):
    pcgrad = example("multi_loss").pcgrad
    # Their product is -1: a gains 1/2 of b, as |b|^2 = 2, and b gains the whole of a, as |a|^2 = 1.
    projected = pcgrad({"a": {"w": jnp.array([1.0, 0.0])}, "b": {"w": jnp.array([-1.0, 1.0])}})
    assert as_lists(projected) == {"a": {"w": [0.5, 0.5]}, "b": {"w": [0.0, 1.0]}}


def test_pcgrad_sees_one_vector_in_all_leaves_of_a_tree(example):
    pcgrad = example("multi_loss").pcgrad
    # The product is 4 - 3 = 1: no conflict, though there is one in the second leaf.
    grads = {
        "a": {"v": jnp.array([2.0]), "w": jnp.array([[3.0]])},
        "b": {"v": jnp.array([2.0]), "w": jnp.array([[-1.0]])},
    }
    assert as_lists(pcgrad(grads)) == as_lists(grads)


def test_pcgrad_takes_no_harm_from_a_gradient_of_zero(example):
    grads = {"a": jnp.array([1.0, 0.0]), "b": jnp.zeros(2)}
    assert as_lists(example("multi_loss").pcgrad(grads)) == {"a": [1.0, 0.0], "b": [0.0, 0.0]}


FLOATS = st.floats(-1000, 1000, width=32).map(lambda value: value if abs(value) > 1e-3 else 0.0)
VECTORS = st.lists(FLOATS, min_size=5, max_size=5).map(lambda values: np.array(values, np.float32))


@hypothesis.given(VECTORS, VECTORS)
def test_after_pcgrad_no_gradient_points_against_the_other(example, a, b):
    projected = example("multi_loss").pcgrad({"a": jnp.asarray(a), "b": jnp.asarray(b)})
    after = {name: np.asarray(vector, np.float64) for name, vector in projected.items()}
    a, b = np.float64(a), np.float64(b)
    # Each product of 5 terms is rounded 10 times at most, and what is subtracted as often again.
    eps = 32 * np.finfo(np.float32).eps * np.linalg.norm(a) * np.linalg.norm(b)
    assert after["a"] @ b >= -eps
    assert after["b"] @ a >= -eps
    assert after["a"] @ after["b"] >= -eps
    if a @ b > eps:
        assert np.array_equal(after["a"], a)
        assert np.array_equal(after["b"], b)
