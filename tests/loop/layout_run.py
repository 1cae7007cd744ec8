"""A run of `fit` by a layout over eight devices, in one of one, two or four processes; prints what it left as JSON.

layout_run.py PORT PROCESS PROCESSES '{"layout": "fsdp", "folder": ..., "data": "arrays"}', and of one that fails also
`"how": "raises"`, `"is killed"` or `"is told to end"`, `"who"`, the process, and `"at"`, the step. `"data"` is
"arrays", "grain", or the folder of a dataset of tensorflow-datasets.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import functrain as ft

# The mesh, the rules, the batch, and other options. Of "tp" and "2d" the devices of an axis of tensors are those of
# several processes, which then share rows; of "tp" all of them.
LAYOUTS = {
    "dp": ({"data": 8}, {...: P()}, P("data"), {}),
    "fsdp": ({"fsdp": 8}, {...: ft.largest("fsdp")}, P("fsdp"), {}),
    "zero": ({"data": 8}, {...: P()}, P("data"), {"zero": "data"}),
    "tp": ({"tensor": 4, "data": 2}, {"body/bias": P("tensor"), ...: P(None, "tensor")}, P("data"), {}),
    "2d": (
        {"fsdp": 2, "tensor": 4}, {"embed": P("tensor"), "**/kernel": P("fsdp", "tensor"), ...: ft.largest("fsdp")},
        {"token": P("fsdp"), "y": P("fsdp", "tensor"), "weight": P("fsdp")}, {},
    ),
    "host": ({"fsdp": 8}, {...: ft.largest("fsdp")}, P("fsdp"), {"memory": {"body": "pinned_host"}}),
}  # fmt: skip
EPOCHS = 12  # Of four batches, which make two steps.
RNG = np.random.default_rng(0)
TOKENS, Y = RNG.integers(0, 16, 60), RNG.normal(size=(60, 8)).astype(np.float32)


def fresh():
    """Params, the same in each process."""
    shapes = {"embed": (16, 8), "body": {"kernel": (8, 16), "bias": (16,)}, "head": {"kernel": (16, 8)}}
    rng = np.random.default_rng(1)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: 0.4 * rng.normal(size=shape).astype(np.float32), shapes, is_leaf=is_shape)


def errors_of(params, batch):
    hidden = jnp.tanh(params["embed"][batch["token"]] @ params["body"]["kernel"] + params["body"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - batch["y"]) ** 2, axis=-1)


def loss_fn(params, batch):
    weight = jnp.sum(batch["weight"])
    return ft.Loss(jnp.sum(errors_of(params, batch) * batch["weight"]) / weight, weight=weight)


def examples(count):
    return [{"token": TOKENS[number], "y": Y[number]} for number in range(count)]


def data_of(count, kind="arrays", **options):
    if kind == "arrays":
        return ft.from_arrays({"token": TOKENS[:count], "y": Y[:count]}, 16, last="pad", **options)
    if kind == "grain":
        return ft.from_source(grain.MapDataset.source(examples(count)), 16, last="pad", **options)
    import tensorflow_datasets as tfds

    return ft.from_tfds(tfds.builder_from_directory(kind), f"train[:{count}]", 16, last="pad", **options)


def update_of(name, params):
    shape, rules, batch, options = LAYOUTS[name]
    mesh = jax.make_mesh((*shape.values(),), (*shape,), axis_types=(AxisType.Auto,) * len(shape))
    layout = ft.layout(params, mesh, rules, batch=batch, **options)
    transforms = {"body": ft.with_lr(optax.adam, 0.01), "rest": ft.with_lr(optax.sgd, 0.1)}
    optim = ft.Optimizer(ft.partition(params, {"body": "body", "rest": ...}), transforms, clip_norm=1.0, layout=layout)
    return ft.make_update(loss_fn, optim, accumulate=2)


class Failing(ft.Hook):
    """What befalls a process at a step, after which all are slow, so that it shows before they have ended."""

    def __init__(self, how, at, is_me):
        self.how, self.at, self.is_me = how, at, is_me

    def update_ended(self, run):
        if run.step < self.at:
            return
        jax.block_until_ready(run.metrics)
        if run.step == self.at and self.is_me:
            if self.how == "raises":
                raise ValueError("broken here")
            os.kill(os.getpid(), signal.SIGKILL if self.how == "is killed" else signal.SIGTERM)
        time.sleep(0.1)


def digests(state):
    """What this process holds of each leaf: `{leaf: {slice: digest}}`."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path((state.params, state.opt_state)):
        shards = [(str(shard.index), np.asarray(shard.data).tobytes()) for shard in leaf.addressable_shards]
        here = {index: hashlib.sha1(held).hexdigest() for index, held in shards}
        assert all(hashlib.sha1(held).hexdigest() == here[index] for index, held in shards), "replicas differ"
        found[jax.tree_util.keystr(path)] = here
    return found


def main():
    port, process, processes = map(int, sys.argv[1:4])
    asked = json.loads(sys.argv[4])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        ft.start(f"127.0.0.1:{port}", processes=processes, process=process)
    params = fresh()
    update = update_of(asked["layout"], params)
    data, valid = data_of(60, asked["data"], seed=3), data_of(44, asked["data"], shuffle=False)
    evaluation = ft.Evaluation(lambda params, batch: {"loss": errors_of(params, batch)}, valid)
    folder, failing = Path(asked["folder"]), []
    if "how" in asked:
        failing = [Failing(asked["how"], asked["at"], asked["who"] == process)]
    result = ft.fit(
        update, update.init(params), data, epochs=EPOCHS, evaluation=evaluation, log=ft.Every(updates=1),
        checkpoints=ft.Checkpoints(folder, every=ft.Every(updates=3)), hooks=failing, progress=False,
    )  # fmt: skip
    rows = ft.read_json_lines(folder / "log.jsonl") if process == 0 else []
    whole = multihost_utils.process_allgather(update.optim.parts.split(result.state.params), tiled=True)
    print(json.dumps({
        "losses": [row["train/loss"] for row in result.history if "train/loss" in row],
        "rows": [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row],
        "evaluated": [row["valid/loss"] for row in result.history if "valid/loss" in row],
        "evaluations": [[row["step"], row["valid/loss"]] for row in rows if "valid/loss" in row],
        "digests": digests(result.state),
        "params": {part: np.concatenate([*map(np.ravel, flat.values())]).tolist() for part, flat in whole.items()},
        "memories": sorted({leaf.sharding.memory_kind for leaf in jax.tree.leaves(result.state.opt_state)}),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
