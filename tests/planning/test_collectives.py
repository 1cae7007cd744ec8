"""Collectives of a step by each layout, which are those of the closed form, read from what XLA's partitioner made."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from shapes import LAYERS, ROWS, WIDTH, mesh_of, mlp_loss, mlp_params, optimizer, sent, shape
from trees import says

import functrain as ft
from functrain.planning.program import costs_of
from functrain.update.anatomy import lowered_calls

BODY, HEAD = 4 * LAYERS * WIDTH * WIDTH, 4 * WIDTH
KERNEL = 4 * WIDTH * WIDTH
BY_ROW = P("data")


def laid_out(rules, *, mesh=None, batch=BY_ROW, params=None, loss_fn=mlp_loss, of_layout=None, clip=None, **options):
    params = params or mlp_params()
    mesh = mesh or mesh_of(8)
    layout = ft.layout(params, mesh, rules, batch=batch, **(of_layout or {}))
    update = ft.make_update(loss_fn, optimizer(params, layout=layout, clip_norm=clip), **options)
    return ft.plan(update, layout, params, shape(ROWS, WIDTH))


def test_data_parallel_reduces_every_gradient_once():
    plan = laid_out({...: P()})
    assert sent(plan, "all-reduce", "body") == (LAYERS, BODY)
    assert sent(plan, "all-reduce", "head") == (1, HEAD)
    assert sent(plan) == (LAYERS + 2, BODY + HEAD + 4)  # And the loss.
    assert {each.devices for each in plan.collectives} == {8}
    assert {part: 8 * count for part, count in plan.flops_here.items()} == plan.flops
    assert "all-reduce" in str(plan)
    assert plan.devices == 8


def test_planned_again_it_is_the_same_although_programs_are_kept():
    # The tests keep what they compile, and of a program that is kept XLA shows nothing.
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    first, second = (laid_out({...: P()}) for _ in range(2))
    assert first == second
    assert first.collectives
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


@pytest.mark.parametrize("count", [2, 5])
def test_a_window_has_the_collectives_of_all_its_batches(count):
    plan = laid_out({...: P()}, accumulate=count)
    assert sent(plan, "all-reduce", "body") == (count * LAYERS, count * BODY)
    assert plan.batches == count


def test_fsdp_gathers_parameters_and_scatters_sums_of_gradients():
    plan = laid_out({"body": ft.largest("data"), ...: P()})
    times, nbytes = sent(plan, "all-gather", "body")
    # Each kernel forward and, but for the first, backward, unless XLA keeps what it gathered.
    assert LAYERS <= times <= 2 * LAYERS - 1
    assert nbytes == times * KERNEL
    assert sent(plan, "reduce-scatter", "body") == (LAYERS, BODY)
    assert sent(plan, part="head") == (1, HEAD)
    assert plan.bytes("parameters", "body") == BODY // 8
    assert sum(plan.flops_here.values()) * 8 == sum(plan.flops.values())


def test_zero_scatters_sums_of_gradients_and_gathers_what_was_updated():
    plain, zero = laid_out({...: P()}), laid_out({...: P()}, of_layout={"zero": "data"})
    assert sent(zero, "reduce-scatter", "body") == (LAYERS, BODY)
    assert sent(zero, "all-gather", "body") == (LAYERS, BODY)
    assert sent(zero, "all-reduce", "body") == (0, 0)
    assert zero.bytes("optimizer state", "body") == 2 * BODY // 8 + 4
    assert zero.bytes("gradients", "body") == BODY // 8
    assert zero.bytes("parameters") == plain.bytes("parameters") == BODY + HEAD


def two_layers(params, batch):
    return jnp.mean(jnp.tanh(batch @ params["body"]["up"]) @ params["body"]["down"] @ params["head"]) ** 2


def test_tensor_parallel_reduces_activations():
    params = {"body": {"up": shape(WIDTH, 128), "down": shape(128, WIDTH)}, "head": shape(WIDTH, 1)}
    rules = {"body/up": P(None, "model"), "body/down": P("model"), ...: P()}
    plan = laid_out(rules, mesh=mesh_of(1, 8), batch=P(), params=params, loss_fn=two_layers)
    # What a row of devices computed of the second product is summed; the batch has no gradient.
    assert sent(plan, "all-reduce", "") == (1, 4 * ROWS * WIDTH)
    assert sent(plan, part="body") == (0, 0)
    assert plan.flops_here["body"] * 8 == plan.flops["body"]
    assert plan.flops_here["head"] == plan.flops["head"]  # Which every device does.


def test_both_together_take_turns_over_their_own_axes():
    params = {"body": {"up": shape(WIDTH, 128), "down": shape(128, WIDTH)}, "head": shape(WIDTH, 1)}
    rules = {"body/up": P(None, "model"), "body/down": P("model"), ...: P()}
    plan = laid_out(rules, mesh=mesh_of(4, 2), params=params, loss_fn=two_layers)
    gradients = 2 * 4 * WIDTH * 128 // 2
    assert sent(plan, "all-reduce", "body") == (2, gradients)
    assert {each.devices for each in plan.collectives if each.part == "body"} == {4}
    of_activations = [each for each in plan.collectives if each.part == "" and each.devices == 2]
    assert sum(each.nbytes for each in of_activations) == 4 * ROWS * WIDTH // 4


def test_a_scan_over_layers_counts_the_collectives_of_each_turn():
    params = {"body": {"kernel": shape(LAYERS, WIDTH, WIDTH)}, "head": shape(WIDTH, 1)}

    def loss_fn(params, batch):
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), batch, params["body"]["kernel"])
        return jnp.mean((x @ params["head"]) ** 2)

    whole = laid_out({...: P()}, params=params, loss_fn=loss_fn)
    assert sent(whole, "all-reduce", "body") == (LAYERS, BODY)
    cut = laid_out({"body": P(None, "data"), ...: P()}, params=params, loss_fn=loss_fn)
    assert sent(cut, "all-gather", "body")[1] in (BODY, 2 * BODY)
    assert sent(cut, "reduce-scatter", "body") == (LAYERS, BODY)


def test_biases_and_scales_have_their_gradients_reduced_as_their_parts():
    params = {"body": {"scale": shape(WIDTH), "bias": shape(WIDTH)}, "head": shape(WIDTH, 1)}

    def loss_fn(params, batch):
        x = jnp.tanh(batch[:, None] * params["body"]["scale"] + params["body"]["bias"])
        return jnp.mean((x @ params["head"]) ** 2)

    plan = laid_out({...: P()}, params=params, loss_fn=loss_fn)
    assert sent(plan, "all-reduce", "body") == (2, 2 * 4 * WIDTH)
    assert sent(plan, part="") == (1, 4)


def test_adapters_on_a_backbone_that_is_cut_send_gradients_of_their_own_alone():
    params = {"body": {"kernel": shape(WIDTH, WIDTH)}, "adapter": {"a": shape(WIDTH, 2), "b": shape(2, WIDTH)}}
    layout = ft.layout(params, mesh_of(8), {"body": ft.largest("data"), ...: P()}, batch=P("data"))
    parts = ft.partition(params, {"body": "body", "adapter": "adapter"})
    optim = ft.Optimizer(parts, {"body": ft.FROZEN, "adapter": optax.adam(1e-3)}, layout=layout)

    def loss_fn(params, batch):
        low = batch @ params["adapter"]["a"] @ params["adapter"]["b"]
        return jnp.mean(jnp.tanh(batch @ params["body"]["kernel"] + low) ** 2)

    plan = ft.plan(ft.make_update(loss_fn, optim), layout, params, shape(ROWS, WIDTH))
    assert sent(plan, part="adapter") == sent(plan, "all-reduce", "adapter") == (2, 2 * 4 * 2 * WIDTH)
    assert sent(plan, part="body") == sent(plan, "all-gather", "body") == (1, KERNEL)
    assert plan.bytes("gradients", "body") == plan.bytes("optimizer state", "body") == 0


def test_the_norm_of_all_gradients_is_of_no_part():
    plain, clipped = laid_out({...: ft.largest("data")}), laid_out({...: ft.largest("data")}, clip=1.0)
    assert sent(clipped, part="body") == sent(plain, part="body")
    assert sent(clipped, part="")[0] > sent(plain, part="")[0]


def test_explicit_axes_are_planned_alike():
    def over(kind):
        return laid_out({...: P()}, mesh=jax.make_mesh((8,), ("data",), axis_types=(kind,)))

    auto, explicit = over(AxisType.Auto), over(AxisType.Explicit)
    assert sent(explicit, "all-reduce", "body") == sent(auto, "all-reduce", "body") == (LAYERS, BODY)
    assert explicit.held == auto.held
    assert explicit.flops == auto.flops


def test_a_program_that_xla_did_not_show_is_an_error():
    params = mlp_params()
    update = ft.make_update(mlp_loss, optimizer(params))
    call = next(iter(lowered_calls(update, update.abstract(params), shape(ROWS, WIDTH))))
    with pytest.raises(ft.PlanError, match=says("how it cuts 'whole' over 8 devices", "XLA_FLAGS")):
        costs_of(call, 8)  # It is of one.
