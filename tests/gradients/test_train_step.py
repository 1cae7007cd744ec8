import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import functrain as ft


def params_of(dtype=jnp.float32):
    return {"encoder": {"w": jnp.asarray([1.0, 2.0], dtype)}, "head": {"w": jnp.asarray([3.0, 4.0], dtype)}}


def parts_of(params):
    return ft.partition(params, {"encoder": "encoder", "head": "head"})


def product(params, batch):
    return jnp.sum(params["encoder"]["w"] * params["head"]["w"]) * batch


def test_gradients_without_a_partition_are_a_tree_like_params():
    params = params_of()
    grads, loss = ft.make_train_step(product)(params, 2.0)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    np.testing.assert_array_equal(grads["encoder"]["w"], [6.0, 8.0])
    assert isinstance(loss, ft.Loss)
    assert float(loss.value) == 22.0


def test_gradients_with_a_partition_are_split_and_of_the_wanted_parts_alone():
    params = params_of()
    grads, _ = ft.make_train_step(product, parts_of(params), wrt=("head",))(params, 1.0)
    assert list(grads) == ["head"]
    np.testing.assert_array_equal(grads["head"]["head/w"], [1.0, 2.0])
    same, _ = ft.make_train_step(product, parts_of(params), wrt="head")(params, 1.0)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, same, grads))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_each_gradient_has_its_parameters_dtype(dtype):
    params = params_of(dtype)
    grads, _ = ft.make_train_step(product, parts_of(params))(params, jnp.asarray(1.0, dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_frozen_parts_may_hold_anything_that_has_no_gradient():
    params = {"w": jnp.ones(2), "steps": jnp.int32(3), "activation": jnp.tanh, "key": jax.random.key(0)}
    parts = ft.partition(params, {"static": ft.non_float, "rest": ...})
    train_step = ft.make_train_step(lambda p, b: jnp.sum(p["activation"](p["w"])) * p["steps"], parts, wrt="rest")
    grads, _ = train_step(params, None)
    np.testing.assert_allclose(grads["rest"]["w"], 3 * (1 - np.tanh(1.0) ** 2) * np.ones(2), rtol=1e-6)


def mlp_loss(params, batch):
    x = batch
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer)
    return jnp.mean(x**2)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_frozen_part_costs_no_backward_pass_and_does_not_count_in_the_norm(clip_norm):
    params = {"layers": [jnp.full((64, 64), 0.1) for _ in range(8)]}
    batch = jnp.ones((32, 64))
    parts = ft.partition(params, {"body": "layers/[0-3]", "head": ...})
    optim = ft.Optimizer(parts, {"body": ft.FROZEN, "head": optax.sgd(0.1)}, clip_norm=clip_norm)
    train_step = ft.make_train_step(mlp_loss, parts, wrt=optim.trained)

    def step(params, batch):
        grads, _ = train_step(params, batch)
        return optim.step(params, grads, optim.init(params))[0]

    def by_hand(params, batch):
        """The second half alone is differentiated; the first is a constant."""
        tx = optax.sgd(0.1) if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), optax.sgd(0.1))
        body, head = params["layers"][:4], params["layers"][4:]
        grads = jax.grad(lambda head: mlp_loss({"layers": body + head}, batch))(head)
        updates, _ = tx.update(grads, tx.init(head), head)
        return {"layers": body + optax.apply_updates(head, updates)}

    def of_all(params, batch):
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.multi_transform({"body": optax.set_to_zero(), "head": optax.sgd(0.1)}, parts.labels()),
        )
        updates, _ = tx.update(jax.grad(mlp_loss)(params, batch), tx.init(params), params)
        return optax.apply_updates(params, updates)

    # Clipping is written in other elementwise operations than optax's: within 1 %, of which a matmul would be 10 %.
    assert flops(step, params, batch) == pytest.approx(flops(by_hand, params, batch), rel=0.01)
    if clip_norm:
        assert flops(of_all, params, batch) > 1.4 * flops(step, params, batch)


def test_the_loss_function_is_given_what_it_declares_and_nothing_else():
    def loss_fn(params, batch, *, key, step=None):
        return ft.Loss(jnp.sum(params) * batch, metrics={"noise": jax.random.uniform(key), "step": step})

    train_step = ft.make_train_step(loss_fn)
    _, loss = train_step(jnp.ones(2), 1.0, key=jax.random.key(1), model_state="not declared, so not looked at", step=7)
    assert float(loss.metrics["noise"]) == float(jax.random.uniform(jax.random.key(1)))
    assert loss.metrics["step"] == 7
    _, loss = train_step(jnp.ones(2), 1.0, key=jax.random.key(1))
    assert loss.metrics["step"] is None


def test_a_loss_function_with_kwargs_is_given_all_there_is():
    def loss_fn(params, batch, **context):
        return ft.Loss(jnp.sum(params), metrics={"given": len(context)})

    assert ft.make_train_step(loss_fn)(jnp.ones(2), None, key=jax.random.key(0), step=1)[1].metrics["given"] == 2


def test_named_losses_are_summed():
    """Catalyst 2: cross entropy and binary cross entropy on one set of logits."""
    batch, classes = 4, 10
    labels = jnp.array([1, 3, 5, 9])

    def loss_fn(logits, labels):
        onehot = jax.nn.one_hot(labels, classes)
        return ft.Loss(
            {
                "ce": optax.softmax_cross_entropy(logits, onehot).mean(),
                "bce": optax.sigmoid_binary_cross_entropy(logits, onehot).mean(),
            }
        )

    with jax.enable_x64():
        grads, loss = ft.make_train_step(loss_fn)(jnp.zeros((batch, classes), jnp.float64), labels)
        # float64 has 16 digits; a sum of ten terms may lose one.
        assert float(loss.total) == pytest.approx(2.995732273553991, rel=1e-15)
        assert float(loss.value["ce"]) == pytest.approx(np.log(10), rel=1e-15)
        assert float(loss.value["bce"]) == pytest.approx(np.log(2), rel=1e-15)
        expected = np.full((batch, classes), 0.15 / batch)
        expected[np.arange(batch), labels] = -0.95 / batch
        np.testing.assert_allclose(grads, expected, rtol=1e-14)


class BatchNormModel(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.linear(x)))


@pytest.mark.parametrize("with_parts", [False, True])
def test_flax_nnx_with_batch_norm(with_parts):
    graphdef, params, batch_stats = nnx.split(BatchNormModel(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    x = jax.random.normal(jax.random.key(0), (8, 3))

    def loss_fn(params, batch, *, model_state):
        model = nnx.merge(graphdef, params, model_state)
        value = jnp.mean(model(batch) ** 2)
        return ft.Loss(value, model_state=nnx.state(model, nnx.BatchStat))

    parts = ft.partition(params, {"frozen": "head", "rest": ...}) if with_parts else None
    train_step = jax.jit(ft.make_train_step(loss_fn, parts, wrt="rest" if with_parts else None))
    grads, loss = train_step(params, x, model_state=batch_stats)
    new_mean = ft.flatten(loss.model_state)["norm/mean"]
    activations = x @ params["linear"]["kernel"][...] + params["linear"]["bias"][...]
    # Momentum 0.5 from a mean of 0; a mean of 8 float32 values of size 1.
    np.testing.assert_allclose(new_mean, 0.5 * activations.mean(0), atol=1e-6)
    assert jax.tree.structure(loss.model_state) == jax.tree.structure(batch_stats)
    if with_parts:
        assert sorted(grads["rest"]) == ["linear/bias", "linear/kernel", "norm/bias", "norm/scale"]
    else:
        assert jax.tree.structure(grads) == jax.tree.structure(params)
    train_step(params, x, model_state=loss.model_state)
    assert train_step._cache_size() == 1


def test_model_state_that_is_not_returned_is_as_it_was():
    _, loss = ft.make_train_step(lambda p, b: jnp.sum(p))(jnp.ones(2), None, model_state={"mean": 3.0})
    assert loss.model_state == {"mean": 3.0}


def test_gradients_have_their_parameters_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    params = {
        "w": jax.device_put(jnp.ones((16, 4)), sharded),
        "b": jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P())),
    }
    parts = ft.partition(params, {"w": "w", "b": "b"})
    train_step = jax.jit(ft.make_train_step(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"])), parts))
    grads, _ = train_step(params, jnp.ones((5, 16)))
    assert grads["w"]["w"].sharding.is_equivalent_to(sharded, 2)
    assert grads["b"]["b"].sharding.is_fully_replicated


def returns(value):
    def loss_fn(params, batch):
        return value(params)

    return loss_fn


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (
            returns(lambda p: p),
            r"loss_fn returned an array of shape \(3,\): reduce it to a scalar, e.g. with .mean\(\)",
        ),
        (
            returns(lambda p: (p.sum(), {})),
            r"loss_fn returned a tuple: write Loss\(value, metrics=aux\) in the place of",
        ),
        (returns(lambda p: p.sum().astype(int)), "loss_fn returned int32: a loss must be a real floating-point scalar"),
        (returns(lambda p: "x"), r"loss_fn returned str: return a scalar, a Loss, or Loss\(\{name: scalar\}\)"),
        (returns(lambda p: ft.Loss({})), "loss_fn returned no loss: its dict of values is empty"),
        (returns(lambda p: ft.Loss({"a": p.sum(), "b": p})), r"loss_fn returned for 'b' an array of shape \(3,\)"),
        (returns(lambda p: ft.Loss(p.sum(), weight=-2)), "a weight of -2 is negative: give the number of examples"),
        (
            returns(lambda p: ft.Loss(p.sum(), weight=p)),
            r"one number for the batch, not an array of shape \(3,\): sum it",
        ),
    ],
)
def test_a_loss_that_cannot_be_minimised_is_an_error_that_says_what_to_return(loss_fn, message):
    with pytest.raises(ft.LossError, match=message):
        ft.make_train_step(loss_fn)(jnp.ones(3), None)


def test_an_unknown_required_argument_is_an_error_when_the_step_is_made():
    def loss_fn(params, batch, temperature):
        return params.sum()

    with pytest.raises(ft.LossError, match="loss_fn requires 'temperature', which functrain does not give"):
        ft.make_train_step(loss_fn)
    assert ft.make_train_step(functools.partial(loss_fn, temperature=1.0))


def test_a_loss_function_without_a_batch_is_an_error_when_the_step_is_made():
    with pytest.raises(ft.LossError, match=re.escape("must take (params, batch)")):
        ft.make_train_step(lambda params: params.sum())


def test_a_declared_argument_that_is_not_given_is_an_error():
    def loss_fn(params, batch, key):
        return params.sum()

    with pytest.raises(ft.LossError, match=re.escape("loss_fn declares 'key': call train_step(..., key=...)")):
        ft.make_train_step(loss_fn)(jnp.ones(2), None)


def test_a_leaf_without_gradient_in_a_differentiated_part_is_an_error_that_names_it():
    params = {"w": jnp.ones(2), "steps": jnp.int32(0)}
    parts = ft.partition(params, {"all": ...})
    with pytest.raises(ft.LossError, match=r"part 'all' holds 'steps', which is not floating point .*ft.non_float"):
        ft.make_train_step(lambda p, b: p["w"].sum(), parts)(params, None)
    with pytest.raises(ft.LossError, match="params hold 'steps'"):
        ft.make_train_step(lambda p, b: p["w"].sum())(params, None)


def test_wrt_must_name_parts_of_a_partition():
    with pytest.raises(ft.PartitionError, match="wrt: unknown part 'haed'; the parts are 'encoder', 'head'"):
        ft.make_train_step(product, parts_of(params_of()), wrt="haed")
    with pytest.raises(ft.LossError, match="wrt='head' needs a partition"):
        ft.make_train_step(product, wrt="head")
