"""A place for gradients: between the backward pass of a window and the optimizer, and of each example by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import batches_of, leaves_of, linear_params, loss_fn, optimizer_of, run

import functrain as ft

BATCHES = batches_of(6)


def two_losses(params, batch):
    features = jnp.tanh(batch @ params["body"]["w"])
    main = jnp.mean((features @ params["head"]["w"] - 1) ** 2)
    return ft.Loss({"main": main, "aux": jnp.mean(features**2)}, weight=len(batch))


def noisy(grads, *, key):
    return optax.tree.add_scale(grads, 0.1, optax.tree.random_like(key, grads, jax.random.normal))


def update_of(function=loss_fn, **options):
    params = linear_params()
    update = ft.make_update(function, optimizer_of(params), **options)
    return update, update.init(params, key=jax.random.key(3))


def phases(loss_fn=loss_fn):
    head, both = ft.Phase("head", loss_fn, "head"), ft.Phase("both", loss_fn, ["body", "head"], same_batch=True)
    return ft.alternate(head, both)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"microbatches": 2}], ids=str)
def test_a_function_that_changes_nothing_leaves_every_bit(options):
    plain, given = (run(*update_of(**options, **each), BATCHES) for each in ({}, {"gradients": lambda grads: grads}))
    assert leaves_of(given[0]) == leaves_of(plain[0])


def test_the_optimizer_and_telemetry_are_given_what_it_returns():
    update, state = update_of(gradients=lambda grads: grads | {"head": optax.tree.scale(0.0, grads["head"])})
    before = np.asarray(state.params["head"]["w"])
    state, metrics = update.measured(state, BATCHES[0])
    assert (np.asarray(state.params["head"]["w"]) == before).all()
    assert metrics["parts"]["head"]["grad_norm"] == 0 < metrics["parts"]["body"]["grad_norm"]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
def test_it_has_a_key_of_its_own_for_each_step_however_the_steps_are_called(options):
    seen = []

    def record(grads, *, key, step):
        jax.debug.callback(lambda *each: seen.append((int(each[1]), each[0].tobytes())), jax.random.key_data(key), step)
        return noisy(grads, key=key)

    one, _ = run(*update_of(gradients=record, **options), BATCHES)
    update, state = update_of(gradients=record, **options)
    scanned, _ = update.scan(state, BATCHES)
    jax.effects_barrier()
    assert leaves_of(scanned) == leaves_of(one)
    steps = int(one.step)
    assert sorted(seen[:steps]) == sorted(seen[steps:])
    assert len({*seen}) == steps
    assert {step for step, _ in seen} == {*range(steps)}


def test_its_key_is_not_the_one_that_the_loss_function_draws_from():
    seen = {}

    def told(who, key):
        jax.debug.callback(lambda data: seen.setdefault(who, set()).add(data.tobytes()), jax.random.key_data(key))

    def drawing(params, batch, key):
        told("loss", key)
        return loss_fn(params, batch)

    def record(grads, *, key):
        told("gradients", key)
        return grads

    for microbatches in (1, 3):
        run(*update_of(drawing, gradients=record, microbatches=microbatches), BATCHES[:3])
    jax.effects_barrier()
    assert len(seen["gradients"]) == 3
    assert len(seen["loss"]) == 3 + 9
    assert seen["loss"].isdisjoint(seen["gradients"])


def test_in_a_phase_it_is_given_the_parts_of_the_phase_and_another_key():
    given = {}

    def record(grads, *, key):
        jax.debug.callback(
            lambda data, parts=tuple(grads): given.setdefault(parts, data.tobytes()), jax.random.key_data(key)
        )
        return grads

    update, state = update_of(phases(), gradients=record)
    update(state, BATCHES[0])
    jax.effects_barrier()
    assert given.keys() == {("head",), ("body", "head")}
    assert len({*given.values()}) == 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_of_each_loss_is_there_for_who_asks(accumulate):
    """A sum by hand of the gradients of the losses, of three batches at once as of one, is the update's own."""
    weights = {"aux": optax.linear_schedule(1.0, 0.0, 10)}

    def by_hand(grads, *, per_loss, step):
        return optax.tree.add_scale(per_loss["main"], weights["aux"](step), per_loss["aux"])

    options = {"accumulate": accumulate, "loss_weights": weights}
    plain, metrics = run(*update_of(two_losses, **options), BATCHES)
    given, of_given = run(*update_of(two_losses, gradients=by_hand, **options), BATCHES)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), given.params, plain.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), of_given, metrics)


def test_the_sum_is_there_beside_the_gradient_of_each_loss():
    def summed(grads, *, per_loss):
        return grads

    plain, _ = run(*update_of(two_losses, loss_weights={"aux": 0.3}), BATCHES)
    given, _ = run(*update_of(two_losses, loss_weights={"aux": 0.3}, gradients=summed), BATCHES)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), given.params, plain.params)


def test_a_backward_pass_of_each_loss_is_there_only_for_who_asks():
    def project(grads, *, per_loss):
        scale = optax.tree.vdot(per_loss["main"], per_loss["aux"])
        return optax.tree.add_scale(per_loss["main"], scale, per_loss["aux"])

    def flops(fn):
        update, state = update_of(two_losses, gradients=fn)
        return update.lower(state, BATCHES[0]).compile().cost_analysis()["flops"]

    assert flops(lambda grads: grads) == flops(None) < flops(project)


def test_it_is_given_the_params_and_the_metrics_of_the_window():
    def check(grads, *, params, metrics):
        assert params.keys() == {"body", "head"}
        assert metrics.keys() == {"loss", "main", "aux"}
        return jax.tree.map(lambda grad: grad * metrics["main"], grads)

    update, state = update_of(two_losses, gradients=check)
    update(state, BATCHES[0])


def test_a_window_of_the_gradients_of_each_loss_lies_as_the_params_do_and_comes_back_from_a_checkpoint(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.device_put(linear_params(), jax.NamedSharding(mesh, jax.P(None, None)))
    params["body"]["w"] = jax.device_put(params["body"]["w"], jax.NamedSharding(mesh, jax.P("data", None)))

    def main_alone(grads, *, per_loss):
        return per_loss["main"]

    update = ft.make_update(two_losses, optimizer_of(params), accumulate=3, gradients=main_alone)
    state, _ = run(update, update.init(params), BATCHES[:2])
    for name in ("main", "aux"):
        place = state.window.grads[name]["body"]["body/w"].sharding
        assert place.is_equivalent_to(params["body"]["w"].sharding, 2)
    with ft.Checkpoints(tmp_path / "saved") as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(like=update.abstract(params)).state
    assert leaves_of(restored) == leaves_of(state)
    assert leaves_of(update(restored, BATCHES[2])[0]) == leaves_of(update(state, BATCHES[2])[0])


def test_a_run_that_is_started_again_has_the_noise_of_one_that_was_not(tmp_path):
    def trained(folder, *ends):
        for end in ends:
            update, state = update_of(phases(lambda params, batch: loss_fn(params, batch["x"])), gradients=noisy)
            data = ft.from_arrays({"x": np.asarray(BATCHES).reshape(-1, 4)}, batch_size=6, seed=0)
            result = ft.fit(update, state, data, steps=end, checkpoints=ft.Checkpoints(tmp_path / folder))
        return leaves_of(result.state)

    assert trained("twice", 4, 8) == trained("once", 8)


@pytest.mark.parametrize(
    ("function", "is_skipped"),
    [
        (lambda grads: jax.tree.map(jnp.nan_to_num, grads), [False, True]),
        (lambda grads: optax.tree.scale(jnp.inf, grads), [True, True]),
    ],
    ids=["hides what is not finite", "makes it"],
)  # fmt: skip
def test_a_step_is_skipped_for_what_was_computed_and_for_what_it_returns(function, is_skipped):
    update, state = update_of(gradients=function, nonfinite="skip")
    for batch, skipped in zip([BATCHES[0], BATCHES[1] * jnp.nan], is_skipped, strict=True):
        state, metrics = update(state, batch)
        assert bool(metrics["skipped"]) == skipped


def test_a_mean_over_devices_by_hand_is_the_update_of_the_whole_batch():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    update, state = update_of(gradients=lambda grads: jax.lax.pmean(grads, "data"))
    step = jax.jit(jax.shard_map(lambda *given: update.pure(*given)[0], mesh=mesh, in_specs=(jax.P(), jax.P("data")),
                                 out_specs=jax.P(), check_vma=False))  # fmt: skip
    by_hand = step(state, jax.device_put(BATCHES[0], jax.NamedSharding(mesh, jax.P("data"))))
    whole, _ = run(*update_of(), BATCHES[:1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), by_hand.params, whole.params)


# Each example by itself.


def clipped(grads, norm=0.5):
    return optax.tree.scale(1 / jnp.maximum(1.0, optax.tree.norm(grads) / norm), grads)


def plainly(params):
    """Each part's parameters less its gradients."""
    parts = ft.partition(params, {"body": "body", "head": "head"})
    return ft.Optimizer(parts, {"body": optax.sgd(1.0), "head": optax.sgd(1.0)})


def by_example(params, batch):
    """Gradients of each example on a leading axis."""
    return jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch.reshape(-1, 1, 4))


@pytest.mark.parametrize("options", [{}, {"microbatches": 3}, {"accumulate": 2}], ids=str)
def test_clipped_by_example_it_is_the_private_aggregate_of_optax(options):
    params, count = linear_params(), options.get("accumulate", 1)
    private = optax.contrib.differentially_private_aggregate(0.5, 0.0, 0)
    expected, _ = private.update(by_example(params, BATCHES[:count]), private.init(params))
    update = ft.make_update(loss_fn, plainly(params), per_example=clipped, **options)
    state, _ = run(update, update.init(params), BATCHES[:count])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.params,
                 optax.tree.sub(params, expected))  # fmt: skip


def test_parts_that_are_not_named_have_the_gradient_of_the_batch_and_none_by_example():
    params = linear_params()
    parts = ft.partition(params, {"body": "body", "head": "head"})
    grads, loss = ft.make_train_step(loss_fn, parts, per_example={"head": clipped})(params, BATCHES[0])
    whole, of_whole = ft.make_train_step(loss_fn, parts)(params, BATCHES[0])
    private = jnp.mean(jax.vmap(clipped)(by_example(params, BATCHES[0])["head"]["w"]), axis=0)
    np.testing.assert_allclose(grads["body"]["body/w"], whole["body"]["body/w"], rtol=1e-5)
    np.testing.assert_allclose(grads["head"]["head/w"], private, rtol=1e-5)
    np.testing.assert_allclose(loss.value, of_whole.value, rtol=1e-5)


def compiled_of(per_example, **options):
    params, batch = linear_params(), jnp.ones((1024, 4))
    update = ft.make_update(loss_fn, plainly(params), per_example=per_example, **options)
    return update.lower(update.init(params), batch).as_text()


def test_memory_is_that_of_the_examples_of_a_slice_and_of_the_parts_that_are_named():
    """Of 1024 examples a gradient of the body is 1024x4x3, one of the head 1024x3x1."""
    everything, head, slices = (
        compiled_of(clipped),
        compiled_of({"head": clipped}),
        compiled_of(clipped, microbatches=8),
    )
    assert "1024x4x3x" in everything
    assert "1024x3x1x" in everything
    assert "1024x4x3x" not in head
    assert "1024x3x1x" in head
    assert "1024x4x3x" not in slices
    assert "128x4x3x" in slices


def test_an_example_has_a_key_of_its_own_and_one_of_weight_0_counts_for_nothing():
    def weighted(params, batch, key):
        noise = jax.random.normal(key, ())
        value = jnp.sum(params["w"] * batch["x"]) / jnp.sum(batch["weight"]) + 0 * noise
        return ft.Loss(value, weight=jnp.sum(batch["weight"]), metrics={"noise": noise})

    params = {"w": jnp.ones(())}
    train_step = ft.make_train_step(weighted, ft.partition(params, {"all": ...}), per_example=lambda grads: grads)
    batch = {"x": jnp.array([1.0, 3.0, jnp.nan]), "weight": jnp.array([1.0, 3.0, 0.0])}
    grads, loss = train_step(params, batch, key=jax.random.key(0))
    assert float(grads["all"]["w"]) == pytest.approx((1 * 1 + 3 * 1) / 4)
    assert float(loss.weight) == 4
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(2))
    noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
    assert float(loss.metrics["noise"]) == pytest.approx(float(noise[0] + 3 * noise[1]) / 4)


def test_what_is_done_to_an_example_sees_its_gradient_without_the_scale_of_the_loss():
    """Of some gradients the norm is below that to which they are clipped, and above it when they are scaled."""
    norms = jax.vmap(optax.tree.norm)(by_example(linear_params(), BATCHES[0]))
    middle = float(jnp.median(norms))

    def stepped(scale):
        params = linear_params()
        per_example = functools.partial(clipped, norm=middle)
        update = ft.make_update(loss_fn, plainly(params), per_example=per_example, loss_scale=scale)
        return run(update, update.init(params), BATCHES[:1])[0].params

    assert norms.min() < middle < norms.max()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), stepped(ft.DynamicScale(2.0**12)),
                 stepped(None))  # fmt: skip


# What is refused.


def test_what_is_no_function_of_gradients_is_an_error():
    for wrong, message in [
        (0.1, r"gradients=0.1: give a function, fn\(grads\) -> grads, of split gradients"),
        (
            lambda grads, *, loss: grads,
            r"requires 'loss', .* may declare 'per_loss', 'key', 'step', 'params', 'metrics'",
        ),
    ]:
        with pytest.raises(ft.UpdateError, match=message):
            update_of(gradients=wrong)


def test_gradients_unlike_those_that_it_is_given_are_an_error():
    for wrong, message in [
        (
            lambda grads: {"body": grads["body"]},
            "must return split gradients like those that it is given: the tree lacks",
        ),
        (lambda grads: jax.tree.map(jnp.sum, grads), r"'body/body/w' has shape \(\), not \(4, 3\)"),
    ]:
        update, state = update_of(gradients=wrong)
        with pytest.raises(ft.UpdateError, match=message):
            update(state, BATCHES[0])


def test_a_function_that_needs_a_key_asks_for_one_at_the_start():
    update, _ = update_of(gradients=noisy)
    with pytest.raises(ft.UpdateError, match=r"gradients= declares key: update.init\(params, key=...\)"):
        update.init(linear_params())


def test_the_gradient_of_each_loss_excludes_routes_and_examples():
    def asks(grads, *, per_loss):
        return grads

    with pytest.raises(ft.UpdateError, match="declares per_loss, which excludes route="):
        update_of(two_losses, gradients=asks, route={"body": ["main", "aux"], "head": "main"})
    with pytest.raises(ft.UpdateError, match="declares per_loss, which excludes per_example="):
        update_of(two_losses, gradients=asks, per_example=clipped)


def test_what_can_not_be_done_by_example_is_an_error():
    def with_state(params, batch, model_state):
        return ft.Loss(loss_fn(params, batch), model_state=model_state + 1)

    params = linear_params()
    parts = ft.partition(params, {"body": "body", "head": "head"})
    for options, message in [
        ({"per_example": 0.5}, "per_example=0.5: give a function"),
        (
            {"per_example": {"tail": clipped}},
            "per_example names 'tail', which is not differentiated: the parts are 'body', 'head'",
        ),
        ({"per_example": clipped, "per_loss": True}, "excludes route and per_loss"),
    ]:
        with pytest.raises(ft.LossError, match=message):
            ft.make_train_step(loss_fn, parts, **options)
    with pytest.raises(ft.LossError, match="an example by itself has no statistics of the batch"):
        ft.make_train_step(with_state, parts, per_example=clipped)(params, BATCHES[0], model_state=jnp.zeros(()))
    with pytest.raises(ft.LossError, match=r"one leading axis, of examples: {.a.: \(2,\), .b.: \(3,\)}"):
        ft.make_train_step(loss_fn, parts, per_example=clipped)(params, {"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(
        ft.LossError, match="must return gradients like those that it is given: 'body/body/w' has shape"
    ):
        ft.make_train_step(loss_fn, parts, per_example=lambda grads: jax.tree.map(jnp.sum, grads))(params, BATCHES[0])
