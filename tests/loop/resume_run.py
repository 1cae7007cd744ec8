"""A small run of `fit` in a process of its own, for tests that kill it and start it again with the same command.

It prints "started" before the first update, and when it ends a line of JSON with what it ended with.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

EXAMPLES, FEATURES, HIDDEN, BATCH = 28, 4, 8, 4  # 7 batches an epoch: 2 windows of 3 and a rest, 3 of 2 and a rest.
STALLED = 1000  # Seconds, of a run that only a signal ends.


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--cache", required=True, help="the folder of JAX's compilation cache")
    parser.add_argument("--send", type=int, default=signal.SIGKILL, help="the signal to send to itself")
    parser.add_argument("--at", help="when: a pattern of an event, as `event_text` writes it")
    parser.add_argument("--nth", type=int, default=1, help="which event that fits")
    parser.add_argument("--stall", type=int, default=0, help="1: stand still once the signal is sent")
    parser.add_argument("--seconds", type=float, default=0.0, help="to sleep after each update")
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int, help="of process 0, in a run of two processes")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", args.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if args.port is not None:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", num_processes=2, process_id=args.process)
    if args.at is not None:
        sys.addaudithook(signalling(args.send, re.compile(args.at), args.nth, bool(args.stall)))
    ended = Ended(args.seconds)
    result = SCENARIOS[args.scenario](args.directory, hooks=[ended], unroll=args.unroll)
    print(json.dumps({
        "last": ended.digest, "best": digest(result.state), "step": ended.step, "epochs": result.epochs,
        "stopped": result.stopped, "seen": ended.seen, "history": result.history,
    }))  # fmt: skip


# When a signal comes. What is done to files, Python tells itself, before it is done.

EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "shutil.rmtree"}


def event_text(event, arguments):
    """An audit event as text: 'os.rename /runs/12 /runs/12.corrupt', 'run.evaluating'."""
    is_told = int if event.startswith("run.") else str | os.PathLike  # Of files, the paths.
    return " ".join([event, *(str(each) for each in arguments if isinstance(each, is_told))])


def signalling(number, pattern, nth, stalls):
    """An audit hook that sends this process a signal before the nth event that fits a pattern is done."""
    left = itertools.count(1)

    def hook(event, arguments):
        if not event.startswith("run.") and event not in EVENTS:
            return
        if pattern.search(event_text(event, arguments)) and next(left) == nth:
            os.kill(os.getpid(), number)
            if stalls:
                print("stalled", flush=True)
                for _ in range(10 * STALLED):  # A signal that comes just before a sleep is handled only after it.
                    time.sleep(0.1)

    return hook


class Ended(ft.Hook):
    """Tells of the events of a run, and keeps what its last state is, which the best one takes the place of."""

    def __init__(self, seconds):
        self.seconds, self.digest, self.step, self.seen = seconds, None, None, None

    def run_started(self, run):
        print("started", flush=True)

    def update_ended(self, run):
        sys.audit("run.updated", run.step)
        time.sleep(self.seconds)

    def checkpoint_saved(self, run):
        sys.audit("run.saving")  # Of an asynchronous save, the beginning.

    def run_ended(self, run, error):
        sys.audit("run.ended")
        print("ended after batch", int(run.state.batches), flush=True)
        self.digest, self.step, self.seen = digest(run.state), run.step, run.state.model_state["seen"].tolist()


class Told:
    """Data that tells when a batch is read."""

    def __init__(self, event, data):
        self.event, self.data = event, data

    def __iter__(self):
        return ToldBatches(self.event, iter(self.data))

    def epoch(self, number):
        return ToldBatches(self.event, self.data.epoch(number))


class ToldBatches:
    """The batches of it; can be resumed where they can."""

    def __init__(self, event, batches):
        self.event, self.batches = event, batches
        if hasattr(batches, "get_state"):
            self.get_state, self.set_state = batches.get_state, batches.set_state

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        sys.audit(self.event)
        return batch


def digest(state):
    """A checksum of every leaf of a state, its path, shape and dtype."""
    checksum = hashlib.sha256(state.configuration.encode())
    for path, leaf in jax.tree.leaves_with_path(state):
        array = np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        checksum.update(f"{jax.tree_util.keystr(path)}{leaf.dtype}{array.shape}".encode() + array.tobytes())
    return checksum.hexdigest()


# What is trained.


def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    y = np.sin(x.sum(1, keepdims=True)).astype(np.float32)
    return {"x": x, "y": y + 0.5 * rng.normal(size=y.shape).astype(np.float32), "number": np.arange(EXAMPLES)}


def initial():
    """By NumPy: what JAX draws, every process would trace anew."""
    rng = np.random.default_rng(8)
    body = {"w": rng.normal(size=(FEATURES, HIDDEN)), "b": np.zeros(HIDDEN)}
    head = {"w": 0.1 * rng.normal(size=(HIDDEN, 1))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(np.float32)), {"body": body, "head": head})


def optimizer(params):
    schedule = optax.cosine_decay_schedule(0.03, 60)
    txs = {"body": ft.with_lr(optax.adam, schedule), "head": ft.with_lr(optax.sgd, 0.02, momentum=0.9)}
    return ft.Optimizer(ft.partition(params, {"body": "body", "head": "head"}), txs)


def outputs(params, batch, keep=1.0):
    return jnp.tanh(batch["x"] @ params["body"]["w"] + params["body"]["b"]) * keep @ params["head"]["w"]


def batches(size, **options):
    return Told("run.reading", ft.from_arrays(arrays(), size, **options))


def loss_fn(params, batch, key, model_state):
    """With dropout by the key, and a state that counts how often each example was seen."""
    sys.audit("run.tracing")
    keep = jax.random.bernoulli(key, 0.8, (HIDDEN,)) / 0.8
    error = jnp.mean((outputs(params, batch, keep) - batch["y"]) ** 2)
    seen = model_state["seen"].at[batch["number"]].add(1)
    model_state = {"seen": seen, "error": 0.9 * model_state["error"] + 0.1 * error}
    penalty = 0.001 * jnp.mean(params["body"]["w"] ** 2)
    return ft.Loss({"error": error, "penalty": penalty}, weight=len(batch["x"]), model_state=model_state)


def nan_loss_fn(params, batch, key, model_state):
    """The same, and NaN from the eighth batch on."""
    loss = loss_fn(params, batch, key, model_state)
    factor = jnp.where(jnp.sum(model_state["seen"]) >= 7 * BATCH, jnp.nan, 1.0)
    return ft.Loss({"error": loss.value["error"] * factor}, weight=loss.weight, model_state=loss.model_state)


def eval_step(params, batch):
    return {"loss": ((outputs(params, batch) - batch["y"]) ** 2)[:, 0]}


def evaluation(**options):
    data = ft.from_arrays(arrays(), batch_size=16, shuffle=False)
    return ft.Evaluation(eval_step, Told("run.evaluating", [*data]), **options)


def begun(update, params, key=None):
    """A state whose key the loss takes, and whose model state it changes."""
    model_state = {"seen": jnp.zeros(EXAMPLES, jnp.int32), "error": jnp.zeros(())}
    return update.init(params, key=jax.random.key(7) if key is None else key, model_state=model_state)


def windows(directory, checkpoints="", **options):
    """Windows of three batches, the rest of an epoch flushed, stopped early."""
    params = initial()
    update = ft.make_update(loss_fn, optimizer(params), accumulate=3)
    return ft.fit(
        update, begun(update, params), batches(BATCH, seed=3), epochs=40, log=ft.Every(updates=2),
        evaluation=evaluation(every=ft.Every(updates=4)), stop=ft.EarlyStopping("valid/loss", patience=4, least=0.02),
        checkpoints=ft.Checkpoints(f"{directory}/{checkpoints}", every=ft.Every(updates=2), keep_best="valid/loss"),
        load_best_on_end=True, **options,
    )  # fmt: skip


def recorded(directory, **options):
    """The same, with a record and a final evaluation."""
    record = ft.Record(directory, config={"hidden": HIDDEN}, final=evaluation(name="test"), report=False)
    return windows(directory, "checkpoints", record=record, **options)


def epochs(directory, **options):
    """Windows of two batches, the rest of an epoch carried over, all that is due at an epoch's end at one step."""
    params = initial()
    update = ft.make_update(loss_fn, optimizer(params), accumulate=2, remainder="carry")
    return ft.fit(
        update, begun(update, params), batches(BATCH, seed=4), epochs=11, log=ft.Every(epochs=1),
        evaluation=evaluation(), stop=ft.EarlyStopping("valid/loss", patience=3, least=0.02),
        checkpoints=ft.Checkpoints(directory, every=ft.Every(updates=1), keep_best="valid/loss", keep_last=1),
        load_best_on_end=True, **options,
    )  # fmt: skip


def alternate(directory, **options):
    """Three steps of the body, one of the head; the cycle runs on across epochs of 14 batches."""
    body = ft.Phase("body", loss_fn, parts="body", repeat=3)
    return phases(directory, ft.alternate(body, ft.Phase("head", loss_fn, parts="head")), **options)


def phase(directory, **options):
    """A function of the step says whose turn it is."""
    each = [ft.Phase(name, loss_fn, parts=name) for name in ("body", "head")]
    return phases(
        directory, ft.alternate(*each, phase=lambda step: "head" if step > 9 and step % 3 else "body"), **options
    )


def phases(directory, alternation, **options):
    params = initial()
    update = ft.make_update(alternation, optimizer(params))
    return ft.fit(
        update, begun(update, params), batches(2, seed=5), steps=42, log=ft.Every(epochs=1),
        checkpoints=ft.Checkpoints(directory, every=ft.Every(updates=3)), **options,
    )  # fmt: skip


def plain(directory, **options):
    """Data that can't say where it stands."""
    params = initial()
    update = ft.make_update(loss_fn, optimizer(params))
    data = [*ft.from_arrays(arrays(), BATCH, shuffle=False)]
    return ft.fit(
        update, begun(update, params), data, epochs=3, checkpoints=ft.Checkpoints(directory, every=ft.Every(updates=2)),
        **options,
    )  # fmt: skip


def nan(directory, **options):
    """A loss that is NaN from the eighth batch on, which is the first of the fifth window."""
    params = initial()
    update = ft.make_update(nan_loss_fn, optimizer(params), accumulate=2)
    return ft.fit(
        update, begun(update, params), batches(BATCH), epochs=3, log=ft.Every(updates=1),
        checkpoints=ft.Checkpoints(directory, every=ft.Every(updates=1)), **options,
    )  # fmt: skip


def together(directory, **options):
    """Two processes, each with its half of every batch."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, halves = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    params = jax.device_put(initial(), replicated)
    key = jax.jit(lambda: jax.random.key(7), out_shardings=replicated)()
    update = ft.make_update(loss_fn, optimizer(params), accumulate=3)
    return ft.fit(
        update, begun(update, params, key), batches(BATCH, seed=3), epochs=8, log=ft.Every(updates=10),
        evaluation=evaluation(every=ft.Every(updates=4), sharding=halves), sharding=halves,
        checkpoints=ft.Checkpoints(directory, every=ft.Every(updates=2), keep_best="valid/loss"), **options,
    )  # fmt: skip


SCENARIOS = {each.__name__: each for each in (windows, recorded, epochs, alternate, phase, plain, nan, together)}


if __name__ == "__main__":
    main()
