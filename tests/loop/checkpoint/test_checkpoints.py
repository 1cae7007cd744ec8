"""Checkpoints: what is saved comes back, to the bit."""

import dataclasses
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from states import KEY, batch_of, names, one_part, simple, squares, updated
from trees import KEYS, Model, Pair, bits, nnx_model, says

import functrain as ft
from functrain.errors import CheckpointError


class Case(NamedTuple):
    """A run: an update, its state, batches before it is saved, and what `update.abstract` takes besides params."""

    update: ft.Update
    params: object
    batches: list
    given: dict


def case(loss_fn, params, batches, *, tx=None, rules=None, given=None, **options):
    parts = ft.partition(params, rules or {"all": ...})
    txs = {part: ft.FROZEN if part == "frozen" else tx or optax.adam(0.1) for part in parts.names}
    return Case(ft.make_update(loss_fn, ft.Optimizer(parts, txs), **options), params, batches, given or {})


def dtypes():
    floats = {dtype: jnp.arange(1, 4, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}
    others = {dtype: jnp.arange(3).astype(dtype) for dtype in ("bool", "int4", "uint8", "int32", "float8_e4m3fn")}
    rules = {"frozen": lambda path, leaf: path.startswith("others"), "all": ...}
    return case(lambda params, batch: batch * squares(params["floats"]), {"floats": floats, "others": others},
                [1.0, 2.0], rules=rules)  # fmt: skip


def random_keys():
    def loss_fn(params, batch, key, model_state):
        noise = jax.random.normal(key, (3,)) + jax.random.normal(model_state["dropout"], (3,))
        new = model_state | {"dropout": jax.random.split(model_state["dropout"])[0], "seen": model_state["seen"] + 1}
        return ft.Loss(jnp.sum(params["w"] * noise * batch), model_state=new)

    others = {"rbg": jax.random.key(2, impl="rbg"), "raw": jax.random.PRNGKey(3), "many": jax.random.split(KEY, 2)}
    model_state = {"dropout": jax.random.key(1), "seen": jnp.int8(0), **others}
    return case(loss_fn, {"w": jnp.ones(3)}, [1.0, 2.0], given={"key": KEY, "model_state": model_state})


def keys_of_a_model_alone():
    def loss_fn(params, batch, model_state):
        noise = jax.random.normal(model_state["dropout"])
        return ft.Loss(params["w"] * noise, model_state={"dropout": jax.random.split(model_state["dropout"])[0]})

    model_state = {"dropout": jax.random.key(1, impl="rbg")}
    return case(loss_fn, {"w": jnp.ones(())}, [1.0], given={"model_state": model_state})


def a_window():
    def loss_fn(params, batch, key):
        metrics = {"list": [batch, (batch, jnp.zeros(2))], "tuple": (batch,), "numbers": {3: batch, 10: batch},
                   "empty": jnp.zeros((0, 2)), "a/b": batch, "none": None, "nothing": {}}  # fmt: skip
        return ft.Loss({"main": batch * squares(params), "aux": batch}, weight=3, metrics=metrics)

    params = {"w": jnp.ones((2, 3)), "half": jnp.ones(3, jnp.bfloat16), "empty": jnp.zeros((0, 4))}
    return case(loss_fn, params, [jnp.float32(1 / 3), jnp.float32(2 / 3)], given={"key": KEY}, accumulate=3)


def a_cycle(batches, accumulate=1):
    params = {"d": jnp.ones(3), "g": jnp.arange(3.0)}
    phases = ft.alternate(
        ft.Phase("d", lambda params, batch: batch * jnp.sum((params["d"] - params["g"]) ** 2), "d", repeat=3),
        ft.Phase("g", lambda params, batch: -batch * jnp.sum((params["d"] - params["g"]) ** 2), "g"),
    )
    return case(phases, params, [1.0 + i for i in range(batches)], rules={"d": "d", "g": "g"}, accumulate=accumulate)


def a_loss_scale():
    return case(lambda params, batch: jnp.sum(params["w"] * batch), {"w": jnp.ones(3)}, [1.0, 1e9, 1.0],
                compute_dtype=jnp.float16, loss_scale=ft.DynamicScale(2.0**10, period=2))  # fmt: skip


def empty_leaves():
    params = {"w": jnp.ones(2), "none": jnp.zeros((0, 3)), "frozen": jnp.zeros((2, 0), jnp.int32)}
    return case(lambda params, batch: batch * squares(params), params, [1.0], rules={"frozen": "frozen", "all": ...})


def flax_nnx():
    graph, params, rest = nnx.split(nnx_model(), nnx.Param, ...)

    def loss_fn(params, batch, model_state):
        model = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, model_state))
        found = model.dropout(model.norm(model.blocks[1](model.blocks[0](model.conv(batch)))))
        return ft.Loss(jnp.mean(found**2) + squares(model.lora.get_value()), model_state=nnx.state(model, rest_filter))

    rest_filter = nnx.filterlib.Not(nnx.Param)
    return case(loss_fn, params, [jnp.ones((1, 3, 3, 1)), jnp.zeros((1, 3, 3, 1))], given={"model_state": rest})


def equinox():
    params, static = eqx.partition(eqx.nn.MLP(2, 1, 3, 1, key=KEY), eqx.is_array)
    return case(lambda params, batch: jnp.sum(eqx.combine(params, static)(batch) ** 2), params, [jnp.ones(2)])


def awkward_names():
    more = [
        "a/b",
        "a/b/.zarray",
        "0",
        "0.0",
        ".zarray",
        ".",
        "..",
        "params",
        "window/x",
        "+",
        "~",
        "x~1",
        "%2F",
        "\\",
        '"',
    ]
    params = {name: jnp.full(2, float(i)) for i, name in enumerate(dict.fromkeys(KEYS + more))}
    return case(lambda params, batch: batch * squares(params), {"deep": params, "a.b": jnp.ones(2)}, [1.0])


def containers():
    params = {"none": None, "dict": {}, "list": [None, (), jnp.ones(1)], "pair": Pair((jnp.ones(2),), []),
              "model": Model({3: jnp.ones(1)}, None, activation="tanh")}  # fmt: skip
    return case(lambda params, batch: batch * squares(params), params, [1.0], given={"model_state": {}})


def a_bare_array():
    return case(lambda params, batch: jnp.sum(params**2) * batch, jnp.ones(3), [1.0])


CASES = {
    "dtypes": dtypes,
    "random keys": random_keys,
    "keys of a model alone": keys_of_a_model_alone,
    "a window": a_window,
    "two of four turns": lambda: a_cycle(2),
    "a window within a cycle": lambda: a_cycle(7, accumulate=2),
    "the last turn's window": lambda: a_cycle(10, accumulate=3),
    "a loss scale": a_loss_scale,
    "empty leaves": empty_leaves,
    "Flax NNX": flax_nnx,
    "Equinox": equinox,
    "awkward names": awkward_names,
    "containers": containers,
    "a bare array": a_bare_array,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_bit_comes_back_and_trains_on_to_the_same_bits(tmp_path, name):
    update, params, batches, given = CASES[name]()
    state = update.init(params, **given)
    for batch in batches:
        state, _ = update(state, batch)
    before, form = bits(state), jax.tree.structure(state)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)  # In the background: the state is trained on at once.
        for batch in [*batches, *batches]:
            state, _ = update(state, batch)
        restored = checkpoints.restore(like=update.abstract(params, **given)).state
    assert bits(restored) == before
    assert jax.tree.structure(restored) == form
    for batch in [*batches, *batches]:
        restored, _ = update(restored, batch)
    assert bits(restored) == bits(state)


def test_an_asynchronous_save_has_the_values_of_its_moment(tmp_path):
    params = {"w": jax.random.normal(KEY, (2_000_000,))}
    update = ft.make_update(lambda params, batch: batch * jnp.sum(params["w"] ** 2), one_part(params))
    state, _ = update(update.init(params), 1.0)
    before = bits(state)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state, _ = update(state, 1.0)
        assert bits(checkpoints.restore(like=state).state) == before


def test_a_save_that_writes_over_the_copy_of_the_one_before_it_changes_no_checkpoint(tmp_path):
    update, params, state = simple(accumulate=2)
    saved = []
    with ft.Checkpoints(tmp_path, keep_last=6) as checkpoints:
        for number in range(6):  # Every other one has a pending window.
            state, _ = update(state, batch_of(number))
            checkpoints.save(state)
            saved.append(bits(state))
        checkpoints.wait()
        read = [checkpoints.restore(like=update.abstract(params), step=path).state for path in checkpoints.steps()]
    assert [bits(state) for state in read] == saved


def test_what_is_restored_is_consumed_in_place(tmp_path):
    update, params, state = updated(1)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(like=update.abstract(params)).state
    consumed = jax.tree.leaves((restored.params, restored.opt_state["head"]))
    held = [leaf.unsafe_buffer_pointer() for leaf in consumed]
    new, _ = update(restored, batch_of(1))
    assert all(leaf.is_deleted() for leaf in consumed)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((new.params, new.opt_state["head"]))] == held


def test_what_was_on_no_device_for_good_still_goes_where_the_batch_is(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    update, _, state = simple()
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(like=state).state
    assert not any(leaf.committed for leaf in jax.tree.leaves((restored.params, restored.opt_state)))
    spread = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P("data")))
    state, restored = update(state, spread)[0], update(restored, spread)[0]
    assert bits(restored) == bits(state)
    assert restored.params["head"].sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P()), 1)


class Named(NamedTuple):
    accuracy: object


@pytest.mark.parametrize("metrics", [{"all": Named(jnp.ones(()))}, {"all": {("a", 1): jnp.ones(())}}])
def test_a_pending_window_with_metrics_that_have_no_names_is_refused(tmp_path, metrics):
    params = {"w": jnp.ones(2)}
    update = ft.make_update(
        lambda params, batch: ft.Loss(jnp.sum(params["w"]), metrics=metrics), one_part(params), accumulate=2
    )
    state, _ = update(update.init(params), 0.0)
    with ft.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            CheckpointError, match=says("a pending window hold a", "lists, tuples, and dicts with keys")
        ):
            checkpoints.save(state)
        assert names(checkpoints) == []
        state, _ = update(state, 0.0)
        checkpoints.save(state)
    assert names(checkpoints) == ["1"]


@pytest.mark.parametrize("data", [None, b"\x00\xff", {"next": [1, 2.5, None, "é"]}, math.inf])
def test_data_metrics_and_more_come_back(tmp_path, data):
    update, params, state = updated(1)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data=data, metrics={"loss": np.float32(0.5)}, extra={"epoch": 3})
        restored = checkpoints.restore(like=update.abstract(params))
    assert restored[1:] == (data, {"loss": 0.5}, {"epoch": 3}, tmp_path / "1", (), None)


@pytest.mark.parametrize("name", ["data", "extra"])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, name):
    _, _, state = updated(1)
    with ft.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=says(f"{name}=", "int32", "what JSON can hold, or bytes")):
            checkpoints.save(state, **{name: {"position": np.int32(3)}})
        checkpoints.save(state)
    assert names(checkpoints) == ["1"]


@pytest.mark.parametrize("dtype", [np.int32, jnp.int32, np.int64])
def test_counters_of_any_size_are_restored_with_64_bits(tmp_path, dtype):
    """Those that were saved with 32 bits, and those that a program of one's own gave back."""
    update, params, state = updated(1)
    number = 7 if dtype != np.int64 else 2**31 + 7
    state = dataclasses.replace(state, step=dtype(number), batches=dtype(number), pending=dtype(0))
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    restored = ft.Checkpoints(tmp_path).restore(like=update.abstract(params))
    assert restored.path.name == str(number)
    for name, value in (("step", number), ("batches", number), ("pending", 0)):
        counter = getattr(restored.state, name)
        assert (int(counter), counter.dtype, counter.shape) == (value, np.int64, ())
    ft.Checkpoints(tmp_path).restore(like=state)  # Nor does it matter what they are asked for as.
    after, _ = update(restored.state, batch_of(1))
    assert int(after.step) == number + 1
