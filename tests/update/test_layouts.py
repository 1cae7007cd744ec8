"""An update whose optimizer has a layout: each call of it over eight devices, as on one device, and as by hand."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import BATCHES, RULES, layout_of, loss_fn, mesh, optimizer_of, shardings, stacked, start
from soak import in_soak, some

import functrain as ft
from functrain.tree.arrays import shortest

CALLS = {"plain": {}, "window": {"accumulate": 2}, "microbatches": {"microbatches": 2}, "skip": {"nonfinite": "skip"}}


def trained(layout, loss=loss_fn, body=None, **options):
    """The losses of every kind of call, the last state, and where its leaves lay before and after."""
    update = ft.make_update(loss, optimizer_of(layout, body, clip_norm=1.0), ema=0.9, **options)
    state = update.init(start())
    before, losses = shardings(state), []
    for batch in BATCHES[:3]:
        state, metrics = update(state, batch)
        losses.append(metrics["loss"])
    if state.window is not None:
        state, _ = update.flush(state)
    state, metrics = update.scan(state, stacked(BATCHES[:4]))
    losses += [*metrics["loss"]]
    whole = BATCHES[4] if update.cycle == 1 else stacked(BATCHES[4:])
    state, metrics = jax.jit(update.pure)(state, whole)
    losses.append(metrics["loss"])
    for batch in BATCHES[: options.get("accumulate", 1)]:
        state, metrics = update.measured(state, batch)
    losses.append(metrics["loss"])
    return np.array(losses), state, before, shardings(state)


def lies_as(one, other):
    return one.mesh == other.mesh and one.memory_kind == other.memory_kind and shortest(one) == shortest(other)


@functools.cache
def on_one_device(call):
    losses, state, *_ = trained(None, **CALLS[call])
    return losses, ft.flatten(state.params)


def cases(names, *here):
    """Every layout with every kind of call; those that are not named here are of `make soak`."""
    return [pytest.param(name, call, marks=() if (name, call) in here else in_soak) for name in names for call in CALLS]


@pytest.mark.parametrize(
    ("name", "call"),
    cases(RULES, ("both, zero", "window"), ("fsdp", "microbatches"), ("tensor", "plain"), ("host", "skip")),
)
def test_every_call_trains_as_one_device_does_and_leaves_all_where_it_lies(name, call):
    losses, state, before, after = trained(layout_of(name), **CALLS[call])
    expected, params = on_one_device(call)
    np.testing.assert_allclose(losses, expected, rtol=2.5e-6)
    assert all(jax.tree.leaves(jax.tree.map(lies_as, before, after)))
    for path in ("head/kernel", "head/bias"):  # Adam's drift by more than SGD's.
        np.testing.assert_allclose(ft.flatten(state.params)[path], params[path], atol=1e-5)


def share(leaf):
    return leaf.addressable_shards[0].data.nbytes


@pytest.mark.parametrize("name", RULES)
def test_no_device_holds_more_than_its_share_and_what_the_table_names(name):
    layout = layout_of(name)
    optim = optimizer_of(layout)
    update = ft.make_update(loss_fn, optim, ema=0.9, accumulate=2)
    state, _ = update(update.init(start()), BATCHES[0])
    cut = 4 if name in ("fsdp", "zero") else {"data": 1, "tensor": 2, "both": 8, "both, zero": 8, "host": 4}[name]
    named = {*re.findall(r"'([^']*)'", "".join(line for line in str(layout).splitlines() if "whole on" in line))}
    for path, leaf in ft.flatten(state.params).items():
        of_zero = name in ("zero", "host", "data") or (name == "both, zero" and path in named)
        least = 1 if of_zero or path in named else 2 if name in ("tensor", "both, zero", "both") else cut
        assert share(leaf) * least <= leaf.nbytes
    beside = (state.opt_state["body"][0].mu, state.ema["body"].mean, state.window.grads["body"])
    for flat in beside:
        kernel = flat["body/kernel"]
        assert share(kernel) * cut == kernel.nbytes
        assert kernel.sharding.spec == layout.of_state("body/kernel").spec
    assert update.abstract(start()).opt_state["body"][0].mu["body/kernel"].sharding == beside[0]["body/kernel"].sharding


def test_memory_of_the_host_holds_the_moments_of_the_parts_and_leaves_that_are_named():
    update = ft.make_update(loss_fn, optimizer_of(layout_of("host")))
    state, _ = update(update.init(start()), BATCHES[0])
    kinds = {path: leaf.sharding.memory_kind for path, leaf in ft.flatten(state.opt_state).items()}
    assert {path for path, kind in kinds.items() if kind == "pinned_host"} == {
        "body/0/mu/body/bias", "body/0/mu/body/kernel", "body/0/nu/body/bias", "body/0/nu/body/kernel",
        "head/0/trace/head/kernel",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("data", "layout='data': write ft.layout(params, mesh, rules)"),
        (
            ft.layout({"w": jnp.ones(8)}, mesh(), {...: P()}),
            "the layout lacks 'body/bias', 'body/kernel', 'head/bias',",
        ),
        (lambda: layout_of("data", memory={"bdy": "pinned_host"}), "the layout's memory=: no leaf matches 'bdy'; did"),
    ],
)
def test_a_layout_of_other_params_is_told(layout, said):
    with pytest.raises(ft.OptimizerError) as error:
        optimizer_of(layout() if callable(layout) else layout)
    assert said in str(error.value)


def test_a_frozen_part_has_no_state_to_lie_elsewhere():
    layout = layout_of("data", memory={"body": "pinned_host"})
    parts = ft.partition(start(), {"head": "head", "body": ...})
    with pytest.raises(ft.OptimizerError, match="names 'body', with 'body/bias', which is frozen"):
        ft.Optimizer(parts, {"head": optax.sgd(0.1), "body": ft.FROZEN}, layout=layout)


def test_a_batch_that_the_axis_does_not_divide_is_told():
    update = ft.make_update(loss_fn, optimizer_of(layout_of("data")))
    with pytest.raises(
        ft.LayoutError, match=r"shape \(30, 16\), of which 'data' of 4 does not divide dimension 0: give"
    ):
        update(update.init(start()), jax.tree.map(lambda leaf: leaf[:30], BATCHES[0]))


@pytest.mark.parametrize(("examples", "batch_size", "last"), [(76, 32, "keep"), (64, 30, "drop"), (64, 30, "pad")])
def test_a_run_tells_of_batches_that_the_axis_does_not_divide_before_the_first_update(examples, batch_size, last):
    update = ft.make_update(loss_fn, optimizer_of(layout_of("fsdp", mesh(shape=(8, 1)))))
    rows = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:examples], *BATCHES)
    data, state = ft.from_arrays(rows, batch_size=batch_size, last=last), update.init(start())
    with pytest.raises(ft.LayoutError, match=r"'data' of 8 does not divide dimension 0: .* last='pad'\)"):
        ft.fit(update, state, data, epochs=1, progress=False)
    assert not state.params["head"]["bias"].is_deleted()


def test_a_run_that_ends_before_a_short_batch_is_not_told_of_it():
    update = ft.make_update(loss_fn, optimizer_of(layout_of("fsdp", mesh(shape=(8, 1)))))
    data = ft.from_arrays(jax.tree.map(lambda *leaves: np.concatenate(leaves)[:76], *BATCHES), batch_size=32)
    assert ft.fit(update, update.init(start()), data, steps=2, progress=False).state.step == 2


def test_params_given_are_not_consumed():
    given = start()
    update = ft.make_update(loss_fn, optimizer_of(layout_of("data")))
    update(update.init(given), BATCHES[0])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


# Against a step by hand, with the same constraints.


def by_hand(name, tx):
    """A step that anyone would write: everything in its place at the ends, gradients where their state lies."""
    layout = layout_of(name)
    of_params = layout.shardings(start())
    of_grads = jax.tree.unflatten(jax.tree.structure(start()), [layout.of_state(path) for path in ft.flatten(start())])

    def init(params):
        return tx.init(params)

    def place(leaf):
        paths = [path for path, of in layout.shapes.items() if of.shape == leaf.shape]
        return layout.of_state(paths[0]) if paths and leaf.shape else jax.NamedSharding(layout.mesh, P())

    of_state = jax.tree.map(place, jax.eval_shape(init, start()))

    def step(params, opt_state, batch):
        batch = jax.lax.with_sharding_constraint(batch, jax.NamedSharding(layout.mesh, P("data")))
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        grads = jax.lax.with_sharding_constraint(grads, of_grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(of_params, of_state, None))
    params = layout.put(start())
    return jitted.lower(params, jax.jit(init, out_shardings=of_state)(params), BATCHES[0]).compile()


def collectives(compiled):
    """Of each kind of collective, what it moves: the shapes of its results, sorted."""
    line = re.compile(
        r"= (\(?[^=]*?\)?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    )
    found = [(kind, shape) for result, kind in line.findall(compiled.as_text())
             for shape in re.findall(r"\w+\[[\d,]*\]", result)]  # fmt: skip
    return sorted(found)


@pytest.mark.parametrize("name", ["data", "fsdp", "zero", "tensor", "both", "both, zero"])
def test_collectives_flops_and_memory_are_those_of_a_step_by_hand(name):
    layout, tx = layout_of(name), optax.adam(1e-2)
    optim = ft.Optimizer(ft.partition(start(), {"all": ...}), {"all": tx}, layout=layout)
    update = ft.make_update(loss_fn, optim)
    ours, theirs = update.lower(update.abstract(start()), BATCHES[0]).compile(), by_hand(name, tx)
    assert collectives(ours) == collectives(theirs)
    assert collectives(ours)
    costs = [each.cost_analysis()["flops"] for each in (ours, theirs)]
    assert abs(costs[0] - costs[1]) <= 0.001 * costs[1] + 8  # The counter of steps.
    memory = [each.memory_analysis() for each in (ours, theirs)]
    for kind in ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes"):
        assert abs(getattr(memory[0], kind) - getattr(memory[1], kind)) <= 64


@pytest.mark.parametrize("place", [lambda batch: jax.device_put(batch, jax.devices()[1]), "another mesh"])
def test_a_batch_on_other_devices_is_told_how_it_comes_to_those_of_the_layout(place):
    if place == "another mesh":
        of_two = jax.NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), P("data"))
        place = functools.partial(jax.device_put, device=of_two)
    update = ft.make_update(loss_fn, optimizer_of(layout_of("data")))
    with pytest.raises(
        ft.UpdateError, match=r"'x' of the batch lies on . device\(s\), and not on the 8 of the layout's"
    ):
        update(update.init(start()), place(BATCHES[0]))


def test_params_on_another_mesh_are_told_in_a_loop_of_ones_own():
    of_two = jax.NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), P())
    with pytest.raises(
        ft.OptimizerError, match=r"'head/bias' lies on 2 device\(s\), and not on the 8 of the layout's mesh"
    ):
        optimizer_of(layout_of("zero")).init(jax.device_put(start(), of_two))


def test_a_state_of_one_device_is_told_how_it_comes_to_those_of_the_layout():
    state = ft.make_update(loss_fn, optimizer_of(None)).init(start())
    update = ft.make_update(loss_fn, optimizer_of(layout_of("zero")))
    with pytest.warns(UserWarning, match=r"the state's 'opt_state/body/0/count' lies on one device, and the lay"):
        update(state, BATCHES[0])


def test_in_a_jit_of_ones_own_a_batch_is_cut_as_well():
    update = ft.make_update(loss_fn, optimizer_of(layout_of("data")))
    compiled = jax.jit(update.pure).lower(update.init(start()), BATCHES[0]).compile()
    called = update.lower(update.init(start()), BATCHES[0]).compile()
    assert compiled.cost_analysis()["flops"] <= 1.01 * called.cost_analysis()["flops"]


# Adapters on a frozen backbone.


def with_adapters(spec, **options):
    """An update of low-rank adapters, with the kernels beneath them frozen and cut as is said."""
    keys = jax.random.split(jax.random.key(1), 8)
    params = {
        f"layer{i}": {
            "kernel": jax.random.normal(keys[2 * i], (32, 32)) / 6,
            "lora": {"a": jax.random.normal(keys[2 * i + 1], (32, 4)) / 6, "b": jnp.zeros((4, 32))},
        }
        for i in range(4)
    }

    def loss(params, batch):
        x = jnp.concatenate([batch["x"], batch["x"]], axis=1)
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"] + x @ layer["lora"]["a"] @ layer["lora"]["b"])
        return jnp.mean((x[:, :8] - batch["y"]) ** 2)

    layout = None if spec is None else ft.layout(params, mesh(), {"**/kernel": spec, ...: P()}, batch=P("data"))
    parts = ft.partition(params, {"lora": "**/lora", "backbone": ...})
    optim = ft.Optimizer(parts, {"lora": optax.sgd(0.1), "backbone": ft.FROZEN}, layout=layout)
    return ft.make_update(loss, optim, **options), params


def test_adapters_learn_on_a_backbone_of_which_each_device_has_a_share():
    def losses(spec):
        update, params = with_adapters(spec)
        state, found = update.init(params), []
        for batch in BATCHES[:4]:
            state, metrics = update(state, batch)
            found.append(float(metrics["loss"]))
        return found, state

    found, state = losses(P("data", "model"))
    np.testing.assert_allclose(found, losses(None)[0], rtol=2.5e-6)
    for layer in state.params.values():
        assert share(layer["kernel"]) * 8 == layer["kernel"].nbytes
    assert "backbone" not in state.opt_state


def test_a_frozen_backbone_is_gathered_where_it_is_cut_and_nowhere_else():
    def kinds(spec, **options):
        update, params = with_adapters(spec, **options)
        compiled = update.lower(update.abstract(params), BATCHES[0]).compile()
        return {(kind, shape) for kind, shape in collectives(compiled) if "32,32" in shape or kind != "all-reduce"}

    assert kinds(P(), microbatches=2) == set()
    gathered = kinds(P("data", None))
    assert {kind for kind, _ in gathered} == {"all-gather"}  # No gradient of it is reduced.


# Meshes whose axes are a part of types.


def explicit_loss(params, batch):
    """The model as one writes it for explicit axes: it says how each product lies, whatever its parameters do."""
    whole = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)
    return loss_fn(whole, batch)


EXPLICIT = [name for name in RULES if name != "host"]  # JAX moves nothing between memories there.


@pytest.mark.parametrize(("name", "call"), cases(EXPLICIT, ("both, zero", "window"), ("fsdp", "skip")))
def test_every_call_works_where_axes_are_explicit(name, call):
    with jax.set_mesh(mesh(AxisType.Explicit)):
        layout = layout_of(name, mesh(AxisType.Explicit))
        losses, _, before, after = trained(layout, explicit_loss, **CALLS[call])
    np.testing.assert_allclose(losses, on_one_device(call)[0], rtol=2.5e-6)
    assert all(jax.tree.leaves(jax.tree.map(lies_as, before, after)))


def test_a_model_that_says_nothing_of_explicit_axes_is_told_how_to_have_others():
    with jax.set_mesh(mesh(AxisType.Explicit)):
        update = ft.make_update(loss_fn, optimizer_of(layout_of("fsdp", mesh(AxisType.Explicit))))
        with pytest.raises(Exception, match="illegally sharded") as error:
            update(update.init(start()), BATCHES[0])
    assert error.value.__notes__[0].endswith(
        "to have the partitioner find that out: jax.make_mesh((4, 2), ('data', 'model'),"
        " axis_types=(jax.sharding.AxisType.Auto,) * 2)"
    )


OPTIMIZERS = {
    "muon": optax.contrib.muon(1e-2), "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "lion": optax.lion(1e-3), "with_lr(muon)": ft.with_lr(optax.contrib.muon, 1e-2), "lamb": optax.lamb(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), "sophia": optax.contrib.sophia(1e-3),
    "shampoo-like": optax.contrib.dog(1.0), "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(AxisType.Auto, marks=in_soak), AxisType.Explicit], ids=["auto", "explicit"]
)
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in ("muon", "sophia") else in_soak) for each in OPTIMIZERS]
)
def test_every_optimizer_steps_over_a_mesh_as_on_one_device(name, kind):
    def losses(layout, loss):
        update = ft.make_update(loss, optimizer_of(layout, OPTIMIZERS[name]))
        state, found = update.init(start()), []
        for batch in BATCHES[:4]:
            state, metrics = update(state, batch)
            found.append(float(metrics["loss"]))
        return found

    over = mesh(kind)
    with jax.set_mesh(over):
        found = losses(layout_of("both, zero", over), explicit_loss if kind == AxisType.Explicit else loss_fn)
    np.testing.assert_allclose(found, losses(None, loss_fn), rtol=2e-5)


# Numbers of many leaves.


def reductions(layout, skip=False, **options):
    """How many all-reduces of single numbers a step has, and what it computes."""
    optim = optimizer_of(layout, **options)
    update = ft.make_update(loss_fn, optim, nonfinite="skip" if skip else "ignore")
    compiled = update.lower(update.abstract(start()), BATCHES[0]).compile()
    small = re.compile(r"= [a-z0-9]+\[(?:[1-4])?\]\S* all-reduce(?:-start)?\(")
    return len(small.findall(compiled.as_text()))


NORMS = [{"clip_norm": 0.1}, {"clip_norm": 0.1, "clip_by": "tensor"}, {"skip": True}]


@pytest.mark.parametrize(
    ("options", "name"), some(itertools.product(NORMS, ["both, zero", "fsdp", "tensor", "both"]), 3)
)
def test_a_norm_is_one_collective_however_many_leaves_it_is_of(name, options):
    layout = layout_of(name)
    assert reductions(layout, **options) - reductions(layout) == 1


@pytest.mark.parametrize("by", ["all", "part", "tensor"])
@pytest.mark.parametrize("name", ["both", "both, zero"])
def test_gradients_are_clipped_as_on_one_device(name, by):
    def clipped(layout):
        optim = optimizer_of(layout, optax.sgd(0.1), clip_norm=0.05, clip_by=by)
        update = ft.make_update(loss_fn, optim)
        state, metrics = update.measured(update.init(start()), BATCHES[0])
        return [*map(np.asarray, jax.tree.leaves((state.params, metrics)))]

    for one, other in zip(clipped(layout_of(name)), clipped(None), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_on_one_device_alone_is_skipped_on_all():
    def loss(params, batch):
        return loss_fn(params, batch) + jnp.log(params["head"]["bias"][7] * 0)  # The last slice's alone.

    update = ft.make_update(loss, optimizer_of(layout_of("both")), nonfinite="skip")
    _, metrics = update(update.init(start()), BATCHES[0])
    assert (int(metrics["skipped"]), {part: bool(is_not) for part, is_not in metrics["nonfinite"].items()}) == (
        1, {"head": True, "body": False},
    )  # fmt: skip


def test_a_state_that_is_adopted_lies_where_the_new_layout_has_it_on_other_devices_too():
    fewer = jax.make_mesh((2, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    layouts = [layout_of("data"), layout_of("host"), layout_of("both"), layout_of("fsdp", fewer)]
    updates = [ft.make_update(loss_fn, optimizer_of(each), ema=0.9) for each in layouts]
    state = updates[0].init(start(), key=jax.random.key(0))
    for before, update, batch in zip([updates[0], *updates], updates, BATCHES, strict=False):
        state, report = update.adopt(before, state)
        assert not report.anew.get("body")
        assert all(jax.tree.leaves(jax.tree.map(lies_as, shardings(state), shardings(update.init(start())))))
        state, _ = update(state, batch)
    one = ft.make_update(loss_fn, optimizer_of(None), ema=0.9)
    expected = one.init(start())
    for batch in BATCHES[:4]:
        expected, _ = one(expected, batch)
    for path, leaf in ft.flatten(expected.params).items():
        np.testing.assert_allclose(ft.flatten(state.params)[path], leaf, atol=1e-5)


def test_adoption_keeps_what_is_cut_further_and_on_the_host_in_its_place():
    optim, params = optimizer_of(layout_of("host")), layout_of("host").put(start())
    opt_state, _ = optim.adopt(optim, optim.init(params), params)
    moment = opt_state["body"][0].mu["body/kernel"].sharding
    assert (moment.memory_kind, moment.spec) == ("pinned_host", layout_of("host").of_state("body/kernel").spec)


def test_a_state_of_another_layout_is_warned_of_once_and_adoption_brings_it_to_its_place():
    optims = (optimizer_of(layout_of(name)) for name in ("data", "zero"))
    of_data, of_zero = (ft.make_update(loss_fn, optim, accumulate=2) for optim in optims)
    state = of_data.init(start())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for batch in BATCHES[:4]:
            state, _ = of_zero(state, batch)
    (told,) = [str(each.message) for each in warned]
    assert "the state's 'opt_state/body/0/mu/body/bias' lies in P() over data 4 x model 2, memory 'device', and" in told
    assert "has it in P('data') over data 4 x model 2, memory 'device': it stays" in told
    assert "state, report = update.adopt(update, state)" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, _ = of_zero.adopt(of_zero, state)
        for batch in BATCHES[:2]:
            state, _ = of_zero(state, batch)
    assert state.opt_state["body"][0].mu["body/kernel"].sharding.spec == layout_of("zero").of_state("body/kernel").spec
