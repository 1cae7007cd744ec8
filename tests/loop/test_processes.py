"""Several processes: what would train otherwise than it says is refused."""

import re
import socket
import textwrap

import numpy as np
import pytest
import warm
from soak import SOAK

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

    def print(*words):  # Gloo prints too, from threads of its own, whose lines may be torn.
        sys.stdout.write(f"printed: {{' '.join(map(str, words))}}\\n")

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
    return [re.findall("printed: (.*)", output) for output, _ in ended]


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
        def noisy(params, batch, key):
            return loss_fn(params, {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)})

        state, _ = ft.make_update(noisy, optim)(update.init(of_all, key=jax.random.key(0)), whole)
        print(np.asarray(jax.random.key_data(state.key).addressable_data(0)).tolist())
        result = ft.fit(update, update.init(of_all), data, epochs=1, sharding=sharding, progress=False)
        print(np.asarray(result.state.params["w"].addressable_data(0)).tobytes().hex())
        """,
        processes=2,
    )
    assert printed[0] == printed[1]
    alone, unshared, bare, one, key, digest = printed[0]
    assert alone.startswith(
        "FitError the params lie in this process alone, and each of the 2 would train its own: place"
    )
    assert unshared == bare
    assert bare.startswith(
        "UpdateError 'x', 'y' of the batch lies in this process alone, and the parameters lie over 2: make one batch of"
        " the slices of all, jax.make_array_from_process_local_data(sharding, slice)"
    )
    assert one.startswith("UpdateError the batch lies in this process alone")
    assert key == "[0, 0]"
    assert len(digest) == 32


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_the_rows_of_all_processes_cover_a_batch_and_those_that_share_rows_read_the_same(devices):
    """A law of meshes of one to three axes, whatever the order of their devices, and of specs of batches."""
    printed = together(
        f"""
        import random, zlib
        from functrain.loop.batches import put, put_stacked
        from functrain.loop.shares import shared
        from functrain.mesh.shares import share_of

        whole = [next(iter(data.over((0,), 1))), next(data.over((0,), 1).epoch(1))]
        shapes = {{8: [(8,), (2, 4), (4, 2), (1, 8), (2, 2, 2)], 16: [(16,), (4, 4), (2, 8), (2, 2, 4), (4, 1, 4)]}}
        draw = random.Random({devices})  # All processes draw the same.
        for _ in range({15 * SOAK}):
            shape = draw.choice(shapes[jax.device_count()])
            names = "abc"[:len(shape)]
            grid = np.array(draw.choice([jax.devices(), draw.sample(jax.devices(), jax.device_count())]))
            if draw.random() < 0.5:  # The axes in another order than the devices.
                order = draw.sample(range(len(shape)), len(shape))
                grid = grid.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
            kinds = (jax.sharding.AxisType.Auto,) * len(shape)
            mesh = jax.sharding.Mesh(grid.reshape(shape), (*names,), axis_types=kinds)
            rows = (*draw.sample(names, draw.randint(0, len(names))),)
            columns = draw.choice([None, *(name for name in names if name not in rows and mesh.shape[name] <= 4)])
            sharding = jax.NamedSharding(mesh, jax.P(rows or None, columns))
            share, mine = share_of(sharding), shared(data, sharding)
            given = [next(mine.epoch(0)), next(mine.epoch(1))]
            assert len(given[0]["x"]) * share.of == 16 * len(share.slices)
            batch, stacked = put(given[0], sharding), put_stacked(given, sharding)
            for name in ("x", "y"):
                assert batch[name].shape == whole[0][name].shape
                for shard in batch[name].addressable_shards:
                    np.testing.assert_array_equal(shard.data, whole[0][name][shard.index])
                for shard in stacked[name].addressable_shards:
                    expected = np.stack([each[name] for each in whole])[shard.index]
                    np.testing.assert_array_equal(shard.data, expected)
            of_each = np.split(given[0]["x"], len(share.slices))
            print(share.of, *(f"{{number}}:{{zlib.crc32(held)}}" for number, held in zip(share.slices, of_each)))
        """,
        processes=4, devices=devices,
    )  # fmt: skip
    assert {*map(len, printed)} == {15 * SOAK}
    for line in zip(*printed, strict=True):
        of = {each.split()[0] for each in line}
        read = {piece for each in line for piece in each.split()[1:]}
        # Each slice once, with one digest, whoever reads it.
        assert sorted(int(piece.split(":")[0]) for piece in read) == [*range(int(of.pop()))]
        assert not of


def trained(processes, devices, shape):
    """The losses, the last parameters and the result of an evaluation, of a run over a mesh of data and model."""
    printed = together(
        f"""
        mesh = jax.make_mesh({shape}, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        of_all = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))

        def eval_step(params, batch):
            return {{"loss": (batch["x"] @ params["w"] - batch["y"]) ** 2}}

        valid = ft.from_arrays({{"x": xs[:40], "y": ys[:40]}}, 16, shuffle=False, last="pad")
        result = ft.fit(
            update, update.init(of_all), data, epochs=2, log=ft.Every(updates=1), sharding=sharding, progress=False,
            evaluation=ft.Evaluation(eval_step, valid),
        )
        print([row["train/loss"] for row in result.history if "train/loss" in row], result.results["valid/loss"])
        print(np.asarray(result.state.params["w"].addressable_data(0)).tolist())
        """,
        processes, devices,
    )  # fmt: skip
    assert all(each == printed[0] for each in printed)  # The digests of replicas agree.
    return np.array([float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", " ".join(printed[0]))])


@pytest.mark.slow
def test_a_mesh_of_data_and_model_over_four_processes_trains_and_evaluates_as_one_process_does():
    alone = trained(1, 8, (2, 4))
    assert len(alone) == 8 + 1 + 4
    for processes, devices, shape in ((4, 2, (2, 4)), (2, 4, (4, 2)), *[(4, 2, (8, 1))] * (SOAK > 1)):
        np.testing.assert_allclose(trained(processes, devices, shape), alone, rtol=2.5e-6)


@pytest.mark.slow
def test_processes_that_hold_the_same_rows_and_give_others_are_told():
    printed = together(
        """
        mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        of_all = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        mine = [{"x": xs[process::2][:8], "y": ys[process::2][:8]}]
        told(lambda: ft.fit(
            update, update.init(of_all), mine, epochs=1, sharding=jax.NamedSharding(mesh, jax.P("data")), progress=False
        ))
        """,
        processes=2,
    )
    assert printed[0] == printed[1]
    assert printed[0][0].startswith(
        "FitError processes hold the same rows of 'x' and gave others: each reads those that its devices hold, as"
    )


@pytest.mark.slow
def test_the_record_of_several_processes_is_written_by_the_first_and_all_evaluate_or_none(tmp_path):
    printed = together(
        f"""
        import pathlib
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        state, read = update.init(jax.device_put(params, jax.NamedSharding(mesh, jax.P()))), []

        def eval_step(params, batch):
            return {{"loss": (batch["x"] @ params["w"] - batch["y"]) ** 2}}

        for steps in (4, 4):  # In folders that are not of one file system.
            test = ft.from_arrays({{"x": xs, "y": ys}}, 16)
            final = ft.Evaluation(eval_step, test, name="test")
            record = ft.Record(pathlib.Path({str(tmp_path)!r}, str(process)), final=final, report=False)
            result = ft.fit(update, state, data, steps=steps, sharding=sharding, progress=False, record=record)
            state = result.state
            print(int(state.step), [*result.final])
        """,
        processes=2,
    )
    assert printed[0] == ["4 ['last']"] * 2
    assert [line[0] for line in printed[1]] == ["4", "4"]
    assert [path.name for path in tmp_path.glob("*/run.json")] == ["run.json"]


@pytest.mark.slow
def test_data_that_is_the_same_in_processes_which_hold_other_rows_is_told_and_examples_by_number_are_shared():
    printed = together(
        """
        import grain
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        of_all = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))

        def trained(data, **options):
            options = {"sharding": jax.NamedSharding(mesh, jax.P("data")), "log": ft.Every(updates=1)} | options
            result = ft.fit(update, update.init(of_all), data, epochs=1, progress=False, **options)
            print(*(row["train/loss"] for row in result.history))

        dataset = grain.MapDataset.source([{"x": x, "y": y} for x, y in zip(xs, ys)])
        told(lambda: trained(dataset.batch(8)))
        told(lambda: trained(dataset.batch(8), unroll=2))
        loader = lambda shards: grain.DataLoader(
            data_source=dataset, sampler=grain.samplers.IndexSampler(64, shards, num_epochs=1),
            operations=[grain.transforms.Batch(8)],
        )
        told(lambda: trained(loader(grain.sharding.NoSharding())))
        trained(loader(grain.sharding.ShardByJaxProcess()))
        trained(dataset[process::2].batch(8))
        trained([{"x": np.ones((8, 4), np.float32), "y": np.ones(8, np.float32)}])  # Rows that are alike say nothing.
        trained(data)
        trained(ft.from_source(dataset, 16, seed=1))
        """,
        processes=2,
    )
    assert printed[0] == printed[1]
    *unshared, _, _, _, of_arrays, of_a_source = printed[0]
    assert len(unshared) == 3
    for line in unshared:
        assert line.startswith(
            "FitError each of 2 processes gave the same rows for a slice of its own: a batch would have them several"
            " times, and the run an order that depends on how many there are. Give examples by number,"
            " ft.from_source(dataset, batch_size), as of a grain.MapDataset before its batch: each process reads those"
        )
    assert of_a_source == of_arrays
