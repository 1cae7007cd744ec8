"""FLOPs of a step, which are those of the closed form, each with the part whose parameters it is about."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from shapes import LAYERS, ROWS, WIDTH, mlp_loss, mlp_params, optimizer, planned, shape

import functrain as ft

LAYER = 2 * ROWS * WIDTH * WIDTH  # The FLOPs of one product of the body; its backward pass has two.
HEAD = 2 * ROWS * WIDTH
BATCH = shape(ROWS, WIDTH)


def test_a_product_counts_once_forward_and_twice_backward_but_for_the_gradient_of_the_input():
    plan = planned(mlp_params(), mlp_loss, BATCH)
    assert plan.flops == {"body": (3 * LAYERS - 1) * LAYER, "head": 3 * HEAD, "": 0}
    assert plan.flops_here == plan.flops


def test_the_sum_is_what_xla_counts_of_the_compiled_program_but_for_elements_of_arrays():
    params = mlp_params(width=128)
    update = ft.make_update(mlp_loss, optimizer(params))
    batch = shape(512, 128)
    total = sum(ft.plan(update, None, params, batch).flops.values())
    counted = update.lower(update.abstract(params), batch).compile().cost_analysis()["flops"]
    assert total < counted < 1.02 * total


def scanned_params():
    return {"body": {"kernel": shape(LAYERS, WIDTH, WIDTH)}, "head": shape(WIDTH, 1)}


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_counts_each_of_its_turns_and_what_is_computed_again_counts_again(remat):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    def loss_fn(params, batch):
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, batch, params["body"]["kernel"])
        return jnp.mean((x @ params["head"]) ** 2)

    plan = planned(scanned_params(), loss_fn, BATCH)
    # A scan has one body: the gradient of its first input is computed too, though nobody asks for it.
    assert plan.flops["body"] == (4 if remat else 3) * LAYERS * LAYER
    assert plan.flops["head"] == 3 * HEAD


def test_casts_and_transposes_of_a_parameter_are_its_parts_and_tied_ones_count_twice():
    params = {"body": {"embed": shape(WIDTH, WIDTH)}, "head": shape(WIDTH, 1)}

    def loss_fn(params, batch):
        kernel = params["body"]["embed"].astype(jnp.bfloat16)
        x = jnp.tanh(batch.astype(jnp.bfloat16) @ kernel) @ kernel.T
        return jnp.mean((x.astype(jnp.float32) @ params["head"]) ** 2)

    assert planned(params, loss_fn, BATCH).flops == {"body": 5 * LAYER, "head": 3 * HEAD, "": 0}


def test_products_of_two_activations_are_of_no_part():
    length = 16
    batch = shape(4, length, WIDTH)

    def loss_fn(params, batch):
        x = batch @ params["body"]["layer_0"]
        scores = jax.nn.softmax(jnp.einsum("bsd,btd->bst", x, x))
        return jnp.mean((jnp.einsum("bst,btd->bsd", scores, x) @ params["head"]) ** 2)

    params = {"body": {"layer_0": shape(WIDTH, WIDTH)}, "head": shape(WIDTH, 1)}
    plan = planned(params, loss_fn, batch)
    # The scores and their mean: a product forward, two backward, each.
    assert plan.flops[""] == 2 * 3 * 2 * 4 * length * length * WIDTH
    assert plan.flops["body"] == 2 * LAYER


def test_a_frozen_part_has_no_gradient_of_its_own_and_an_adapter_little():
    params = {"body": {"kernel": shape(WIDTH, WIDTH)}, "adapter": {"a": shape(WIDTH, 2), "b": shape(2, WIDTH)}}
    parts = ft.partition(params, {"body": "body", "adapter": "adapter"})

    def loss_fn(params, batch):
        for _ in range(2):
            low = batch @ params["adapter"]["a"] @ params["adapter"]["b"]
            batch = jnp.tanh(batch @ params["body"]["kernel"] + low)
        return jnp.mean(batch)

    update = ft.make_update(loss_fn, ft.Optimizer(parts, {"body": ft.FROZEN, "adapter": optax.sgd(0.1)}))
    plan = ft.plan(update, None, params, BATCH)
    rank = 2 * ROWS * WIDTH * 2
    assert plan.flops == {"body": 3 * LAYER, "adapter": (6 + 5) * rank, "": 0}
    assert (plan.bytes("gradients", "body"), plan.bytes("gradients", "adapter")) == (0, 4 * 4 * WIDTH)


CONVOLUTIONS = {
    "plain": {"window_strides": (1, 1), "padding": "VALID"},
    "padded": {"window_strides": (1, 1), "padding": "SAME"},
    "strides": {"window_strides": (2, 2), "padding": "SAME"},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
    "groups": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_counted_as_xla_counts_them(name):
    options = CONVOLUTIONS[name]
    params = {
        "body": {"kernel": shape(3, 3, 8 // options.get("feature_group_count", 1), 8)},
        "head": shape(8, 1),
    }
    batch = shape(4, 12, 12, 8)

    def loss_fn(params, batch):
        numbers = jax.lax.conv_dimension_numbers(batch.shape, params["body"]["kernel"].shape, ("NHWC", "HWIO", "NHWC"))
        x = jax.lax.conv_general_dilated(batch, params["body"]["kernel"], dimension_numbers=numbers, **options)
        return jnp.mean((x @ params["head"]) ** 2)

    plan = planned(params, loss_fn, batch)
    lowered = jax.jit(jax.grad(loss_fn)).lower(params, batch)
    total = sum(plan.flops.values())
    assert total < lowered.cost_analysis()["flops"] < 1.1 * total
    assert plan.flops["body"] > 0.9 * total
    assert plan.flops[""] == 0


def test_what_the_optimizer_multiplies_is_the_part_of_its_parameters():
    params = mlp_params()
    plain, muon = (planned(params, mlp_loss, BATCH, tx=tx) for tx in (None, optax.contrib.muon(1e-3)))
    # Five rounds of three products of square matrices, for each kernel.
    assert muon.flops["body"] - plain.flops["body"] == LAYERS * 5 * 3 * 2 * WIDTH**3
    assert muon.flops["head"] == plain.flops["head"]
    assert muon.flops[""] == 0


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"microbatches": 4}])
def test_a_step_has_the_flops_of_all_its_batches(options):
    one, several = planned(mlp_params(), mlp_loss, BATCH), planned(mlp_params(), mlp_loss, BATCH, **options)
    batches = options.get("accumulate", 1)
    assert several.batches == batches
    assert several.flops == {part: batches * count for part, count in one.flops.items()}


def test_with_phases_a_step_is_a_whole_cycle():
    params = mlp_params()
    phases = ft.alternate(
        ft.Phase("body", mlp_loss, "body", repeat=3),
        ft.Phase("head", mlp_loss, "head"),
    )
    plan = ft.plan(ft.make_update(phases, optimizer(params)), None, params, BATCH)
    assert plan.batches == 4
    # The body's phase has no gradient of the head's kernel, and the head's only the forward pass of the body.
    assert plan.flops == {"body": (3 * (3 * LAYERS - 1) + LAYERS) * LAYER, "head": (3 * 2 + 2) * HEAD, "": 0}


def test_a_loop_of_unknown_length_is_counted_once_and_named():
    def loss_fn(params, batch):
        x = jax.lax.stop_gradient(batch)
        x = jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ jnp.ones((WIDTH, WIDTH)), x)
        return mlp_loss(params, x)

    plan = planned(mlp_params(), loss_fn, BATCH)
    assert len(plan.unknown) == 1
    assert plan.flops[""] == LAYER
    assert "counted once, as their length is not known: the loops" in str(plan)
