"""Programs with checkpoints in processes of their own."""

import pathlib
import subprocess
import textwrap

import warm

ROOT = pathlib.Path(__file__).parents[3]
SAFETY = 180  # Seconds after which a process hangs.

PRELUDE = """
    import contextlib, json, os, pathlib, resource, signal, sys, time, warnings
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


def start(script, *arguments):
    """A script in a process of its own."""
    return warm.Process(textwrap.dedent(PRELUDE) + textwrap.dedent(script), *arguments)


def run(script, *arguments):
    """What a script prints, and its exit code."""
    process = start(script, *arguments)
    output, errors = process.communicate(timeout=SAFETY)
    return subprocess.CompletedProcess(script, process.returncode, output, errors)
