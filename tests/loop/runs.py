"""A small model and its data, and what watches a run of them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

RNG = np.random.default_rng(0)
X = RNG.normal(size=(18, 3)).astype(np.float32)  # In batches of 4 the last one of the five is short.
Y = X @ np.float32([1, -2, 3])


def start():
    return {"body": {"w": jnp.full((3, 4), 0.5)}, "head": {"w": jnp.full(4, 0.1), "b": jnp.zeros(())}}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"]["w"])
    error = hidden @ params["head"]["w"] + params["head"]["b"] - batch["y"]
    return ft.Loss(jnp.mean(error**2), weight=len(batch["y"]))


def noisy_loss(params, batch, key):
    return loss_fn(params, {**batch, "x": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)})


def optim_of(body=None, head=None):
    body = body or ft.with_lr(optax.adamw, optax.cosine_decay_schedule(0.1, 40))
    transforms = {"body": body, "head": head or ft.with_lr(optax.sgd, 0.1)}
    return ft.Optimizer(ft.partition(start(), {"body": "body", "head": "head"}), transforms)


@functools.cache  # An update has programs and nothing of a run: tests may share it.
def update_of(loss=loss_fn, body=None, head=None, **options):
    return ft.make_update(loss, optim_of(body, head), **options)


def data_of(batch_size=4, **options):
    return ft.from_arrays({"x": X, "y": Y}, batch_size=batch_size, **options)


def counted(update, batches_an_epoch=4):
    """An update, a new state of it, and data of as many batches an epoch."""
    data = ft.from_arrays({"x": X[: 2 * batches_an_epoch], "y": Y[: 2 * batches_an_epoch]}, batch_size=2)
    return update, update.init(start()), data


def bits(tree):
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def bits_of(state):
    """All of a state but its key, which never changes."""
    names = ("params", "opt_state", "model_state", "step", "batches", "pending", "window")
    return {name: bits(getattr(state, name)) for name in names}


@contextlib.contextmanager
def compilations():
    """The names of the programs that XLA compiles."""
    names = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


class Scripted:
    """Evaluation data of one number, another one each time that it is read to its end."""

    def __init__(self, *values):
        self.left = list(values)

    def __iter__(self):
        yield {"x": np.float32([self.left[0]])}
        self.left.pop(0)


def scripted(*values, **options):
    return ft.Evaluation(lambda params, batch: {"loss": batch["x"]}, Scripted(*values), **options)


class Recorder(ft.Hook):
    """The events of a run in their order, and what `of` takes from it at each."""

    def __init__(self, of=lambda run: (run.step, run.epoch)):
        self.events, self.of = [], of

    def run_started(self, run):
        self.events.append(("run_started", self.of(run)))

    def update_ended(self, run):
        self.events.append(("update_ended", self.of(run)))

    def evaluation_ended(self, run):
        self.events.append(("evaluation_ended", self.of(run)))

    def checkpoint_saved(self, run):
        self.events.append(("checkpoint_saved", self.of(run)))

    def run_ended(self, run, error):
        self.events.append(("run_ended", self.of(run)))
        self.error = error

    def at(self, event):
        return [what for name, what in self.events if name == event]


def logged(log, rows, start=-1):
    """Has a logger take rows of steps, and closes it."""
    log.resume(start)
    for step, row in rows:
        log.log(step, row)
    log.close()
