"""Small leaves are kept together, and each comes back to the bit."""

import dataclasses
import json
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import warm
from states import KEY, one_part, over, squares, updated
from trees import bits, says

import functrain as ft
from functrain.errors import CheckpointError
from functrain.loop.checkpoint.contents import Beside, contents_file
from functrain.loop.checkpoint.describing import contents_of
from functrain.loop.checkpoint.leaves import leaf_spec, named_leaves
from functrain.loop.checkpoint.packs import packed, packed_on_host, packs_of, target, unpacked
from functrain.loop.checkpoint.placement import to_write
from functrain.loop.checkpoint.storage import Storage

KEY_DATA = jax.random.key_data(KEY)
DTYPES = [
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float4_e2m1fn",
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float16", "bfloat16", "float32", "complex64",
]  # fmt: skip


def every_pattern(dtype):
    """All values that a dtype of at most two bytes has, every NaN included; of wider ones many."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool:
        return jnp.array([False, True])
    if jnp.issubdtype(dtype, jnp.integer) and jax.dtypes.itemsize_bits(dtype) < 8:
        return jnp.asarray(np.arange(-8, 16).astype(dtype))
    width = jax.dtypes.itemsize_bits(dtype)
    patterns = np.arange(2 ** min(width, 16), dtype=f"uint{8 * min(dtype.itemsize, 4)}")
    if width > 16:
        patterns *= np.uint32(65521)  # A prime: the upper bits vary too.
    return jnp.asarray(patterns.view(dtype))


def specs_of(leaves):
    return {name: leaf_spec(leaf) for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_every_dtype_comes_back_from_a_pack_of_a_device_and_of_the_host(dtype):
    values = every_pattern(dtype)
    leaves = {"some": values, "scalar": values[1], "again": values.reshape(2, -1)}
    specs = specs_of(leaves)
    assert packs_of(leaves, specs) == {"pack 0": [*leaves]}
    packs = [np.asarray(jax.jit(packed)([*leaves.values()])), packed_on_host([*leaves.values()])]
    assert packs[0].tobytes() == packs[1].tobytes()
    for pack in packs:
        assert (pack.shape, pack.dtype) == (target([*leaves], specs).shape, target([*leaves], specs).dtype)
        assert bits(unpacked(pack, [*leaves], specs)) == bits(leaves)


def test_leaves_are_kept_together_by_what_they_are_stored_as_where_they_are_and_how_large_they_are():
    leaves = {
        "a": jnp.ones(3), "half": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(()), "key": KEY, "raw": KEY_DATA,
        "large": jnp.ones(1 << 18), "bool": jnp.ones(3, bool), "int4": jnp.ones(3, jnp.int4), "none": jnp.ones((0, 2)),
        "step": np.int32(3), "window/a": jnp.ones(3), "batches": np.int32(4), "large 4": jnp.ones(1 << 20, jnp.uint4),
    }  # fmt: skip
    assert [*packs_of(leaves, specs_of(leaves)).values()] == [
        ["a", "b"], ["half"], ["key", "raw"], ["bool", "int4", "large 4"], ["step", "batches"], ["window/a"],
    ]  # fmt: skip


def test_numbers_of_python_are_stored_in_the_dtype_that_jax_gives_them():
    leaves = {"float": 1.5, "half": np.float32(0.5), "float again": -0.0}
    specs = specs_of(leaves)
    assert packs_of(leaves, specs) == {"pack 0": [*leaves]}
    found = unpacked(packed_on_host([*leaves.values()]), [*leaves], specs)
    assert bits(found) == bits({name: np.float32(leaf) for name, leaf in leaves.items()})


@pytest.mark.parametrize(("count", "size", "lengths"), [(300, 1, [128, 128, 44]), (40, 1 << 17, [32, 8])])
def test_a_pack_has_no_more_than_so_many_leaves_and_bytes(count, size, lengths):
    leaf = jnp.ones(size)
    leaves = {f"{i}": leaf for i in range(count)}
    assert [len(names) for names in packs_of(leaves, specs_of(leaves)).values()] == lengths


def many(count=150):
    """An update of many small leaves of all dtypes, its params, and what else its state is made of."""
    frozen = {f"{dtype}-{i}": every_pattern(dtype)[i:20] for dtype in DTYPES for i in range(2)}
    params = {"w": {f"{i}": jax.random.normal(KEY, (i % 7, 3)) for i in range(count)}, "frozen": frozen, "scalar": 2.0}
    model_state = {"keys": [jax.random.key(i, impl="rbg") for i in range(9)], "split": jax.random.split(KEY, 3)}

    def loss_fn(params, batch, model_state):
        return ft.Loss(batch * squares(params["w"]) * params["scalar"], model_state=model_state)

    optim = ft.Optimizer(
        ft.partition(params, {"frozen": "frozen", "all": ...}), {"frozen": ft.FROZEN, "all": optax.adam(0.1)}
    )
    return ft.make_update(loss_fn, optim, accumulate=2), params, {"key": KEY, "model_state": model_state}


def test_many_leaves_are_a_few_arrays_and_come_back_to_the_bit(tmp_path):
    update, params, given = many()
    state, _ = update(update.init(params, **given), 1.0)
    before = bits(state)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        state, _ = update(state, 1.0)
        restored = checkpoints.restore(like=update.abstract(params, **given)).state
    assert bits(restored) == before
    stored = json.loads((tmp_path / "0+1" / "state" / "_METADATA").read_bytes())["tree_metadata"]
    assert len(before) > 500
    assert len(stored) < 40
    assert bits(update(restored, 1.0)[0]) == bits(state)


@pytest.mark.parametrize("name", ["\ud800", "a/\udfff"])
def test_a_name_that_utf8_does_not_have_can_be_saved_whatever_its_size(tmp_path, name):
    params = {name: jnp.ones(3), f"{name} large": jnp.ones(1 << 18), "w": jnp.ones(2)}
    update = ft.make_update(lambda params, batch: squares(params) * batch, one_part(params))
    state, _ = update(update.init(params), 1.0)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        assert bits(checkpoints.restore(like=update.abstract(params)).state) == bits(state)


@pytest.mark.parametrize("name", ["q", "\ud800"])
def test_what_lies_in_pieces_and_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    in_pieces, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    leaf = jnp.arange(16).astype(jnp.uint4 if name == "q" else jnp.int32)

    def saved(place):
        params = {"w": jax.device_put(jnp.ones(2), whole), "frozen": {name: jax.device_put(leaf, place)}}
        optim = ft.Optimizer(
            ft.partition(params, {"frozen": "frozen", "all": ...}), {"frozen": ft.FROZEN, "all": optax.sgd(0.1)}
        )
        update = ft.make_update(lambda params, batch: jnp.sum(params["w"]) * batch, optim)
        checkpoints.save(update.init(params))
        return update, params

    with ft.Checkpoints(tmp_path) as checkpoints:
        told = says("in pieces over several devices", "params/frozen/", leaf_spec(leaf), "keep them in a dtype")
        with pytest.raises(CheckpointError, match=told):
            saved(in_pieces)
        assert checkpoints.steps() == []
        update, params = saved(whole)
        assert bits(checkpoints.restore(like=update.abstract(params)).state) == bits(update.init(params))


def test_what_is_copied_takes_the_memory_of_the_copy_before_it():
    leaves = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "large": jnp.ones(1 << 18)}
    window = {"window/a": jnp.ones((2, 3))}
    packs = packs_of(leaves, specs_of(leaves))
    _, spare = to_write(leaves, packs, {})
    held = {name: copy.array.unsafe_buffer_pointer() for name, copy in spare.items()}
    for more in (window, {}, window):
        of_all = leaves | more
        _, copies = to_write(of_all, packs_of(of_all, specs_of(of_all)), spare)
        assert {name: copies[name].array.unsafe_buffer_pointer() for name in held} == held
        spare = {name: copies[name] for name in held}


def test_what_has_another_form_takes_no_memory_of_a_copy():
    one, other = {"a": jnp.ones((2, 3))}, {"a": jnp.ones((3, 2), jnp.int32)}
    packs = packs_of(one, specs_of(one))
    _, spare = to_write(one, packs, {})
    arrays, _ = to_write(other, packs, spare)
    assert arrays["pack 0"].dtype == jnp.int32
    assert not spare["pack 0"].array.is_deleted()


def test_a_checkpoint_of_format_2_where_every_leaf_is_an_array_of_its_own_is_read(tmp_path):
    update, params, state = updated(2, accumulate=3)
    named = named_leaves(state)
    contents = dataclasses.replace(contents_of(state, named, Beside.of(1, None, None)), packs={}, format=2)
    storage = Storage()
    storage.write(tmp_path / "0+2", named, contents)
    storage.wait()
    storage.close()
    file = contents_file(tmp_path / "0+2")
    written = json.loads(file.read_bytes())
    assert written.pop("packs") == {}
    file.write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="no manifest"):
        restored = ft.Checkpoints(tmp_path).restore(like=update.abstract(params))
    assert (bits(restored.state), restored.data) == (bits(state), 1)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)


# Several processes

SAVING = """
import json, sys
import jax

port, process, directory, tests = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
sys.path.insert(0, tests)
import functrain as ft
from states import digests, over

update, params, given = over(jax.devices())
state, _ = update(update.init(params, **given), 1.0)
with ft.Checkpoints(directory) as checkpoints:
    checkpoints.save(state)
    trained, _ = update(state, 1.0)
    restored = checkpoints.restore(like=update.abstract(params, **given)).state
again, _ = update(restored, 1.0)
print(json.dumps([digests(trained), digests(again)]))
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_whole_leaves_and_pieces_and_one_process_reads_them(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [warm.Process(SAVING, port, process, tmp_path, Path(__file__).parent) for process in range(2)]
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        trained, again = json.loads(output.splitlines()[-1])
        assert trained == again
    for devices in (jax.devices()[:4], jax.devices()[:1]):
        update, params, given = over(devices)
        state, _ = update(update.init(params, **given), 1.0)
        restored = ft.Checkpoints(tmp_path).restore(like=update.abstract(params, **given)).state
        assert bits(restored) == bits(state)
