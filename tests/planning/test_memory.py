"""Bytes that each device holds: those of its shards, and what a backward pass keeps."""

import gc
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from shapes import LAYERS, ROWS, WIDTH, mesh_of, mlp_loss, mlp_params, optimizer, planned, shape
from trees import says

import functrain as ft

BODY, HEAD = 4 * LAYERS * WIDTH * WIDTH, 4 * WIDTH
BATCH = shape(ROWS, WIDTH)


def test_all_that_is_kept_of_a_part_is_told_by_what_it_is():
    plan = planned(mlp_params(), mlp_loss, BATCH, accumulate=4, ema={"body": 0.99})
    whats = ("parameters", "gradients", "window")
    assert [plan.bytes(what, "body") for what in whats] == [BODY] * 3
    assert [plan.bytes(what, "head") for what in whats] == [HEAD] * 3
    # Adam's two moments and its count; an average and its count; nothing of SGD.
    assert plan.bytes("optimizer state", "body") == 2 * BODY + 4
    assert plan.bytes("ema", "body") == BODY + 4
    assert plan.bytes("optimizer state", "head") == plan.bytes("ema", "head") == 0
    assert plan.bytes() == 6 * BODY + 8 + 3 * HEAD
    assert plan.parameters == (BODY + HEAD) // 4


def test_bytes_are_those_of_the_state_that_init_makes():
    mesh = mesh_of(4, 2)
    params = jax.tree.map(
        lambda leaf: jax.device_put(jnp.ones(leaf.shape), leaf.sharding), mlp_params(mesh, P("data", "model"))
    )
    update = ft.make_update(mlp_loss, optimizer(params), ema={"head": 0.9})
    state = update.init(params)
    plan = ft.plan(update, None, params, BATCH)
    device = jax.devices()[0]

    def here(tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    found = {what: plan.bytes(what) for what in ("parameters", "optimizer state", "ema")}
    assert found == {
        "parameters": here(state.params), "optimizer state": here(state.opt_state), "ema": here(state.ema),
    }  # fmt: skip
    assert plan.bytes("parameters", "body") == plan.bytes("gradients", "body") == BODY // 8


def test_the_state_of_a_model_is_told():
    def loss_fn(params, batch, model_state):
        return ft.Loss(mlp_loss(params, batch), model_state={"mean": model_state["mean"] + batch.mean(0)})

    params, running = mlp_params(), {"mean": shape(WIDTH)}
    plan = ft.plan(ft.make_update(loss_fn, optimizer(params)), None, params, BATCH, model_state=running)
    assert plan.bytes("model state") == 4 * WIDTH
    assert "model state" in str(plan)
    assert "model state" not in str(planned(params, mlp_loss, BATCH))


def test_what_a_layout_has_on_the_host_is_told_apart():
    params, mesh = mlp_params(), mesh_of(8)
    layout = ft.layout(params, mesh, {"head": P(), ...: P("data")}, batch=P("data"), memory={"body": "pinned_host"})
    plan = ft.plan(ft.make_update(mlp_loss, optimizer(params, layout=layout)), layout, params, BATCH, budget="1 GB")
    assert plan.bytes("optimizer state", "body") == 4  # The count.
    assert plan.bytes("optimizer state", "body", memory="pinned_host") == 2 * BODY // 8
    assert "in pinned_host: 4.0 KiB a device" in str(plan)


def test_activations_are_what_the_backward_pass_needs_and_no_parameters():
    plan = planned(mlp_params(), mlp_loss, BATCH)
    # Of each layer its result, which the next product is given, and the slope of tanh there; and what is squared.
    assert plan.activations == 4 * (2 * LAYERS * ROWS * WIDTH + ROWS)


def test_activations_are_cut_as_the_batch_is():
    mesh = mesh_of(8)
    alone = planned(mlp_params(), mlp_loss, BATCH)
    cut = planned(mlp_params(mesh), mlp_loss, shape(ROWS, WIDTH, spec=P("data"), mesh=mesh))
    assert cut.activations <= alone.activations // 8 + 64  # And a few scalars.


@pytest.mark.parametrize("way", ["checkpoint", "microbatches"])
def test_remat_and_microbatches_have_fewer_activations(way):
    def again(params, batch):
        return jax.checkpoint(mlp_loss)(params, batch)

    plain = planned(mlp_params(), mlp_loss, BATCH)
    less = (
        planned(mlp_params(), again, BATCH)
        if way == "checkpoint"
        else planned(mlp_params(), mlp_loss, BATCH, microbatches=4)
    )
    assert less.activations <= plain.activations // 4
    assert (less.bytes("window") == plain.bytes("gradients")) == (way == "microbatches")


def test_phases_are_given_the_metrics_of_those_before_them():
    def after(params, batch, before):
        return mlp_loss(params, batch) * before["first"]["loss"]

    params = mlp_params()
    phases = ft.alternate(ft.Phase("first", mlp_loss, "body"), ft.Phase("second", after, "head", same_batch=True))
    plan = ft.plan(ft.make_update(phases, optimizer(params)), None, params, BATCH)
    assert plan.activations == planned(params, mlp_loss, BATCH).activations


def test_no_array_is_made_and_what_is_planned_can_be_written_as_json():
    gc.collect()  # The arrays of other tests.
    before = len(jax.live_arrays())
    params = {"body": {"kernel": shape(2**20, 2**12)}, "head": shape(2**12, 1)}  # 16 GiB, twice that of state.

    def loss_fn(params, batch):
        return jnp.mean(batch @ params["body"]["kernel"] @ params["head"])

    plan = planned(params, loss_fn, shape(2, 2**20), budget="80 GB")
    assert len(jax.live_arrays()) == before
    assert plan.bytes("parameters", "body") == 2**34
    assert plan.fits
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["fits"]
    assert read["peak"] == plan.peak
    assert read["flops"]["body"] == plan.flops["body"]
    assert {each["what"] for each in read["held"]} == {"parameters", "gradients", "optimizer state"}


# A budget.


def test_a_budget_says_what_is_largest_and_which_rule_would_help():
    mesh = mesh_of(8)
    batch = shape(ROWS, WIDTH, spec=P("data"), mesh=mesh)
    plan = planned(mlp_params(mesh), mlp_loss, batch, budget="64 KiB")
    assert not plan.fits
    text = str(plan)
    assert f"does not fit: {plan.peak / 1024:.1f} KiB a device, which has 64.0 KiB" in text
    assert "the largest: the optimizer state of 'body', 32.0 KiB" in text
    saves = {each.text.partition(" saves ")[0]: each.saves for each in plan.advice}
    # Of parameters, gradients and two moments seven eighths; of all but the parameters the same.
    assert saves["ft.largest('data') for 'body'"] == 4 * BODY * 7 // 8
    assert saves["zero='data'"] == (3 * BODY + HEAD) * 7 // 8
    assert saves["memory={'body': 'pinned_host'}"] == 2 * BODY + 4
    assert saves["microbatches=2, or jax.checkpoint in the model,"] == plan.activations // 2
    assert "KiB: gradients and optimizer state, most of them of 'body', are alike over that axis" in text
    assert "KiB: 'body/layer_0' and 3 more are alike over that axis" in text
    assert [each.saves for each in plan.advice] == sorted((each.saves for each in plan.advice), reverse=True)
    assert "fits:" in str(planned(mlp_params(mesh), mlp_loss, batch, budget="1 GB"))


def test_what_is_cut_already_is_not_advised_and_following_advice_saves_what_it_says():
    mesh = mesh_of(8)
    batch = shape(ROWS, WIDTH, spec=P("data"), mesh=mesh)
    whole, cut = (planned(mlp_params(mesh, spec), mlp_loss, batch, budget=1) for spec in (P(), P("data")))
    of_body = next(each for each in whole.advice if "for 'body'" in each.text)
    assert whole.bytes() - cut.bytes() == of_body.saves
    assert not any("for 'body'" in each.text for each in cut.advice)


@pytest.mark.parametrize("budget", ["80", 80, "80 gigs", "GB", "-1 GB", 0, "0 GB"])
def test_a_budget_that_is_none_says_how_to_write_one(budget):
    if str(budget) == "80":
        assert planned(mlp_params(), mlp_loss, BATCH, budget=budget).budget == 80
        return
    with pytest.raises(ft.PlanError, match=says(f"budget={budget!r}: write what a device has", '"80 GB"')):
        planned(mlp_params(), mlp_loss, BATCH, budget=budget)


def test_a_layout_that_the_update_does_not_follow_is_an_error():
    params = mlp_params()
    one, other = (ft.layout(params, mesh_of(8), {...: P()}) for _ in range(2))
    for optim, which in ((optimizer(params), "no"), (optimizer(params, layout=other), "another")):
        says_so = says(f"was made with {which} layout", "ft.Optimizer(parts, transforms, layout=layout)")
        with pytest.raises(ft.PlanError, match=says_so):
            ft.plan(ft.make_update(mlp_loss, optim), one, params, BATCH)


def test_an_abstract_mesh_has_nothing_to_compile_for():
    params = mlp_params()
    layout = ft.layout(params, jax.sharding.AbstractMesh((256,), ("data",)), {...: P()})
    update = ft.make_update(mlp_loss, optimizer(params, layout=layout))
    with pytest.raises(ft.PlanError, match=says("abstract mesh", "device_count=256 and jax.make_mesh in its place")):
        ft.plan(update, layout, params, BATCH)
