"""The audit: what reaches what, found without computing anything, and said before the first step."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import SOAK

import functrain as ft
from functrain.gradients.reach import recording_reach
from functrain.tree.flow import Marks, flow

SGD = optax.sgd(0.1)


def optimizer_of(params, **transforms):
    parts = ft.partition(params, {name: name for name in params})
    return ft.Optimizer(parts, {name: transforms.get(name, SGD) for name in params})


def reached_by_tag(loss, split):
    found = set()
    jax.eval_shape(jax.grad(lambda split: loss(recording_reach(split, found.update))), split)
    return found


# Random programs: a leaf is reached if its gradient is not zero, which for random numbers is no accident.


def scanned(x, w):
    return jax.lax.scan(lambda h, row: (jnp.sin(h * row), None), x, w)[0]


def looped(x, w):
    return jax.lax.fori_loop(0, 3, lambda _, h: jnp.sin(h * w), x)


def branched(x, w):
    return jax.lax.cond(jnp.array(True), lambda x, w: x * w + x, lambda x, w: x + w, x, w)


@jax.custom_vjp
def own(x, w):
    return x * w


own.defvjp(lambda x, w: (x * w, (x, w)), lambda kept, ct: (ct * kept[1], ct * kept[0]))

OPERATIONS = {
    "product": lambda x, w: x * w,
    "sum": lambda x, w: x + w,
    "stopped": lambda x, w: x + jax.lax.stop_gradient(w) * x,
    "first": lambda x, w: x,
    "second": lambda x, w: w * 2.0,
    "jitted": jax.jit(lambda x, w: jnp.tanh(x + w)),
    "jitted first": jax.jit(lambda x, w: x),
    "remat": jax.checkpoint(lambda x, w: jnp.sin(x) * w),
    "rounded": lambda x, w: x + jnp.round(w * 10.0),
    "scan": scanned,
    "loop": looped,
    "cond": branched,
    "custom": own,
}


@st.composite
def programs(draw):
    leaves = draw(st.integers(1, 4))
    node = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99))
    return (
        leaves,
        draw(st.lists(node, min_size=1, max_size=5)),
        draw(st.lists(st.integers(0, 99), min_size=1, max_size=3)),
    )


def losses_of(program):
    leaves, nodes, outputs = program

    def losses(params):
        values = [params[f"w{i}"] for i in range(leaves)]
        for name, one, other in nodes:
            values.append(OPERATIONS[name](values[one % len(values)], values[other % len(values)]))
        return {f"loss{i}": jnp.sum(values[output % len(values)]) for i, output in enumerate(outputs)}

    return losses


@pytest.mark.slow
@settings(max_examples=8 * SOAK)
@given(programs())
def test_a_leaf_is_reached_if_its_gradient_is_not_zero(program):
    losses = losses_of(program)
    keys = jax.random.split(jax.random.key(0), program[0])
    params = {f"w{i}": 0.5 + jax.random.uniform(key, (3,)) for i, key in enumerate(keys)}
    parts = ft.partition(params, {name: name for name in params})
    audit = ft.audit(lambda params, batch: ft.Loss(losses(params)), parts, params, None)
    for name in losses(params):
        grads = jax.grad(lambda params, name=name: losses(params)[name])(params)
        nonzero = {path for path, grad in grads.items() if np.any(grad)}
        assert audit.reached[name] == nonzero
        split = parts.split(params)
        tag = reached_by_tag(lambda split, name=name: losses(parts.merge(split))[name], split)
        # Transposing a loop, JAX makes an array of zeros for what it can't tell from the rest: never the other way.
        assert {path for _, path in tag} >= nonzero
        if not {"scan", "loop", "cond"} & {node[0] for node in program[1]}:
            assert {path for _, path in tag} == nonzero


# What is found.


def model():
    return {"body": jnp.ones((2, 2)), "main": jnp.ones(2), "aux": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}


def two_heads(params, batch):
    hidden = jnp.tanh(batch @ params["body"])
    aux = jax.lax.stop_gradient(hidden) @ params["aux"]["kernel"]
    return ft.Loss({"main": jnp.mean(hidden @ params["main"]), "aux": jnp.mean(aux)})


BATCH = jax.ShapeDtypeStruct((4, 2), jnp.float32)


def test_the_table_has_parts_down_and_losses_across():
    optim = optimizer_of(model(), body=optax.adam(1e-3), main=ft.FROZEN)
    with_heads = ft.audit(two_heads, optim.parts, model(), BATCH, optim=optim, route={"body": "main", "aux": "aux"})
    lines = str(with_heads).splitlines()
    assert [line.split()[:5] for line in lines[:4]] == [
        ["part", "aux", "main", "parameters", "optimizer"],
        ["body", "(0/1)", "1/1", "4", "36"],
        ["main", "(0/1)", "(1/1)", "2", "-"],
        ["aux", "1/2", "(0/2)", "4", "0"],
    ]
    assert lines[2].endswith("frozen")
    assert lines[4].startswith("leaves reached of leaves")
    assert lines[5].startswith(
        "warning: no loss that part 'aux' learns from reaches 'aux/bias' of 'aux': it is not used"
    )
    assert lines[6] == "note: part 'body' has gradients only through the frozen 'main': while that is 0, so are they"
    assert len(lines) == 7


def test_nothing_need_be_in_memory():
    huge = {
        "body": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32),
        "head": jax.ShapeDtypeStruct((2**20,), jnp.float32),
    }
    parts = ft.partition(huge, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": optax.adam(1e-3), "head": SGD})
    batch = jax.ShapeDtypeStruct((2**10, 2**20), jnp.float32)
    found = ft.audit(lambda p, x: jnp.mean(x @ p["body"] @ p["head"]), parts, huge, batch, optim=optim)
    assert found.findings == ()
    assert found.state_bytes == {"body": 2 * 4 * 2**40 + 4, "head": 0}
    # Of the backward pass, x.T @ (g head.T) is body's: 2**51 FLOPs; (x @ body).T @ g and g head.T are 2**31 each.
    assert found.backward["body"] > 0.999
    assert 0 < found.backward["head"] < 1e-3


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda w: 0.0, "it is not used; use it, or freeze it"),
        (lambda w: jnp.sum(jax.lax.stop_gradient(w)), "it is used, but cut off by stop_gradient"),
        (
            lambda w: jnp.argmax(w).astype(jnp.float32),
            "it is used, but cut off by stop_gradient or by an operation that",
        ),
        (lambda w: jnp.sum(jnp.round(w)), "it is used, but cut off"),
    ],
)
def test_a_part_that_no_loss_reaches(use, why):
    params = {"body": jnp.ones(2), "head": {"w": jnp.ones(2)}}
    optim = optimizer_of(params)

    def loss_fn(params, batch):
        return jnp.sum(params["body"] * batch) + use(params["head"]["w"])

    found = ft.audit(loss_fn, optim.parts, params, jnp.ones(2), optim=optim)
    (finding,) = found.findings
    assert (finding.level, finding.part, finding.paths) == ("error", "head", ("head/w",))
    assert "reaches the trained part 'head' ('head/w')" in finding.text
    assert why in finding.text
    with pytest.raises(ft.AuditError, match="the trained part 'head'"):
        found.check()
    update = ft.make_update(loss_fn, optim)
    with pytest.raises(ft.AuditError, match=r"no loss reaches the trained part 'head' \('head/w'\).*write audit=False"):
        update(update.init(params), jnp.ones(2))
    update = ft.make_update(loss_fn, optim, audit=False)
    state, _ = update(update.init(params), jnp.ones(2))
    assert int(state.step) == 1


def test_an_update_warns_of_single_leaves():
    params = model()
    update = ft.make_update(two_heads, optimizer_of(params))
    with pytest.warns(UserWarning, match=r"no loss reaches 'aux/bias', which is trained: .* write audit=False"):
        update(update.init(params), jnp.ones((4, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim = optimizer_of(params, aux=ft.FROZEN)
        update = ft.make_update(lambda p, b: two_heads(p, b).value["main"], optim)
        update(update.init(params), jnp.ones((4, 2)))


def test_a_routed_part_is_reached_by_its_own_losses_alone():
    params = model()
    route = {"body": "aux", "main": "main", "aux": "aux"}
    found = ft.audit(two_heads, optimizer_of(params).parts, params, BATCH, route=route)
    (error, _) = found.findings
    assert error.text.endswith("only 'main' does, which the part does not learn from; route it there, or freeze it")
    update = ft.make_update(two_heads, optimizer_of(params), route=route)
    with pytest.raises(ft.AuditError, match="no loss reaches the trained part 'body'"):
        update(update.init(params), jnp.ones((4, 2)))


def test_phases_are_audited_each_for_its_own_parts():
    params = {"d": jnp.ones(2), "g": jnp.ones(2)}
    optim = optimizer_of(params)

    def d_loss(params, batch, key):
        return jnp.sum(params["d"] * jax.lax.stop_gradient(params["g"]) * jax.random.normal(key, (2,)))

    right = ft.alternate(
        ft.Phase("D", d_loss, "d", repeat=3), ft.Phase("G", lambda p, b: jnp.sum(p["d"] * p["g"]), "g")
    )
    found = ft.audit(right, optim.parts, params, None, optim=optim)
    assert found.reached == {"D": {"d"}, "G": {"d", "g"}}
    assert found.taken == {"d": ("D",), "g": ("G",)}
    assert found.findings == ()
    assert [line.split()[:3] for line in str(found).splitlines()[:3]] == [
        ["part", "D", "G"],
        ["d", "1/1", "(1/1)"],
        ["g", "(0/1)", "1/1"],
    ]
    wrong = ft.alternate(ft.Phase("D", d_loss, "d"), ft.Phase("G", d_loss, "g"))
    assert [finding.level for finding in ft.audit(wrong, optim.parts, params, None, optim=optim).findings] == ["error"]
    update = ft.make_update(wrong, optim)
    state, _ = update(update.init(params, key=jax.random.key(0)), jnp.zeros(()))
    with pytest.raises(ft.AuditError, match="no loss of phase 'G' reaches the trained part 'g'"):
        update(state, jnp.zeros(()))


@pytest.mark.parametrize(
    ("loss_fn", "gates"),
    [
        (lambda p, b: jnp.sum(p["encoder"] * p["head"]), ("head",)),
        (lambda p, b: jnp.sum(p["encoder"] * jnp.reshape(p["head"], (1, 2))[0].astype(jnp.bfloat16)), ("head",)),
        (lambda p, b: jnp.sum(p["encoder"] + p["head"]), ()),
        (lambda p, b: jnp.sum(p["encoder"] * (1 + p["head"])), ()),
        (lambda p, b: jnp.sum(p["encoder"] * p["head"] + jnp.sin(p["encoder"])), ()),
        (lambda p, b: jax.lax.scan(lambda h, w: (h * w, None), p["encoder"].sum(), p["head"])[0], ("head",)),
        (lambda p, b: jnp.sum(jax.checkpoint(lambda e, h: jnp.sin(e) * h)(p["encoder"], p["head"])), ("head",)),
    ],
)
def test_a_part_whose_gradients_all_pass_through_a_frozen_leaf(loss_fn, gates):
    params = {"encoder": jnp.ones(2), "head": jnp.zeros(2)}
    optim = optimizer_of(params, head=ft.FROZEN)
    found = ft.audit(loss_fn, optim.parts, params, None, optim=optim)
    notes = [finding for finding in found.findings if finding.level == "note"]
    assert bool(notes) == bool(gates)
    # A frozen leaf that is 0 leaves no gradient, which is what the note is for.
    grads, _ = ft.make_train_step(loss_fn, optim.parts, wrt=optim.trained)(params, None)
    assert bool(gates) == (not np.any(grads["encoder"]["encoder"]))
    if gates:
        assert notes[0].text.startswith("part 'encoder' has gradients only through the frozen 'head'")


def test_what_freezing_a_part_saves_is_its_share_of_the_backward_pass():
    width, layers = 64, 4
    params = {f"layer{i}": jnp.ones((width, width)) for i in range(layers)}

    def loss_fn(params, batch):
        for i in range(layers):
            batch = batch @ params[f"layer{i}"]
        return jnp.sum(batch**2)

    optim = optimizer_of(params)
    found = ft.audit(loss_fn, optim.parts, params, jax.ShapeDtypeStruct((32, width), jnp.float32), optim=optim)
    # Seven products: of each layer its own gradient, and of all but the first one that all layers before it need.
    for i in range(layers):
        own, shared = 1, 1 if i == 0 else 0
        np.testing.assert_allclose(found.backward[f"layer{i}"], (own + shared) / 7, atol=0.01)


def test_arguments_that_a_loss_declares_are_given():
    def loss_fn(params, batch, key, model_state, step):
        assert step.shape == ()
        return ft.Loss(jnp.sum(params["w"]) * model_state["scale"] + jax.random.normal(key), model_state=model_state)

    params = {"w": jnp.ones(2)}
    parts = ft.partition(params, {"all": ...})
    found = ft.audit(loss_fn, parts, params, None, model_state={"scale": jax.ShapeDtypeStruct((), jnp.float32)})
    assert found.reached == {"loss": {"w"}}
    with pytest.raises(ft.LossError, match="declares 'model_state'"):
        ft.audit(loss_fn, parts, params, None)


def test_leaves_that_are_no_arrays_or_not_floating_point_are_left_alone():
    params = {"w": jnp.ones(2), "count": jnp.zeros((), jnp.int32), "activation": jnp.tanh}
    parts = ft.partition(params, {"static": ft.non_float, "rest": ...})
    found = ft.audit(lambda p, b: jnp.sum(p["activation"](p["w"])) + p["count"], parts, params, None)
    assert found.trained == ("rest",)
    assert found.findings == ()
    assert "frozen" in str(found).splitlines()[1]


def test_the_check_of_an_update_changes_no_bit_and_no_operation():
    params = model()
    batch = jax.random.normal(jax.random.key(0), (4, 2))

    def loss_fn(params, batch):
        return two_heads(params, batch).total + jnp.sum(params["aux"]["bias"] ** 2)

    compiled = []
    for audit in (True, False):
        update = ft.make_update(loss_fn, optimizer_of(params), audit=audit)
        text = update.lower(update.init(params), batch).compile().as_text()
        compiled.append([line.split(", metadata")[0] for line in text.splitlines() if "metadata" in line])
    assert compiled[0] == compiled[1]


def test_the_flow_through_a_jaxpr_knows_copies_from_computations():
    def program(w, dx):
        return jnp.transpose(w)[0] * dx, (w[0] + 1.0) * dx

    jaxpr = jax.make_jaxpr(program)(jnp.ones((2, 2)), jnp.ones(2)).jaxpr
    gated, free = flow(jaxpr, [Marks(uses=1, gates=1), Marks(tangents=2, free=2)])
    assert (gated.tangents, gated.free) == (2, 0)
    assert (free.tangents, free.free) == (2, 2)
