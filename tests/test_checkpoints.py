"""Checkpoints: every bit comes back, a damaged one is never used, and a save that failed is told."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trees import KEYS, Model, Pair, nnx_model, says

import functrain as ft
from functrain.errors import CheckpointError, SaveError
from functrain.loop import manifest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_donation_is_lost():
    """JAX warns where a donated buffer can't be used: then a copy is made that nobody asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        yield


def bits(tree):
    """Path, dtype, shape and bytes of every leaf."""

    def of(leaf):
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        return str(leaf.dtype), array.shape, array.tobytes()

    return {path: of(leaf) for path, leaf in ft.flatten(tree).items()}


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def squares(tree):
    """A loss that reaches every leaf that is floating point."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not ft.non_float("", leaf)]
    return sum(jnp.sum(jnp.square(jnp.asarray(leaf, jnp.float32))) for leaf in leaves)


def one_part(params, tx=None):
    return ft.Optimizer(ft.partition(params, {"all": ...}), {"all": tx or optax.adam(0.1)})


def simple(accumulate=1, **options):
    """An update of two parts, its params, and a state to start with."""
    params = {"body": {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}, "head": jnp.arange(3.0)}
    parts = ft.partition(params, {"body": "body", "head": "head"})
    optim = ft.Optimizer(parts, {"body": ft.with_lr(optax.adam, 0.1), "head": optax.sgd(0.1, momentum=0.9)})
    update = ft.make_update(
        lambda params, batch: jnp.mean((batch @ params["body"]["w"] * params["head"] - 1) ** 2), optim,
        accumulate=accumulate, **options,
    )  # fmt: skip
    return update, params, update.init(params)


def batch_of(number):
    return jnp.sin(jnp.arange(8.0).reshape(2, 4) + number)


@functools.cache
def updated(count, accumulate=1):
    """The params and a state after some batches; nobody trains on it."""
    update, params, state = simple(accumulate)
    for number in range(count):
        state, _ = update(state, batch_of(number))
    return update, params, state


def at(step, state, batches=None):
    """The same arrays as the state of another step."""
    numbers = {"step": step, "batches": step if batches is None else batches}
    return dataclasses.replace(state, **{name: np.asarray(number, np.int32) for name, number in numbers.items()})


def names(checkpoints):
    return [path.name for path in checkpoints.steps()]


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# What is saved comes back, to the bit.


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


KEY = jax.random.key(7)


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
    assert restored[1:] == (data, {"loss": 0.5}, {"epoch": 3}, tmp_path / "1")


@pytest.mark.parametrize("name", ["data", "extra"])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, name):
    _, _, state = updated(1)
    with ft.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=says(f"{name}=", "int32", "what JSON can hold, or bytes")):
            checkpoints.save(state, **{name: {"position": np.int32(3)}})
        checkpoints.save(state)
    assert names(checkpoints) == ["1"]


# Damage.


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with the checkpoints 1 and 2, of which each has its own data."""
    update, _, state = simple()
    with ft.Checkpoints(tmp_path_factory.mktemp("sound")) as checkpoints:
        for number in range(2):
            state, _ = update(state, batch_of(number))
            checkpoints.save(state, data={"position": number + 1})
    return checkpoints.directory


def like():
    update, params, _ = updated(0)
    return update.abstract(params)


def copied(sound, tmp_path):
    tmp_path.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(shutil.copytree(sound, tmp_path / "copy"))


def everything(directory):
    """The files and their bytes, and the folders."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_out(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    for inner in path.iterdir():
        shutil.rmtree(inner) if inner.is_dir() else inner.unlink()


HARMS = {
    "truncate": truncate, "zero out": zero_out, "flip a bit": flip, "delete": pathlib.Path.unlink,
    "delete folder": shutil.rmtree, "empty folder": empty,
}  # fmt: skip


def kind(name):
    """What Orbax calls a file, but for the hashes that its data files are named by."""
    return re.sub(r"[0-9a-f]{32}", "data", name)


def harmed(sound, tmp_path, harm):
    """What a harm can be done to in checkpoint 2, and a copy of the folder where it was done."""
    found = [path for path in sorted(sound.rglob("*")) if path.relative_to(sound).parts[0] in ("2", "2.manifest.json")]
    found = [path for path in found if path.is_dir() == harm.endswith("folder")]
    if harm in ("zero out", "delete"):  # For these one of each kind is enough.
        found = list({kind(str(path)): path for path in found}.values())
    for number, path in enumerate(found):
        directory = copied(sound, tmp_path / str(number))
        HARMS[harm](directory / path.relative_to(sound))
        assert everything(directory) != everything(sound)
        name = str(path.relative_to(sound))
        if (name, harm) != ("2.manifest.json", "delete"):  # Which leaves it unverified.
            yield name, directory


def test_the_matrix_has_every_kind_of_file(sound, tmp_path):
    files = {kind(name) for name, _ in harmed(sound, tmp_path / "files", "truncate")}
    folders = {name for name, _ in harmed(sound, tmp_path / "folders", "empty folder")}
    assert {"2.manifest.json", "2/facts/metadata", "2/state/_METADATA", "2/state/ocdbt.process_0/d/data"} < files
    assert {"2", "2/facts", "2/state", "2/state/ocdbt.process_0/d"} < folders


@pytest.mark.parametrize("harm", HARMS)
def test_the_latest_is_set_aside_when_damaged_and_the_one_before_it_is_used(sound, tmp_path, harm):
    for name, directory in harmed(sound, tmp_path, harm):
        before = everything(directory)
        with ft.Checkpoints(directory) as checkpoints:
            with pytest.warns(UserWarning, match=says(str(directory / "2"), "IS DAMAGED", "'2.corrupt'")) as caught:
                restored = checkpoints.restore(like=like())
            assert (restored.data, restored.path.name, len(caught)) == ({"position": 1}, "1", 1), name
            assert bits(restored.state) == bits(updated(1)[2])
            assert names(checkpoints) == ["1"]
        after = {path.replace("2.corrupt", "2"): content for path, content in everything(directory).items()}
        assert after == before, "something was deleted"


@pytest.mark.parametrize("harm", HARMS)
def test_one_that_is_asked_for_is_an_error_when_damaged_and_stays_where_it_is(sound, tmp_path, harm):
    for name, directory in harmed(sound, tmp_path, harm):
        before = everything(directory)
        inner = name.removeprefix("2/")
        what = f"'{inner}/" if harm.endswith("folder") else f"'{inner}'"
        if inner == "2":
            what = "its folder is missing" if harm == "delete folder" else "is missing"
        for step in (2, directory / "2"):
            with pytest.raises(CheckpointError, match=says(f"{directory / '2'} is damaged", what)):
                ft.Checkpoints(directory).restore(like=like(), step=step)
        assert everything(directory) == before


def test_a_sound_one_can_be_asked_for_beside_a_damaged_one(sound, tmp_path):
    directory = copied(sound, tmp_path)
    flip(directory / "2" / "facts" / "metadata")
    for step in (1, directory / "1"):
        assert ft.Checkpoints(directory).restore(like=like(), step=step).data == {"position": 1}


def test_a_folder_that_is_gone_is_missed_as_its_manifest_is_there(sound, tmp_path):
    directory = copied(sound, tmp_path)
    shutil.rmtree(directory / "2")
    with pytest.raises(CheckpointError, match=says("damaged: its folder is missing", "restore another of 1")):
        ft.Checkpoints(directory).restore(like=like(), step=2)
    with pytest.warns(UserWarning, match=says("IS DAMAGED", "its folder is missing")):
        assert ft.Checkpoints(directory).restore(like=like()).path == directory / "1"
    assert (directory / "2.corrupt.manifest.json").exists()


def test_no_bit_of_a_manifest_can_flip_unseen(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "weights").write_bytes(b"1234")
    manifest.publish(tmp_path / "1", {"batches": 3, "metrics": {"valid/loss": 0.5}})
    path, written = manifest.path_of(tmp_path / "1"), manifest.read(tmp_path / "1")
    for position in range(8 * path.stat().st_size):
        flipped = bytearray(path.read_bytes())
        flipped[position // 8] ^= 1 << position % 8
        changed = tmp_path / "2.manifest.json"
        changed.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            assert manifest.read(tmp_path / "2") == written


NO_MANIFESTS = [b"", b"[]", b"{}", b"null", b"\xff", b'{"body": 1, "crc32": 1}', b'{"body": "[]"}']


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_damage(sound, tmp_path, content):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").write_bytes(content)
    with pytest.raises(CheckpointError, match=says("damaged: '2.manifest.json' is not what was written")):
        ft.Checkpoints(directory).restore(like=like(), step=2)


def test_without_a_manifest_it_is_used_with_a_warning(sound, tmp_path):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    for step in (None, 2):
        with pytest.warns(UserWarning, match=says(str(directory / "2"), "is unverified")):
            restored = ft.Checkpoints(directory).restore(like=like(), step=step)
        assert restored.data == {"position": 2}
        assert bits(restored.state) == bits(updated(2)[2])


@pytest.mark.parametrize("folder", ["facts", "state", "."])
def test_without_a_manifest_and_unreadable_it_is_set_aside(sound, tmp_path, folder):
    directory = copied(sound, tmp_path)
    manifest.path_of(directory / "2").unlink()
    empty(directory / "2" / folder)
    with pytest.raises(CheckpointError, match=says("damaged")):
        ft.Checkpoints(directory).restore(like=like(), step=2)
    with pytest.warns(UserWarning, match="IS DAMAGED"):
        assert ft.Checkpoints(directory).restore(like=like()).path == directory / "1"
    assert (directory / "2.corrupt").is_dir()


def test_where_all_are_damaged_nothing_is_restored_and_each_is_told(sound, tmp_path):
    directory = copied(sound, tmp_path)
    for step in "12":
        flip(directory / step / "facts" / "metadata")
    with pytest.warns(UserWarning, match="IS DAMAGED") as caught:
        assert ft.Checkpoints(directory).restore(like=like()) is None
    assert all(str(directory / step) in str(warning.message) for step, warning in zip("21", caught, strict=True))
    kept = {f"{step}.corrupt{suffix}" for step in "12" for suffix in ("", ".manifest.json")}
    assert set(os.listdir(directory)) == kept | {".lock"}


def test_damaged_ones_of_one_name_are_kept_side_by_side(sound, tmp_path):
    directory = copied(sound, tmp_path)
    for aside in ("2.corrupt", "2.corrupt2", "2.corrupt3"):
        shutil.copytree(sound / "2", directory / "2", dirs_exist_ok=True)
        shutil.copy(manifest.path_of(sound / "2"), directory)
        flip(directory / "2" / "facts" / "metadata")
        with pytest.warns(UserWarning, match=says(repr(aside))):
            ft.Checkpoints(directory).restore(like=like())
        assert (directory / aside / "facts").is_dir()


def test_an_empty_or_missing_folder_has_nothing_to_restore(tmp_path):
    assert ft.Checkpoints(tmp_path).restore(like=like()) is None
    assert ft.Checkpoints(tmp_path / "new").restore(like=like()) is None
    assert not (tmp_path / "new").exists()


# Killed in the middle. Python tells of every operation on a file before it is done; the module needs no JAX.

KILLED = """
import importlib.util, os, pathlib, signal, sys

spec = importlib.util.spec_from_file_location("manifest", sys.argv[1])
manifest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(manifest)
left = int(sys.argv[4])

def hook(event, arguments):
    global left
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

step = pathlib.Path(sys.argv[3])
sys.addaudithook(hook)
manifest.publish(step, {}) if sys.argv[2] == "publish" else getattr(manifest, sys.argv[2])(step)
"""


@pytest.mark.parametrize("operation", ["publish", "remove", "set_aside"])
def test_killed_at_any_point_nothing_damaged_looks_sound(tmp_path, operation):
    for nth in range(1, 20):
        step = tmp_path / str(nth) / "7"
        (step / "state").mkdir(parents=True)
        for name in ("a", "state/b"):
            (step / name).write_bytes(b"1234")
        if operation != "publish":
            manifest.publish(step, {})
        if operation == "set_aside":
            flip(step / "state" / "b")
        command = [sys.executable, "-c", KILLED, manifest.__file__, operation, str(step), str(nth)]
        ended = subprocess.run(command, check=False).returncode
        files = {path.name for path in step.parent.rglob("*") if path.is_file()}
        if operation == "publish":
            assert manifest.damage(step) is None  # Whole with or without a manifest, which is never half of one.
        elif operation == "remove":
            assert not step.exists() or manifest.damage(step) is None
            assert not manifest.path_of(step).exists() or step.exists()
        else:
            assert not step.exists() or manifest.damage(step) == "'state/b' is not what was written"
            assert {"a", "b"} <= files
        manifest.clear(step.parent)
        assert not [path for path in step.parent.iterdir() if path.name.startswith(".")]
        if ended == 0:
            break
    assert ended == 0
    assert nth > 2


# Saves that fail.


def run(script, *arguments, **options):
    """A script in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


PRELUDE = """
    import contextlib, json, os, pathlib, resource, sys, warnings
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_platforms", "cpu")
    import functrain as ft
    from functrain.errors import CheckpointError, SaveError

    params = {"w": jax.random.normal(jax.random.key(0), (100_000,))}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(lambda params, batch: jnp.mean(params["w"] ** 2) * jnp.mean(batch["x"]), optim)
    state = update.init(params)
    batch = {"x": jnp.ones(2)}

    def room(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def tried(attempt):
        try:
            attempt()
        except Exception as error:
            return [type(error).__name__, str(error)]
"""

FAILING = """
    found = {}
    full, free = {"limit": (lambda: room(50_000), lambda: room(resource.RLIM_INFINITY)),
                  "disk": (lambda: filler.write_bytes(bytes(400_000)), lambda: filler.unlink())}[sys.argv[2]]
    directory = pathlib.Path(sys.argv[1])
    filler = directory / "filler"
    checkpoints = ft.Checkpoints(directory, keep_last=3)
    state, _ = update(state, batch)
    checkpoints.save(state)
    checkpoints.wait()
    full()
    for attempt in ("second", "third"):
        state, _ = update(state, batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save = tried(lambda: checkpoints.save(state))
        found[attempt] = {"save": save, "wait": tried(checkpoints.wait), "steps": [p.name for p in checkpoints.steps()],
                          "warnings": [str(w.message) for w in caught],
                          "left": sorted(p.name for p in directory.glob("*tmp*"))}
    found["restored"] = int(checkpoints.restore(like=state).state.step)
    found["close"] = tried(checkpoints.close)
    free()
    state, _ = update(state, batch)
    checkpoints.save(state)
    found["fourth"] = tried(checkpoints.wait)
    found["again"] = tried(checkpoints.close)
    restored = checkpoints.restore(like=state)
    found["steps"] = [p.name for p in checkpoints.steps()]
    found["same"] = bool((restored.state.params["w"] == state.params["w"]).all())
    print(json.dumps(found))
"""


def check_failing(ended):
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    for attempt, step in (("second", "2"), ("third", "3")):
        told = found[attempt]["wait"]
        assert told[0] == "SaveError"
        assert re.search(says(f"/{step} could not be written", "the one before it is whole", "the next save"), told[1])
        assert found[attempt]["save"] in (None, told)
        assert found[attempt]["steps"] == ["1"]
        assert found[attempt]["left"] == []
    assert not any("could not be written" in text for text in found["second"]["warnings"])
    assert any(re.search(says("/2 could not be written", "saving again now"), w) for w in found["third"]["warnings"])
    assert found["restored"] == 1
    assert found["close"][0] == "SaveError"
    assert (found["fourth"], found["again"]) == (None, None)
    assert (found["steps"], found["same"]) == (["1", "4"], True)


def test_files_that_cannot_grow_fail_a_save_and_the_next_one_is_tried(tmp_path):
    check_failing(run(FAILING, tmp_path, "limit"))


def test_a_full_disk_fails_a_save_and_the_next_one_is_tried(tmp_path):
    mount = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    script = f'mount -t tmpfs -o size=1200k none {tmp_path} && exec "$@"'
    if subprocess.run([*mount, script, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(FAILING)
    command = [*mount, script, "sh", sys.executable, "-c", code, str(tmp_path), "disk"]
    check_failing(subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT))


@pytest.mark.parametrize("way", ["with", "fit"])
def test_a_program_whose_last_save_failed_ends_with_an_error(tmp_path, way):
    ended = run(
        """
        if sys.argv[2] == "with":
            with ft.Checkpoints(sys.argv[1]) as checkpoints:
                checkpoints.save(state)
                state, _ = update(state, batch)
                checkpoints.wait()
                room(50_000)
                with contextlib.suppress(SaveError):
                    checkpoints.save(state)
        else:
            class Full(ft.Hook):
                def checkpoint_saved(self, run):
                    run._checkpoints.wait()
                    room(50_000)

            data = ft.from_arrays({"x": np.ones(4, np.float32)}, batch_size=2)
            ft.fit(update, state, data, epochs=2, checkpoints=ft.Checkpoints(sys.argv[1]), hooks=[Full()])
        print("went on")
        """,
        tmp_path, way,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "went on" not in ended.stdout
    assert re.search(says("SaveError: the checkpoint", "could not be written"), ended.stderr)
    assert names(ft.Checkpoints(tmp_path)) == [{"with": "0", "fit": "2"}[way]]


def test_who_may_not_write_gets_an_error_and_may_still_read_what_is_sound():
    with tempfile.TemporaryDirectory() as directory:  # Pytest's own folders are nobody's but ours.
        pathlib.Path(directory).chmod(0o755)
        ended = run(
            """
            directory = pathlib.Path(sys.argv[1])
            with ft.Checkpoints(directory / "it", keep_last=3) as checkpoints:
                for _ in range(2):
                    state, _ = update(state, batch)
                    checkpoints.save(state)
                checkpoints.restore(like=state)
            (directory / "it" / "2" / "facts" / "metadata").chmod(0)
            (directory / "it").chmod(0o555)
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)  # Nobody.
            found = {}
            for name, folder in (("it", directory / "it"), ("new", directory / "it" / "new")):
                found[name] = tried(lambda: ft.Checkpoints(folder).save(state))
            found["asked"] = tried(lambda: ft.Checkpoints(directory / "it").restore(like=state, step=2))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found["step"] = int(ft.Checkpoints(directory / "it").restore(like=state).state.step)
            found["warnings"] = [str(warning.message) for warning in caught]
            found["files"] = sorted(os.listdir(directory / "it"))
            print(json.dumps(found))
            """,
            directory,
        )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    for name in ("it", "new"):
        assert found[name][0] == "SaveError"
        assert re.search(says("can't be written to", "Permission denied"), found[name][1])
    assert found["asked"][0] == "CheckpointError"
    assert re.search(says("damaged: 'facts/metadata' cannot be read"), found["asked"][1])
    assert found["step"] == 1
    assert re.search(says("IS DAMAGED", "'facts/metadata' cannot be read", "kept as '2'"), found["warnings"][0])
    assert found["files"] == [".lock", "1", "1.manifest.json", "2", "2.manifest.json"]


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=says(str(tmp_path / "file/runs"), "can't be written to")):
        ft.Checkpoints(tmp_path / "file/runs").save(updated(0)[2])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_manifest_that_cannot_be_written_fails_the_save(tmp_path, asynchronous):
    _, _, state = updated(1)
    checkpoints = ft.Checkpoints(tmp_path, asynchronous=asynchronous, keep_last=9)
    checkpoints.save(at(1, state))
    checkpoints.wait()
    in_the_way = tmp_path / ".2.manifest.json.tmp"
    in_the_way.mkdir()

    def save():
        checkpoints.save(at(2, state))
        checkpoints.wait()

    with pytest.raises(SaveError, match=says("/2 could not be written: IsADirectoryError")):
        save()
    in_the_way.rmdir()
    with pytest.warns(UserWarning, match=says("/2 could not be written", "saving again now")):
        checkpoints.save(at(2, state))
    checkpoints.close()
    assert names(checkpoints) == ["1", "2", "2~2"]
    assert checkpoints.restore(like=state).path.name == "2~2"


def test_what_cannot_be_removed_is_told_and_fails_no_save(tmp_path):
    _, _, state = updated(1)
    checkpoints = ft.Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(at(1, state))
    checkpoints.close()
    manifest.path_of(tmp_path / "1").unlink()
    (manifest.path_of(tmp_path / "1") / "in the way").mkdir(parents=True)
    checkpoints = ft.Checkpoints(tmp_path, keep_last=1, asynchronous=False)
    with pytest.warns(UserWarning, match=says(str(tmp_path / "1"), "could not be removed")):
        checkpoints.save(at(2, state))
    assert names(checkpoints) == ["1", "2"]


def test_a_failed_save_is_told_beside_the_error_that_ends_a_with_block(tmp_path):
    _, _, state = updated(1)

    def interrupted():
        with ft.Checkpoints(tmp_path) as checkpoints:
            checkpoints.open()
            (tmp_path / ".1.manifest.json.tmp").mkdir()
            checkpoints.save(state)
            raise KeyError("another")

    with pytest.raises(KeyError) as raised:
        interrupted()
    assert re.search(says("/1 could not be written"), raised.value.__notes__[0])


def test_closed_twice_and_used_again(tmp_path):
    _, _, state = updated(1)
    checkpoints = ft.Checkpoints(tmp_path)
    checkpoints.close()
    for step in (1, 2):
        checkpoints.save(at(step, state))
        checkpoints.close()
        checkpoints.close()
    assert names(checkpoints) == ["1", "2"]


# Which survive.


def saved(checkpoints, metrics, first=1):
    """Saves a step for each value of a metric, None for none, and tells what is there after each."""
    _, _, state = updated(1)
    seen = []
    for step, value in enumerate(metrics, first):
        checkpoints.save(at(step, state), metrics={} if value is None else {"loss": value})
        checkpoints.wait()
        seen.append([int(name) for name in names(checkpoints)])
    return seen


@pytest.mark.parametrize(
    ("options", "metrics", "survivors"),
    [
        ({"keep_last": 1}, [3.0, 2.0, 1.0], [[1], [2], [3]]),
        ({"keep_last": 2}, [None] * 4, [[1], [1, 2], [2, 3], [3, 4]]),
        ({"keep_last": 2, "keep_best": "loss"}, [3.0, 1.0, 2.0, 4.0, 5.0], [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]),
        ({"keep_last": 1, "keep_best": "loss"}, [1.0, 2.0, 3.0, 0.5], [[1], [1, 2], [1, 3], [4]]),
        ({"keep_last": 1, "keep_best": "loss", "mode": "max"}, [1.0, 3.0, 2.0, 3.5], [[1], [2], [2, 3], [4]]),
        # The older of two that are equal stays the best one.
        ({"keep_last": 1, "keep_best": "loss"}, [1.0, 1.0, 1.0], [[1], [1, 2], [1, 3]]),
        # What is not finite is never best, nor what is not there.
        ({"keep_last": 1, "keep_best": "loss"}, [math.nan, 2.0, -math.inf, None], [[1], [2], [2, 3], [2, 4]]),
        ({"keep_last": 1, "keep_best": "loss", "mode": "max"}, [math.inf, 2.0, math.inf], [[1], [2], [2, 3]]),
        ({"keep_last": 1, "keep_best": "accuracy"}, [1.0, 2.0], [[1], [2]]),
    ],
)  # fmt: skip
def test_which_survive(tmp_path, options, metrics, survivors):
    with ft.Checkpoints(tmp_path, **options) as checkpoints:
        assert saved(checkpoints, metrics) == survivors
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {f"{step}{suffix}" for step in survivors[-1] for suffix in ("", ".manifest.json")}


def test_which_survive_is_the_same_after_a_restart(tmp_path):
    for part, first, survivors in (([3.0, 1.0, 2.0], 1, [2, 3]), ([4.0, 5.0], 4, [2, 5]), ([0.5, 6.0], 6, [6, 7])):
        with ft.Checkpoints(tmp_path, keep_last=1, keep_best="loss") as checkpoints:
            assert saved(checkpoints, part, first)[-1] == survivors


def test_what_was_just_saved_is_kept_among_later_ones_of_another_course(tmp_path):
    with ft.Checkpoints(tmp_path, keep_last=2) as checkpoints:
        saved(checkpoints, [None] * 2, first=9)
        assert saved(checkpoints, [None], first=4) == [[4, 9, 10]]


def test_what_is_best(tmp_path):
    with ft.Checkpoints(tmp_path, keep_best="loss") as checkpoints:
        assert checkpoints.best() is None
        assert checkpoints.is_best({"loss": 5.0})
        assert not checkpoints.is_best({"loss": math.nan})
        saved(checkpoints, [2.0, math.nan])
        assert checkpoints.best() == tmp_path / "1"
        found = {value: checkpoints.is_best({"loss": value}) for value in (1.5, 2.0, 2.5, -math.inf)}
        assert found == {1.5: True, 2.0: False, 2.5: False, -math.inf: False}
        assert not checkpoints.is_best({"accuracy": 0.0})
        checkpoints.save(at(3, updated(1)[2]), metrics={"loss": 1.0})  # In the background.
        assert not checkpoints.is_best({"loss": 1.5})
    with ft.Checkpoints(tmp_path, keep_best="loss", mode="max") as checkpoints:
        assert checkpoints.is_best({"loss": np.float32(2.5)})
        assert not checkpoints.is_best({"loss": 0.5})
    assert not ft.Checkpoints(tmp_path).is_best({"loss": 0.0})


def test_the_best_one_is_known_without_its_manifest(tmp_path):
    """Which a process did not write that was killed at that moment."""
    with ft.Checkpoints(tmp_path, keep_last=1, keep_best="loss") as checkpoints:
        saved(checkpoints, [1.0, 2.0])
        manifest.path_of(tmp_path / "1").unlink()
        assert checkpoints.best() == tmp_path / "1"
        assert saved(checkpoints, [3.0], first=3) == [[1, 3]]
        manifest.path_of(tmp_path / "1").write_text("damaged")
        assert checkpoints.best() == tmp_path / "3"


@pytest.mark.parametrize("every", [ft.Every(epochs=1), ft.Every(updates=1), ft.Every(updates=3)])
def test_the_best_one_holds_the_weights_of_the_best_epoch_after_later_and_worse_ones(tmp_path, every):
    """Catalyst 3. The weight passes the optimum, 2.5, in the epoch that leads it from 0 to 2, the first."""
    params = {"w": jnp.zeros(())}
    update = ft.make_update(lambda params, batch: -params["w"] * jnp.mean(batch["x"]), one_part(params, optax.sgd(1.0)))
    data = ft.from_arrays({"x": np.ones(4, np.float32)}, batch_size=2)
    checkpoints = ft.Checkpoints(tmp_path, every=every, keep_last=1, keep_best="valid/loss")
    evaluation = ft.Evaluation(lambda params, batch: {"loss": jnp.abs(params["w"] - 2.5 * batch["x"])}, data)
    options = {"epochs": 4, "evaluation": evaluation, "checkpoints": checkpoints}
    result = ft.fit(update, update.init(params), data, **options, load_best_on_end=True)
    assert (int(result.state.step), float(result.state.params["w"])) == (2, 2.0)
    assert checkpoints.best().name.partition("~")[0] == "2"
    assert float(ft.fit(update, update.init(params), data, **options).state.params["w"]) == 8.0


# What must fit.


def made(params, rules=None, txs=None, *, loss=None, **options):
    parts = ft.partition(params, rules or {"all": ...})
    optim = ft.Optimizer(parts, txs or dict.fromkeys(parts.names, optax.sgd(0.1, momentum=0.9)))
    return ft.make_update(loss or (lambda params, batch: squares(params)), optim, **options), params


def two(**changed):
    return {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)} | changed


BY_NAME = {"a": "a", "b": "b"}
Y = ft.Phase("y", lambda params, batch: squares(params), "b")
A_ONCE, A_TWICE = (
    ft.alternate(ft.Phase("x", lambda params, batch: squares(params), "a", repeat=repeat), Y) for repeat in (1, 2)
)
SGD, ADAM = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)

MISFITS = {
    "a renamed leaf": (
        made(two()), made({"a": jnp.zeros((2, 3)), "c": jnp.zeros(4)}),
        ["opt_state/all/0/trace/b: saved as float32[4], now missing", "params/b: saved as float32[4], now missing",
         "opt_state/all/0/trace/c: not saved, now float32[4]", "params/c: not saved, now float32[4]"],
    ),
    "a missing leaf": (
        made(two()), made({"a": jnp.zeros((2, 3))}),
        ["opt_state/all/0/trace/b: saved as float32[4], now missing", "params/b: saved as float32[4], now missing"],
    ),
    "a leaf more": (
        made({"a": jnp.zeros((2, 3))}), made(two()),
        ["opt_state/all/0/trace/b: not saved, now float32[4]", "params/b: not saved, now float32[4]"],
    ),
    "another shape": (
        made(two()), made(two(a=jnp.zeros((3, 2)))),
        ["opt_state/all/0/trace/a: saved as float32[2,3], now float32[3,2]",
         "params/a: saved as float32[2,3], now float32[3,2]"],
    ),
    "another dtype": (
        made(two()), made(two(a=jnp.zeros((2, 3), jnp.bfloat16))),
        ["opt_state/all/0/trace/a: saved as float32[2,3], now bfloat16[2,3]",
         "params/a: saved as float32[2,3], now bfloat16[2,3]"],
    ),
    "another optimizer": (
        made(two(), BY_NAME, {"a": SGD, "b": SGD}), made(two(), BY_NAME, {"a": SGD, "b": ADAM}),
        ["opt_state/b/0/trace/b: saved as float32[4], now missing", "opt_state/b/0/count: not saved, now int32[]",
         "opt_state/b/0/mu/b: not saved, now float32[4]", "opt_state/b/0/nu/b: not saved, now float32[4]"],
    ),
    "another optimizer of the same state": (
        made(two(), txs={"all": ft.with_lr(optax.adam, 0.1)}), made(two(), txs={"all": ft.with_lr(optax.adamw, 0.1)}),
        ["part 'all': saved with the optimizer adam, now adamw"],
    ),
    "a part that is frozen": (
        made(two(), BY_NAME, {"a": SGD, "b": SGD}), made(two(), BY_NAME, {"a": SGD, "b": ft.FROZEN}),
        ["part 'b': saved with the optimizer chain, now frozen",
         "opt_state/b/0/trace/b: saved as float32[4], now missing"],
    ),
    "other parts": (
        made(two(), {"x": "a", "y": ...}), made(two(), {"x": ...}),
        ["b: saved in part 'y', now in 'x'", "opt_state/y/0/trace/b: saved as float32[4], now missing",
         "opt_state/x/0/trace/b: not saved, now float32[4]"],
    ),
    "parts that are frozen under another name": (
        made(two(), BY_NAME, {"a": SGD, "b": ft.FROZEN}),
        made(two(), {"a": "a", "other": "b"}, {"a": SGD, "other": ft.FROZEN}),
        ["b: saved in part 'b', now in 'other'"],
    ),
    "another accumulation": (made(two()), made(two(), accumulate=2), ["accumulate: saved as 1, now 2"]),
    "other phases": (
        made(two(), BY_NAME, loss=A_ONCE), made(two(), BY_NAME, loss=A_TWICE),
        ["phases: saved as [['x', 'a', 1, False], ['y', 'b', 1, False]], now [['x', 'a', 2, False]"],
    ),
    "a loss scale": (
        made(two()), made(two(), loss_scale=ft.DynamicScale()),
        ["loss_scale/scale: not saved, now float32[]", "loss_scale/good: not saved, now int32[]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_one_error_with_all_that_differs(tmp_path, name):
    (saved_by, before), (asked_by, now), lines = MISFITS[name]
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved_by.init(before))
    shutil.rmtree(tmp_path / "0" / "state")  # It is raised before an array is read.
    manifest.path_of(tmp_path / "0").unlink()
    with pytest.raises(CheckpointError) as raised:
        checkpoints.restore(like=asked_by.abstract(now))
    text = str(raised.value)
    assert text.startswith(f"the checkpoint {tmp_path / '0'} does not fit the state that is asked for:\n")
    assert text.endswith("that it was saved from, or, if only parts or optimizers are others, regroup=True")
    told = text.split(":\n", 1)[1].splitlines()[:-1]
    assert len(told) == len(lines)
    assert all(one.startswith(f"  {line}") for one, line in zip(told, lines, strict=True)), told
    assert (tmp_path / "0").is_dir()


@pytest.mark.parametrize("given", [{"key": KEY}, {"key": jax.random.key(0, impl="rbg")}, {"model_state": {"m": KEY}}])
def test_another_key_or_model_state_does_not_fit(tmp_path, given):
    def loss_fn(params, batch, key=None, model_state=None):
        return squares(params)

    update, params = made(two(), loss=loss_fn)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(update.init(params, key=jax.random.PRNGKey(0), model_state={"m": jnp.zeros(2)}))
    with pytest.raises(CheckpointError, match=says("key: saved as uint32[2], now")):
        checkpoints.restore(like=update.abstract(params, **{"key": KEY, "model_state": {"m": jnp.zeros(2)}} | given))


def test_ten_differences_are_listed_and_the_others_counted(tmp_path):
    update, params = made({f"w{i:02}": jnp.zeros(1) for i in range(16)}, txs={"all": optax.sgd(0.1)})
    other, changed = made({f"w{i:02}": jnp.zeros(2) for i in range(16)}, txs={"all": optax.sgd(0.1)})
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(update.init(params))
        with pytest.raises(CheckpointError, match=says("params/w09: saved as", "\n  ... and 6 more\n")) as raised:
            checkpoints.restore(like=other.abstract(changed))
    assert "params/w10" not in str(raised.value)


# Names.


def test_names_of_pending_windows_and_of_windows_that_were_dropped(tmp_path):
    update, _, state = simple(accumulate=3, remainder="drop")
    seen = []
    with ft.Checkpoints(tmp_path, keep_last=99) as checkpoints:

        def save():
            checkpoints.save(state)
            checkpoints.wait()
            seen.append(names(checkpoints)[-1])
            restored = checkpoints.restore(like=state)
            assert (restored.path.name, bits(restored.state)) == (seen[-1], bits(state))

        for number in range(5):
            state, _ = update(state, batch_of(number))
            save()
        state, _ = update.flush(state)
        save()
        for number in range(5, 9):
            state, _ = update(state, batch_of(number))
            save()
    assert seen == ["0+1", "0+2", "1", "1+1", "1+2", "1~5", "1+1~6", "1+2~7", "2", "2+1"]
    assert checkpoints.restore(like=state, step=1).path.name == "1~5"
    assert checkpoints.restore(like=state, step=2).path.name == "2"
    for name in seen:
        assert checkpoints.restore(like=state, step=tmp_path / name).path.name == name


def test_the_same_step_twice_is_written_once(tmp_path):
    _, _, state = updated(1)
    with ft.Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            checkpoints.save(state, data={"position": 1}, metrics={"loss": 1.0}, extra=b"more")
        checkpoints.wait()
        written = everything(tmp_path)
        checkpoints.save(state, data={"position": 1}, metrics={"loss": 1.0}, extra=b"more")
    assert everything(tmp_path) == written
    assert names(checkpoints) == ["1"]


def test_the_same_step_with_something_new_is_written_again(tmp_path):
    """As an epoch's end is no step, the results of it come after its last step was saved."""
    _, _, state = updated(1)
    with ft.Checkpoints(tmp_path, keep_last=9, keep_best="loss") as checkpoints:
        for data, metrics in ((1, {}), (1, {"loss": 2.0}), (2, {"loss": 3.0}), (1, {})):
            checkpoints.save(state, data=data, metrics=metrics)
        newest = checkpoints.restore(like=state)
        assert (newest.path.name, newest.data, newest.metrics) == ("1~2", 2, {"loss": 3.0})
        assert checkpoints.best() == tmp_path / "1~1"
        assert names(checkpoints) == ["1", "1~1", "1~2"]
        assert checkpoints.restore(like=state, step=1).path.name == "1~2"


def test_a_step_that_is_not_there(tmp_path, monkeypatch):
    _, _, state = updated(2, accumulate=3)
    with ft.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=says(f"no checkpoint of step 1 in {tmp_path}: there are none")):
            checkpoints.restore(like=state, step=1)
        checkpoints.save(state)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=says("no checkpoint of step 2", "there are 0+2")):
            checkpoints.restore(like=state, step=2)
        with pytest.raises(CheckpointError, match=says("9 is damaged: its folder is missing; restore another of 0+2")):
            checkpoints.restore(like=state, step=tmp_path / "9")
        monkeypatch.chdir(tmp_path)
        assert checkpoints.restore(like=state, step=pathlib.Path("0+2")).path == tmp_path / "0+2"


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    for name in ("log", "1.corrupt", "best", "01x", "1+", "~1"):
        (tmp_path / name).mkdir()
    with ft.Checkpoints(tmp_path, keep_last=1) as checkpoints:
        saved(checkpoints, [None] * 3, first=2)
        assert names(checkpoints) == ["4"]
    assert {"log", "1.corrupt", "best", "01x", "1+", "~1"} < set(os.listdir(tmp_path))


# One writer at a time.

WRITER = """
    checkpoints = ft.Checkpoints(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(tried({"open": checkpoints.open, "save": lambda: checkpoints.save(state),
                                "close": checkpoints.close}[line.strip()])), flush=True)
"""


@pytest.fixture
def another():
    """Asks another process to do something with checkpoints of its own."""
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(WRITER)
    with contextlib.ExitStack() as stack:

        def started(directory):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", code, str(directory)], **pipes))
            stack.callback(process.kill)

            def ask(what):
                process.stdin.write(what + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            return process, ask

        yield started


def test_a_folder_has_one_writer_and_any_number_of_readers(sound, tmp_path, another):
    directory = copied(sound, tmp_path)
    _, _, state = updated(1)
    process, ask = another(directory)
    checkpoints = ft.Checkpoints(directory)
    checkpoints.restore(like=like())  # A reader locks nothing,
    assert ask("open") is None
    assert checkpoints.restore(like=like()).data == {"position": 2}  # and minds no lock.
    with pytest.raises(CheckpointError, match=says("another process writes checkpoints to", str(directory), "its own")):
        checkpoints.save(at(3, state))
    assert ask("close") is None
    checkpoints.save(at(3, state))
    assert ask("save")[0] == "CheckpointError"
    checkpoints.close()
    assert ask("open") is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoints.open()
    checkpoints.close()


def test_a_reader_that_meets_damage_sets_it_aside_only_where_nobody_writes(sound, tmp_path):
    directory = copied(sound, tmp_path)
    flip(directory / "2" / "facts" / "metadata")
    reader = ft.Checkpoints(directory)
    with ft.Checkpoints(directory) as writer:
        writer.open()
        with pytest.warns(UserWarning, match=says("IS DAMAGED", "kept as '2'")):
            assert reader.restore(like=like()).path.name == "1"
        assert names(writer) == ["1", "2"]
    with pytest.warns(UserWarning, match=says("IS DAMAGED", "kept as '2.corrupt'")):
        assert reader.restore(like=like()).path.name == "1"
    ft.Checkpoints(directory).open()  # The reader did not keep the lock.


def test_what_a_killed_process_left_half_done_is_cleared_by_the_next_writer(sound, tmp_path):
    directory = copied(sound, tmp_path)
    before = everything(directory)
    for left in ("3.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", ".removed-1/state"):
        shutil.copytree(sound / "2" / "state", directory / left)
    (directory / ".2.manifest.json.tmp").write_text("{")
    checkpoints = ft.Checkpoints(directory)
    assert checkpoints.restore(like=like()).path.name == "2"
    assert (directory / "3.orbax-checkpoint-tmp").exists()
    with checkpoints:
        checkpoints.open()
    assert everything(directory) == before | {".lock": b""}


# Options.


@pytest.mark.parametrize(
    "directory", ["s3://bucket/x", pathlib.Path("s3://bucket/x"), "gs://bucket", "file:///tmp/x", "hdfs://host/x"]
)
def test_an_address_is_no_folder(tmp_path, monkeypatch, directory):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=says("is no folder: mount the storage, and give the path there")):
        ft.Checkpoints(directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        ({"keep_last": 0}, ["keep_last=0", "at least 1"]),
        ({"keep_last": 1.5}, ["keep_last=1.5", "a whole number"]),
        ({"keep_last": None}, ["keep_last=None", "a whole number"]),
        ({"mode": "least"}, ["mode='least'", "'min' or 'max'"]),
    ],
)
def test_options_that_are_none(tmp_path, options, phrases):
    with pytest.raises(CheckpointError, match=says(*phrases)):
        ft.Checkpoints(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# Devices.


def laid_out(devices):
    """Params over so many of the devices; None for those that nobody placed."""
    params = {
        "split": jax.random.normal(KEY, (8, 16)), "other": jax.random.normal(KEY, (16, 8)).astype(jnp.bfloat16),
        "whole": jnp.arange(3.0), "empty": jnp.zeros((0, 2)),
    }  # fmt: skip
    if devices is None:
        return params
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[-devices:])
    specs = {"split": jax.P("data"), "other": jax.P(None, "data"), "whole": jax.P(), "empty": jax.P()}
    return {name: jax.device_put(leaf, jax.NamedSharding(mesh, specs[name])) for name, leaf in params.items()}


def over_devices(devices):
    params = laid_out(devices)
    update = ft.make_update(
        lambda params, batch, key: batch * squares(params) + jax.random.normal(key), one_part(params), accumulate=2
    )
    return update, params


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """A checkpoint of a state over eight devices, with a window pending."""
    update, params = over_devices(8)
    state = update.init(params, key=KEY)
    for batch in (1.0, 2.0, 3.0):
        state, _ = update(state, batch)
    with ft.Checkpoints(tmp_path_factory.mktemp("eight")) as checkpoints:
        checkpoints.save(state)
    return checkpoints.directory, bits(state)


@pytest.mark.parametrize("devices", [8, 4, 1, None])
def test_saved_on_eight_devices_it_comes_back_on_others_exactly(on_eight, devices):
    directory, saved_bits = on_eight
    update, params = over_devices(devices)
    # Shapes tell of meshes of several devices only.
    asked = (update.init if devices == 1 else update.abstract)(params, key=KEY)
    restored = ft.Checkpoints(directory).restore(like=asked).state
    assert bits(restored) == saved_bits

    def places(state):
        flat = ft.flatten({"params": state.params, "opt_state": state.opt_state, "key": state.key})
        return {path: leaf.sharding if getattr(leaf, "committed", True) else None for path, leaf in flat.items()}

    assert places(restored) == places(asked)
    for path, leaf in restored.window.grads["all"].items():
        assert leaf.sharding == restored.params[path].sharding
    begun = update.init(params, key=KEY)  # It trains on as a state does that was always there.
    for batch in (1.0, 2.0, 3.0, 4.0):
        begun, _ = update(begun, batch)
    finished, _ = update(restored, 4.0)
    assert places(finished) == places(begun)
    if devices == 8:
        assert bits(finished) == bits(begun)


def test_saved_where_nobody_placed_it_it_comes_back_on_eight_devices(tmp_path):
    update, params = over_devices(None)
    state, _ = update(update.init(params, key=KEY), 1.0)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        wide, params = over_devices(8)
        restored = checkpoints.restore(like=wide.init(params, key=KEY)).state  # A state does as well as shapes.
    assert bits(restored) == bits(state)
    assert {path: leaf.sharding for path, leaf in params.items()} == {
        path: leaf.sharding for path, leaf in restored.params.items()
    }
    wide(restored, 2.0)


def test_a_process_with_fewer_devices_reads_what_was_saved_on_eight(on_eight):
    directory, saved_bits = on_eight
    code = """
        import sys
        import jax
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 4)
        import functrain as ft, test_checkpoints as tests
        update, params = tests.over_devices(4)
        restored = ft.Checkpoints(sys.argv[1]).restore(like=update.abstract(params, key=tests.KEY)).state
        print(len(jax.devices()), tests.digest(tests.bits(restored)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(directory)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["4", digest(saved_bits)]


def digest(found):
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
