"""Programs with checkpoints in processes of their own."""

import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[3]

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


def run(script, *arguments, **options):
    """A script in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)
