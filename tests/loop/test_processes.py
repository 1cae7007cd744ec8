"""Several processes: what would train otherwise than it says is refused."""

import socket
import textwrap

import pytest
import warm

TOGETHER = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, optax
    import functrain as ft

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", {devices})
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    port, process, processes = map(int, sys.argv[1:4])
    jax.distributed.initialize(f"127.0.0.1:{{port}}", num_processes=processes, process_id=process)
    params = {{"w": jnp.ones(4)}}
    optim = ft.Optimizer(ft.partition(params, {{"all": ...}}), {{"all": optax.sgd(0.1)}})
    xs = np.arange(256, dtype=np.float32).reshape(64, 4) % 7
    ys = np.arange(64, dtype=np.float32) % 5

    def loss_fn(params, batch):
        return ft.Loss(jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), weight=len(batch["y"]))

    update = ft.make_update(loss_fn, optim)
    data = ft.from_arrays({{"x": xs, "y": ys}}, 16, seed=1)

    def told(call):
        try:
            call()
        except ft.FunctrainError as error:
            print(type(error).__name__, error)
"""


def together(program, processes, devices=1):
    """What each of some processes prints that run a program side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = textwrap.dedent(TOGETHER.format(devices=devices)) + textwrap.dedent(program)
    started = [warm.Process(text, port, process, processes) for process in range(processes)]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * processes, ended
    return [[line for line in output.splitlines() if not line.startswith("[Gloo]")] for output, _ in ended]


@pytest.mark.slow
def test_a_batch_or_a_state_of_one_process_alone_is_refused_in_a_run_of_several():
    printed = together(
        """
        told(lambda: ft.fit(update, update.init(params), data, epochs=1))
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        of_all = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        told(lambda: ft.fit(update, update.init(of_all), data, epochs=1, progress=False))
        batch = next(iter(data))
        told(lambda: update(update.init(of_all), batch))
        of_an_array = ft.make_update(lambda params, batch: params["w"].sum() * batch.mean(), optim)
        told(lambda: of_an_array(update.init(of_all), ys))
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        whole = jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)
        state, _ = update(update.init(of_all), whole)
        result = ft.fit(update, update.init(of_all), data, epochs=1, sharding=sharding, progress=False)
        print(np.asarray(result.state.params["w"].addressable_data(0)).tobytes().hex())
        """,
        processes=2,
    )
    assert printed[0] == printed[1]
    alone, unshared, bare, one, digest = printed[0]
    assert alone.startswith(
        "FitError the params lie in this process alone, and each of the 2 would train its own: place"
    )
    assert unshared == bare
    assert bare.startswith(
        "UpdateError 'x', 'y' of the batch lies in this process alone, and the parameters lie over 2: make one batch of"
        " the slices of all, jax.make_array_from_process_local_data(sharding, slice)"
    )
    assert one.startswith("UpdateError the batch lies in this process alone")
    assert len(digest) == 32
