"""States to save, and what is done with folders of them."""

import dataclasses
import functools
import pathlib
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

KEY = jax.random.key(7)
SUMMARY = {"batches": 3, "content": 1, "metrics": {"valid/loss": 0.5}, "time": 0.0}


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


def over(devices):
    """An update of leaves over devices that may be of several processes: in pieces, whole, and random keys."""
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(leaf, *spec):
        return jax.make_array_from_callback(
            leaf.shape, jax.NamedSharding(mesh, jax.P(*spec)), lambda index: leaf[index]
        )

    small = {f"{i}": put(np.linspace(-1, 1, 3 * i, dtype=np.float32).reshape(i, 3)) for i in range(9)}
    params = {
        "small": small, "pieces": put(np.arange(16, dtype=np.float32), "data"),
        "half": put(np.linspace(0, 1, 5).astype(jnp.bfloat16)), "large": put(np.ones(1 << 18, np.float32)),
    }  # fmt: skip
    update = ft.make_update(lambda params, batch, key: batch * squares(params), one_part(params))
    return update, params, {"key": jax.jit(jax.random.key, out_shardings=put(np.ones(())).sharding)(7)}


def digests(state):
    """A checksum of each leaf, of pieces that lie here."""
    flat = ft.flatten({"params": state.params, "opt_state": state.opt_state, "key": jax.random.key_data(state.key)})
    pieces = {name: [np.asarray(shard.data) for shard in leaf.addressable_shards] for name, leaf in flat.items()}
    return {name: [zlib.crc32(piece.tobytes()) for piece in all_] for name, all_ in pieces.items()}


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
    return dataclasses.replace(state, **{name: np.asarray(number, np.int64) for name, number in numbers.items()})


def names(checkpoints):
    return [path.name for path in checkpoints.steps()]


def saved(checkpoints, metrics, first=1):
    """Saves a step for each value of a metric, None for none, and tells what is there after each."""
    _, _, state = updated(1)
    seen = []
    for step, value in enumerate(metrics, first):
        checkpoints.save(at(step, state), metrics={} if value is None else {"loss": value})
        checkpoints.wait()
        seen.append([int(name) for name in names(checkpoints)])
    return seen


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


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
