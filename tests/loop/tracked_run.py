"""A small run of `fit` with trackers, in a process of its own, for tests that kill it and start it again."""

import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft

STEPS = 40
os.environ.update(  # Nothing leaves the machine, and what is away is tried again soon.
    MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="10",
    WANDB_MODE="offline", WANDB_ERROR_REPORTING="false", WANDB_SILENT="true",
)  # fmt: skip


class Slow(ft.Hook):
    def __init__(self, seconds):
        self.seconds = seconds

    def update_ended(self, run):
        time.sleep(self.seconds)


class Killing(ft.Hook):
    """Kills the process a while after a step, as a clock does: at any moment of what goes on beside the training."""

    def __init__(self, step, seconds):
        self.step, self.seconds = step, seconds

    def update_ended(self, run):
        if run.step == self.step:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def loss_fn(params, batch):
    return ft.Loss(jnp.mean((params["w"] - batch["x"]) ** 2), metrics={"nan@": jnp.nan, "far": jnp.inf})


def main():
    jax.config.update("jax_platforms", "cpu")
    given = json.loads(sys.argv[1])
    directory = Path(given["directory"])
    params = {"w": jnp.zeros(2)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(loss_fn, optim)
    data = ft.from_arrays({"x": np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)}, batch_size=2, seed=1)
    valid = ft.Evaluation(lambda params, batch: {"loss": ((params["w"] - batch["x"]) ** 2)[:, 0]}, data)
    loggers = [getattr(ft, kind)(**options) for kind, options in given["loggers"]]
    hooks = [Killing(given["kill"], given["seconds"])] if "kill" in given else []
    hooks += [Slow(given["slow"])] if "slow" in given else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ft.fit(
            update, update.init(params), data, steps=given.get("steps", STEPS), log=ft.Every(updates=1),
            evaluation=valid, loggers=loggers, hooks=hooks, progress=False,
            checkpoints=ft.Checkpoints(directory / "run", every=ft.Every(updates=3)),
        )  # fmt: skip
    print(json.dumps({"history": result.history, "told": [str(each.message) for each in caught]}))


if __name__ == "__main__":
    main()
