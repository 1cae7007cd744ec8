import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functrain as ft


def test_the_first_of_a_window_costs_no_addition():
    jaxpr = jax.make_jaxpr(lambda g: ft.accumulate(None, g).sums)({"a": jnp.ones(3)})
    assert not jaxpr.eqns


def test_total_is_burns_plain_sum():
    acc = None
    for i in range(4):
        acc = ft.accumulate(acc, {"w": jnp.full(2, float(i))})
    np.testing.assert_array_equal(acc.total()["w"], [6.0, 6.0])


@pytest.mark.slow
def test_mean_of_microbatches_is_the_gradient_of_their_union():
    """Also when they differ in the number of unmasked tokens, as in a batch of sentences."""
    key = jax.random.key(0)
    tokens = jax.random.normal(key, (8, 5, 3))
    mask = jnp.arange(5) < jnp.array([5, 1, 3, 2, 5, 4, 1, 2])[:, None]

    def loss_fn(params, batch):
        tokens, mask = batch
        losses = jnp.tanh(tokens @ params["w"]) ** 2
        return ft.Loss(jnp.sum(losses * mask) / jnp.sum(mask), weight=jnp.sum(mask))

    with jax.enable_x64():
        params = {"w": jnp.array([0.3, -0.2, 0.5], jnp.float64)}
        tokens = tokens.astype(jnp.float64)
        train_step = ft.make_train_step(loss_fn)
        whole, _ = train_step(params, (tokens, mask))
        acc = None
        for rows in (slice(0, 1), slice(1, 3), slice(3, 8)):
            grads, loss = train_step(params, (tokens[rows], mask[rows]))
            acc = ft.accumulate(acc, grads, weight=loss.weight)
        assert float(acc.weights["w"]) == 23
        # Sums of 23 float64 terms in another order.
        np.testing.assert_allclose(acc.mean()["w"], whole["w"], rtol=23 * 2.0**-52)


@pytest.mark.parametrize("weight", [0, 0.0, jnp.float32(0), np.float32(0)])
def test_a_weight_of_zero_adds_nothing_even_if_the_gradient_is_nan(weight):
    acc = ft.accumulate(None, {"w": jnp.array([jnp.nan, 1.0])}, weight=weight)
    np.testing.assert_array_equal(acc.mean()["w"], [0.0, 0.0])
    acc = ft.accumulate(acc, {"w": jnp.array([1.0, 2.0])}, weight=2)
    np.testing.assert_array_equal(acc.mean()["w"], [1.0, 2.0])


def test_an_empty_accumulator_has_zero_gradients():
    np.testing.assert_array_equal(ft.zeros({"w": jnp.ones(2)}).mean()["w"], [0.0, 0.0])


def test_parts_accumulate_over_windows_of_their_own():
    acc = ft.zeros({"critic": {"w": jnp.ones(2)}, "actor": {"w": jnp.ones(2)}})
    for i in range(3):
        acc = ft.accumulate(acc, {"critic": {"w": jnp.full(2, float(i))}}, weight=2)
    acc = ft.accumulate(acc, {"actor": {"w": jnp.full(2, 5.0)}})
    assert {part: float(weight) for part, weight in acc.weights.items()} == {"critic": 6.0, "actor": 1.0}
    np.testing.assert_array_equal(acc.mean()["critic"]["w"], [1.0, 1.0])
    np.testing.assert_array_equal(acc.mean()["actor"]["w"], [5.0, 5.0])


def test_a_part_may_come_for_the_first_time_in_a_later_batch():
    acc = ft.accumulate(None, {"critic": {"w": jnp.full(2, 1.0)}}, weight=3)
    acc = ft.accumulate(acc, {"critic": {"w": jnp.full(2, 5.0)}, "actor": {"w": jnp.full(2, 7.0)}}, weight=1)
    acc = ft.accumulate(acc, {"actor": {"w": jnp.full(2, 1.0)}}, weight=2)
    assert {part: float(weight) for part, weight in acc.weights.items()} == {"actor": 3.0, "critic": 4.0}
    np.testing.assert_array_equal(acc.mean()["critic"]["w"], [2.0, 2.0])
    np.testing.assert_array_equal(acc.mean()["actor"]["w"], [3.0, 3.0])


@pytest.mark.parametrize("tree", [jnp.ones(2), [jnp.ones(2), (jnp.ones(3),)], {"a": None, "b": jnp.ones(1)}])
def test_any_pytree_can_be_accumulated(tree):
    acc = ft.accumulate(ft.accumulate(None, tree, weight=1), tree, weight=3)
    assert jax.tree.structure(acc.mean()) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, acc.mean(), tree))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_of_16_bit_gradients_are_float32(dtype):
    # 2048 + 1 is 2048 in float16, and 256 + 1 is 256 in bfloat16.
    grads = {"w": jnp.ones(1, dtype)}
    assert ft.zeros(grads).sums["w"].dtype == jnp.float32
    acc = ft.accumulate(None, {"w": jnp.full(1, 2048, dtype)})
    acc = ft.accumulate(acc, grads)
    assert acc.total()["w"].dtype == jnp.float32
    assert float(acc.total()["w"][0]) == 2049.0


@pytest.mark.parametrize("weight", [1, 2.5, jnp.float32(3), jnp.int32(4)])
def test_every_way_to_start_a_window_gives_the_same_type(weight):
    grads = {"w": jnp.ones(2, jnp.bfloat16), "b": {"x": jnp.ones(3)}}
    empty, first = ft.zeros(grads), ft.accumulate(None, grads, weight=weight)
    later = ft.accumulate(empty, grads, weight=weight)
    types = [jax.tree.map(jax.typeof, acc) for acc in (empty, first, later)]
    assert types[0] == types[1] == types[2]


def test_zeros_of_shapes():
    acc = ft.zeros({"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)})
    assert acc.sums["w"].shape == (2, 3)
    assert acc.sums["w"].dtype == jnp.float32


def test_accumulators_are_laid_out_as_the_gradients_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    grads = {"w": jax.device_put(jnp.ones((16, 4), jnp.bfloat16), sharding)}
    abstract = {"w": jax.ShapeDtypeStruct((16, 4), jnp.bfloat16, sharding=sharding)}
    accumulate = jax.jit(ft.accumulate)
    for acc in (
        ft.zeros(grads),
        ft.zeros(abstract),
        ft.accumulate(None, grads),
        accumulate(None, grads, weight=3),
        accumulate(ft.zeros(grads), grads, weight=3),
    ):
        assert acc.sums["w"].sharding.is_equivalent_to(sharding, 2)
        assert acc.mean()["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.slow
def test_a_hand_written_loop_under_one_jit_with_scan():
    """take, Optimizer, accumulate and zeros, with nothing else: as a user's own program has them."""
    params = {"encoder": {"w": jnp.ones((4, 4))}, "head": {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}}
    parts = ft.partition(params, {"bias": "head/b", "rest": ...})
    optim = ft.Optimizer(parts, {"bias": ft.with_lr(optax.sgd, 0.1), "rest": optax.adam(1e-2)})
    # Three times the same window of (microbatches, examples, features), so that the loss must fall.
    batches = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (4, 8, 4)), (3, 4, 8, 4))

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["encoder"]["w"]) @ params["head"]["w"] + params["head"]["b"] - 1) ** 2)

    @jax.jit
    def train(params, opt_state, batches):
        def window(carry, microbatches):
            params, opt_state = carry

            def microbatch(acc, x):
                bias, rest = ft.take(jax.grad(loss)(params, x), "head/b")
                return ft.accumulate(acc, {"bias": bias, "rest": rest}), loss(params, x)

            acc, losses = jax.lax.scan(microbatch, ft.zeros(parts.split(params)), microbatches)
            return optim.step(params, acc.mean(), opt_state), losses.mean()

        return jax.lax.scan(window, (params, opt_state), batches)

    (trained, opt_state), losses = train(params, optim.init(params), batches)

    tx = optax.multi_transform({"bias": optax.sgd(0.1), "rest": optax.adam(1e-2)}, parts.labels())
    expected, state = params, tx.init(params)
    for microbatches in batches:
        updates, state = tx.update(jax.grad(loss)(expected, microbatches.reshape(32, 4)), state, expected)
        expected = optax.apply_updates(expected, updates)
    assert losses[-1] < losses[0]
    assert int(opt_state["rest"][0].count) == 3
    # A mean of four float32 means against one over all: last bits of gradients, which Adam scales to steps of 0.01.
    for path, leaf in ft.flatten(trained).items():
        np.testing.assert_allclose(leaf, ft.flatten(expected)[path], atol=1e-5, err_msg=path)


@pytest.mark.parametrize("weight", [-1, -0.5, np.float32(-2), np.array(-3)])
def test_a_negative_weight_is_an_error_also_under_jit(weight):
    grads = {"w": jnp.ones(2)}
    with pytest.raises(ft.LossError, match="is negative: give the number of examples or tokens in the mean"):
        ft.accumulate(None, grads, weight=weight)
    with pytest.raises(ft.LossError, match="is negative"):
        jax.jit(lambda g: ft.accumulate(None, g, weight=weight))(grads)


def test_a_weight_for_each_example_is_an_error():
    with pytest.raises(ft.LossError, match=r"not an array of shape \(4,\): sum it"):
        ft.accumulate(None, {"w": jnp.ones(2)}, weight=jnp.ones(4))


@pytest.mark.parametrize(
    ("acc", "grads", "message"),
    [
        ({"a": {"w": jnp.ones(2)}}, {"a": {"v": jnp.ones(2)}}, "of part 'a' do not fit .* lacks 'w' and has 'v'"),
        ({"a": {"w": jnp.ones(2)}}, {"a": {"w": jnp.ones(3)}}, r"of part 'a' .*: 'w' has shape \(3,\), its sum \(2,\)"),
        ([jnp.ones(2)], (jnp.ones(2),), "do not fit the accumulator: .* node types"),
        ([jnp.ones(2)], {"a": jnp.ones(2)}, "do not fit the accumulator: the tree lacks '0' and has 'a'"),
        ({"a": jnp.ones(2)}, [jnp.ones(2)], "do not fit the accumulator: the tree lacks 'a' and has '0'"),
    ],
)
def test_gradients_of_another_structure_are_an_error_that_says_what_differs(acc, grads, message):
    with pytest.raises(ft.AccumulationError, match=message):
        ft.accumulate(ft.accumulate(None, acc), grads)
