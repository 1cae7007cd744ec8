"""Losses in 16 bits: casts by part, and the scale of a float16 loss."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from linear import batches_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


@pytest.mark.parametrize("compute_dtype", [jnp.bfloat16, {"body": jnp.bfloat16}])
def test_parameters_are_cast_for_the_loss_alone(compute_dtype):
    params = linear_params()
    seen = {}

    def dtypes(params, batch):
        seen.update({path: leaf.dtype for path, leaf in ft.flatten(params).items()})
        return loss_fn(params, batch).astype(jnp.float32)

    update = ft.make_update(dtypes, optimizer_of(params), compute_dtype=compute_dtype, accumulate=2)
    state, _ = run(update, update.init(params), batches_of(3))
    head = jnp.float32 if isinstance(compute_dtype, dict) else jnp.bfloat16
    assert seen == {"body/w": jnp.bfloat16, "head/w": head}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.window))} == {jnp.dtype(jnp.float32)}
    exact = ft.make_update(loss_fn, optimizer_of(params), accumulate=2)
    expected, _ = run(exact, exact.init(params), batches_of(3))
    # bfloat16 has 8 bits: gradients of size 1, of rounded numbers, are off by some 2^-7, and the rate is 0.1.
    np.testing.assert_allclose(state.params["head"]["w"], expected.params["head"]["w"], atol=0.1 * 2**-5)
    assert not jnp.array_equal(state.params["head"]["w"], expected.params["head"]["w"])


def test_a_dynamic_scale_rescues_gradients_that_float16_would_lose():
    params = {"w": jnp.float32(1.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(1.0)})

    def tiny(params, batch):
        # The gradient of the float16 product is 2^-26, which float16 rounds to zero.
        return (params["w"] * batch[0] * batch[1]).astype(jnp.float32)

    for scale, expected in ((None, 0.0), (ft.DynamicScale(initial=2.0**12), 2.0**-26)):
        update = ft.make_update(tiny, optim, compute_dtype=jnp.float16, loss_scale=scale)
        _, metrics = update.measured(update.init(params), jnp.full(2, 2.0**-13, jnp.float16))
        assert float(metrics["parts"]["w"]["grad_norm"]) == expected


def test_a_dynamic_scale_halves_on_overflow_and_doubles_after_a_row_of_good_updates():
    params = {"w": jnp.float32(1.0)}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.0)})
    update = ft.make_update(
        lambda params, batch: (params["w"] * batch).astype(jnp.float32), optim,
        compute_dtype=jnp.float16, loss_scale=ft.DynamicScale(initial=2.0**14, period=2),
    )  # fmt: skip
    state, seen = update.init(params), []
    for x in (1.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0):  # 2^15 * 4 and 2^14 * 4 are more than float16's 65504.
        state, metrics = update(state, jnp.float16(x))
        seen.append((int(np.log2(metrics["loss_scale"])), int(metrics["skipped"])))
        assert float(metrics["loss"]) == x
    assert seen == [(14, 0), (14, 0), (15, 0), (15, 1), (14, 1), (13, 0), (13, 0)]
    assert float(state.scale_state.scale) == 2.0**14


def test_a_scale_never_falls_below_its_minimum_nor_overflows_itself():
    scale = ft.DynamicScale(initial=2.0, period=1, minimum=1.0)
    state = scale.init()
    for expected in (1.0, 1.0):
        state = scale.adjusted(state, jnp.array(False))
        assert float(state.scale) == expected
    state = ft.DynamicScale(initial=2.0**127, period=1).init()
    assert float(scale.adjusted(state, jnp.array(True)).scale) == 2.0**127


# Batches


def seen_of(batch, cast=None, *, compute_dtype=jnp.bfloat16, **options):
    """The dtypes of a batch's leaves as the loss function sees them, by path."""
    params, seen = {"w": jnp.ones(2)}, {}

    def loss_fn(params, batch):
        seen.update({path: str(leaf.dtype) for path, leaf in ft.flatten(batch).items()})
        return jnp.sum(params["w"]).astype(jnp.float32)

    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.1)})
    options |= {} if cast is None else {"cast_batch": cast}
    update = ft.make_update(loss_fn, optim, compute_dtype=compute_dtype, **options)
    update(update.init(params), batch)
    return seen


BATCH = {
    "image": jnp.ones((4, 2)), "target": jnp.ones(4), "weight": jnp.ones(4), "label": jnp.arange(4),
    "wave": jnp.ones(4, jnp.complex64), "key": jax.random.split(jax.random.key(0), 4), "half": jnp.ones(4, jnp.float16),
}  # fmt: skip
AS_GIVEN = {name: str(leaf.dtype) for name, leaf in BATCH.items()}
CAST = {"image": "bfloat16", "target": "bfloat16", "half": "bfloat16"}


def test_the_floating_point_leaves_of_a_batch_are_cast_with_the_parameters():
    assert seen_of(BATCH) == AS_GIVEN | CAST
    assert seen_of(BATCH, microbatches=2) == AS_GIVEN | CAST
    assert seen_of(BATCH, compute_dtype={"w": jnp.bfloat16}) == AS_GIVEN | CAST


@pytest.mark.parametrize(
    ("cast", "which"),
    [(True, CAST), (False, {}), ("image", {"image": "bfloat16"}),
     (["image", "weight"], dict.fromkeys(["image", "weight"], "bfloat16"))],
)  # fmt: skip
def test_cast_batch_says_which(cast, which):
    assert seen_of(BATCH, cast) == AS_GIVEN | which


@pytest.mark.parametrize("compute_dtype", [None, jnp.float32, {"w": None}])
def test_a_batch_is_left_alone_where_nothing_is_computed_in_16_bits(compute_dtype):
    assert seen_of(BATCH, compute_dtype=compute_dtype) == AS_GIVEN


def test_a_selector_that_takes_no_leaf_of_the_batch_is_an_error():
    message = "cast_batch: no leaf matches 'imgae'; did you mean 'image' (1 leaf)?; it says which leaves of a batch"
    with pytest.raises(ft.UpdateError, match=re.escape(message)):
        seen_of(BATCH, "imgae")


def test_two_dtypes_of_16_bits_are_an_error_as_a_batch_has_one():
    dtypes, params = {"body": jnp.bfloat16, "head": jnp.float16}, linear_params()
    with pytest.raises(ft.UpdateError, match="compute_dtype has 'bfloat16', 'float16', and a batch can be cast to one"):
        ft.make_update(loss_fn, optimizer_of(params), compute_dtype=dtypes)
    ft.make_update(loss_fn, optimizer_of(params), compute_dtype=dtypes, cast_batch=False)


# What does nothing is told


def in_float32(params, batch):
    return loss_fn(params, batch.astype(jnp.float32))


def looped(params, batch):
    hidden, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x), x @ params["body"]["w"]), batch, length=2)
    return jnp.mean(hidden @ params["body"]["w"] @ params["head"]["w"]) ** 2


def told_of(loss, calls=2, **options):
    """What is warned of over some calls."""
    params = linear_params()
    options = {"compute_dtype": jnp.bfloat16, "audit": False} | options

    def widened(params, batch):
        return loss(params, batch).astype(jnp.float32)

    update = ft.make_update(widened, optimizer_of(params), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, _ = run(update, update.init(params), batches_of(calls))
        if int(state.pending):
            update.flush(state)
    told = [warning for warning in caught if "compute_dtype" in str(warning.message)]
    assert all(warning.filename in (__file__, run.__code__.co_filename) for warning in told)
    return [str(warning.message) for warning in told]


@pytest.mark.parametrize("loss", [loss_fn, looped])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"microbatches": 2}])
def test_a_loss_without_a_matrix_product_in_16_bits_is_warned_of_once(loss, options):
    (told,) = told_of(loss, calls=4, cast_batch=False, **options)
    assert told.startswith("compute_dtype=bfloat16 does nothing for 'widened': all ")
    size = 3 if "microbatches" in options else 6
    assert f"have an operand of 32 bits, as the first of float32[{size}, 4] and bfloat16[4, 3]: they begin at" in told
    assert told.endswith("let the batch be cast, not cast_batch=False; or leave compute_dtype out")


@pytest.mark.parametrize("loss", [loss_fn, looped])
def test_a_loss_in_16_bits_is_not_warned_of(loss):
    assert told_of(loss) == []
    assert told_of(loss, compute_dtype=None) == []
    assert told_of(lambda params, batch: jnp.sum(params["body"]["w"]) + jnp.sum(params["head"]["w"])) == []


def line_of(loss):
    """The line after that of the `def`."""
    return f"they begin at {__file__}:{loss.__code__.co_firstlineno + 1}, in {loss.__name__}"


def with_a_constant(params, batch):
    return loss_fn(params, batch * np.ones(4, np.float32))


def test_the_line_is_told_at_which_32_bits_begin():
    (told,) = told_of(in_float32)
    assert f"{line_of(in_float32)}, which makes them of bfloat16; cast to 16 bits there; or leave" in told


def test_only_what_is_of_32_bits_is_told_to_be_cast():
    (told,) = told_of(with_a_constant)
    assert line_of(with_a_constant) in told
    assert told.endswith("cast constants in the loss function; or leave compute_dtype out")
    assert "cast_batch" not in told
    (told,) = told_of(loss_fn, compute_dtype={"head": jnp.bfloat16}, cast_batch=False)
    assert "not cast_batch=False; give their part a compute_dtype; or leave" in told


class Language(nnx.Module):
    def __init__(self, rngs, **options):
        self.tokens = nnx.Embed(5, 4, rngs=rngs, **options)
        self.norm, self.out = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.norm(self.tokens(ids)))


def test_an_embedding_of_flax_that_casts_to_float32_is_told_to_be_given_a_dtype():
    def told(**options):
        graphdef, params = nnx.split(Language(nnx.Rngs(0), **options))

        def loss_fn(params, ids):
            return jnp.mean(nnx.merge(graphdef, params)(ids).astype(jnp.float32) ** 2)

        optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
        update = ft.make_update(loss_fn, optim, compute_dtype=jnp.bfloat16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            update(update.init(params), jnp.arange(5))
        assert all(each.filename == __file__ for each in caught)
        return [str(each.message) for each in caught]

    (warned,) = told()
    assert (
        f"{line_of(Language.__call__)}, which makes them of bfloat16; give the layer of Flax there its dtype" in warned
    )
    assert "nnx.Embed(..., dtype=jnp.bfloat16); or leave compute_dtype out" in warned
    assert "cast_batch" not in warned
    assert "constants" not in warned
    assert told(dtype=jnp.bfloat16) == []


def test_a_convolution_counts_as_a_matrix_product():
    signal = jnp.ones((2, 1, 8))

    def convolved(params, batch):
        kernel = params["w"].astype(batch.dtype)
        return jnp.mean(jax.lax.conv_general_dilated(batch, kernel, (1,), "SAME").astype(jnp.float32))

    params = {"w": jnp.ones((3, 1, 5))}
    optim = ft.Optimizer(ft.partition(params, {"w": "w"}), {"w": optax.sgd(0.1)})
    for cast_batch, count in ((True, 0), (False, 1)):
        update = ft.make_update(convolved, optim, compute_dtype=jnp.bfloat16, cast_batch=cast_batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            update(update.init(params), signal)
        assert len(caught) == count


def test_each_phase_is_looked_at():
    params = linear_params()
    phases = [
        ft.Phase("one", lambda params, batch: loss_fn(params, batch).astype(jnp.float32), "body"),
        ft.Phase("two", lambda params, batch: in_float32(params, batch), "head"),
    ]
    update = ft.make_update(ft.alternate(*phases), optimizer_of(params), compute_dtype=jnp.bfloat16)
    with pytest.warns(UserWarning, match="compute_dtype=bfloat16 does nothing"):
        run(update, update.init(params), batches_of(2))


def test_the_check_traces_nothing_twice():
    params, traces = linear_params(), []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch).astype(jnp.float32)

    update = ft.make_update(counted, optimizer_of(params), compute_dtype=jnp.bfloat16)
    run(update, update.init(params), batches_of(3))
    assert len(traces) == 1
