"""A small run of `fit` whose data waits for ever at one batch, if it is told to; for tests that stop it there."""

import argparse
import dataclasses
import hashlib
import json
import os
import queue
import socket
import sys
import time
from pathlib import Path

import absl.flags
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

BATCHES, EPOCHS, AT = 6, 2, 9  # The batch that is waited for is the third one of the second epoch.


def sleep():
    time.sleep(1000)


def receive():
    one, _other = socket.socketpair()
    one.recv(1)


def take():
    queue.Queue().get()


def cling():
    """Takes every exception for a passing one, as a reader does that tries again."""
    while True:
        try:
            time.sleep(1000)
        except Exception:
            print("tried again", flush=True)


WAITS = {each.__name__: each for each in (sleep, receive, take, cling)}


class Batches:
    """The batches of an epoch; its position is the number of those that it has begun to read."""

    def __init__(self, epoch, wait):
        self.epoch, self.wait, self.number = epoch, wait, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.number == BATCHES:
            raise StopIteration
        self.number += 1
        number = self.epoch * BATCHES + self.number
        if self.wait is not None and number == AT:
            print("waiting", flush=True)
            self.wait()
        return {"x": np.float32([number, number + 1])}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


class Data:
    def __init__(self, wait):
        self.wait = wait

    def epoch(self, number):
        return Batches(number, self.wait)


class Source:
    """Of Grain's workers, which say who they are."""

    def __init__(self, waits):
        self.waits = waits

    def __len__(self):
        return 2 * BATCHES

    def __getitem__(self, index):
        os.write(1, f"worker {os.getpid()}\n".encode())  # At once, as there are two of them: `print` parts a line.
        if self.waits and index >= AT:
            os.write(1, b"waiting\n")
            time.sleep(1000)
        return {"x": np.float32([index])}


def grains(waits):
    pipeline = grain.MapDataset.source(Source(waits)).to_iter_dataset()
    return pipeline.batch(2).mp_prefetch(grain.MultiprocessingOptions(num_workers=2, per_worker_buffer_size=1))


def mapped(waits):
    """Of functrain, which reads batches on threads; one waits for an example of the third batch of the first epoch."""

    def waiting(example):
        if waits and example["x"] == 4:
            print("waiting", flush=True)
            time.sleep(1000)
        return example

    data = ft.from_arrays({"x": np.arange(2 * BATCHES, dtype=np.float32)}, 2, shuffle=False)
    return dataclasses.replace(data, read_ahead=2).map_examples(waiting)


def digest(state):
    checksum = hashlib.sha256()
    for leaf in jax.tree.leaves(state.params) + jax.tree.leaves(state.opt_state):
        checksum.update(np.asarray(leaf).tobytes())
    return checksum.hexdigest()


PIPELINES = {"grain": grains, "mapped": mapped}


class Told(ft.Hook):
    def run_ended(self, run, error):
        print("ended at", int(run.state.batches), run.stopped, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("data", choices=[*WAITS, *PIPELINES])
    parser.add_argument("--waits", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--prefetch", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    absl.flags.FLAGS.mark_as_parsed()  # Which Grain asks for in a program that does not parse them.
    params = {"w": jnp.float32([0.1, 0.2])}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    update = ft.make_update(lambda params, batch: jnp.mean((params["w"] - batch["x"]) ** 2), optim)
    if args.data in PIPELINES:
        data = PIPELINES[args.data](args.waits)
    else:
        data = Data(WAITS[args.data] if args.waits else None)
    result = ft.fit(
        update, update.init(params), data, epochs=args.epochs, unroll=args.unroll, prefetch=args.prefetch,
        hooks=[Told()],
        checkpoints=ft.Checkpoints(args.directory, every=ft.Every(updates=100)),
    )  # fmt: skip
    print(json.dumps({"digest": digest(result.state), "step": int(result.state.step)}))


if __name__ == "__main__":
    sys.exit(main())
