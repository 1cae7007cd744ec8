"""Processes that begin together and end together."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import pytest
import warm
from soak import SOAK, in_soak

import functrain as ft
from functrain.errors import StartError

PROGRAM = """
    import os, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    import functrain as ft

    process, how = int(sys.argv[1]), sys.argv[2]
    ft.start()
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.device_put({"w": jnp.ones(4)}, jax.NamedSharding(mesh, jax.P()))
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(lambda params, batch: jnp.mean((batch["x"] @ params["w"]) ** 2), optim)

    class Failing(ft.Hook):
        def update_ended(self, run):
            run.metrics["loss"].block_until_ready()
            if run.step == 5 and how == "raises":
                raise ValueError("broken here")
            if run.step == 5 and how == "is killed":
                os.kill(os.getpid(), 9)

    data = ft.from_arrays({"x": np.ones((300, 4), np.float32)}, 6)
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    ft.fit(update, update.init(params), data, epochs=100, hooks=[Failing()], sharding=sharding, progress=False)
"""


def ended(who, how):
    """The exit codes and errors of three processes of which one fails, and the seconds in which the others follow."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for process in range(3):
        told = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "3", "PROCESS_ID": str(process)}
        started.append(subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(process), how if process == who else "goes on"],
            env=os.environ | {f"JAX_{name}": value for name, value in told.items()}, cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        ))  # fmt: skip
    started[who].wait(timeout=120)
    begin = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in started]
    return [process.returncode for process in started], errors, time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("who", [pytest.param(0, marks=in_soak), 1])
def test_all_processes_end_when_one_raises_and_say_which(who):
    codes, errors, seconds = ended(who, "raises")
    assert codes == [1, 1, 1]
    assert seconds < 30
    assert f"process {who} of 3 failed: ValueError: broken here; the others end too" in errors[who]
    assert "Traceback" in errors[who]
    for other in {0, 1, 2} - {who}:
        assert f"ended, as process {who} of 3 failed: ValueError: broken here" in errors[other]
    assert [line.split() for line in errors[0].splitlines() if line.strip().endswith("cpu")] == [
        [str(process), "1", "cpu"] for process in range(3)
    ]


@in_soak
@pytest.mark.slow
def test_all_processes_end_when_one_is_killed():
    codes, errors, seconds = ended(1, "is killed")
    assert codes[1] == -signal.SIGKILL
    assert all(code not in (0, None) for code in codes)
    assert seconds < 30
    assert "lost another one" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(("last", "look"), [("ends", 0), ("raises", 0.5)])
def test_those_that_end_first_wait_for_the_last_and_end_with_its_code(last, look):
    """As it looks all the time, a thread would be within JAX as Python ends, which aborts the process."""
    program = """
        import sys, time
        import jax
        import functrain as ft
        import functrain.loop.start

        port, process, last, look = sys.argv[1:]
        functrain.loop.start._LOOK = float(look)
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        ft.start(f"127.0.0.1:{port}", processes=3, process=int(process))
        if process == "2":
            time.sleep(1)
            if last == "raises":
                raise ValueError("broken at last")
    """
    for _ in range(3 * SOAK):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [warm.Process(textwrap.dedent(program), port, process, last, look) for process in range(3)]
        errors = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [int(last == "raises")] * 3, errors
        told = "ended, as process 2 of 3 failed: ValueError: broken at last"
        assert [told in each for each in errors] == [last == "raises"] * 2 + [False]


def test_a_process_that_no_launcher_started_is_alone(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.setenv(name, "1")
    ft.start()  # Of a shell within an allocation, SLURM_NTASKS is not known, or is 1.
    monkeypatch.setenv("SLURM_NTASKS", "1")
    ft.start()
    assert not jax.distributed.is_initialized()


def test_processes_that_are_told_half_of_it_say_what_is_missing(monkeypatch):
    with pytest.raises(StartError, match=r"some of three arguments, and not 'processes', 'process': give all"):
        ft.start("127.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(StartError, match="not 'JAX_COORDINATOR_ADDRESS', 'JAX_PROCESS_ID': set all three in each"):
        ft.start()
