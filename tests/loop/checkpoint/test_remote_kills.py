"""Runs that send checkpoints to an address, killed while they do, and started again here or on another machine."""

import json
import random
import signal

import pytest
from processes import start
from s3 import environment, objects
from soak import SOAK, in_soak

import functrain as ft
from functrain.loop.remote.store import Store

KILLS = SOAK
SAFETY = 120  # Seconds after which a process hangs.

RUN = """
    import zlib
    os.environ.update(json.loads(sys.argv[3]))

    def loss_fn(params, batch, key):
        noisy = params["w"] + jax.random.normal(key, params["w"].shape)
        return ft.Loss(jnp.mean(noisy**2) * jnp.mean(batch["x"]), metrics={"x": jnp.mean(batch["x"])})

    class Waits(ft.Hook):
        def checkpoint_saved(self, run):
            if sys.argv[4] == "waits":
                checkpoints.wait()

    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": ft.with_lr(optax.adam, 0.1)})
    update = ft.make_update(loss_fn, optim)
    data = ft.from_arrays({"x": np.arange(16, dtype=np.float32)}, batch_size=2, seed=0)
    valid = ft.Evaluation(lambda params, batch: {"loss": jnp.mean((params["w"] * batch["x"].mean()) ** 2)}, data,
                          every=ft.Every(updates=4))
    checkpoints = ft.Checkpoints(sys.argv[1], staging=sys.argv[2], every=ft.Every(updates=2), keep_best="valid/loss",
                                 limits=ft.Limits(request=5.0, patience=5.0, lease=1.0))
    print("started", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ft.fit(update, update.init(params, key=jax.random.key(3)), data, epochs=3, evaluation=valid,
                        checkpoints=checkpoints, hooks=[Waits()], log=ft.Every(updates=1), progress=False,
                        # One of its own, as a process that is killed may leave half of a program there.
                        compilation_cache=pathlib.Path(sys.argv[2]).parent / "programs")
    rows = [{name: value for name, value in row.items() if name not in ("time", "train/steps_per_second")}
            for row in result.history]
    leaves = jax.tree.leaves((result.state.params, result.state.opt_state))
    print(json.dumps([int(result.state.step), [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in leaves], rows]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def run(proxy, tmp_path):
    """`run(address, machine, kill=request)`: what a run ends with; None where it was killed at that request."""

    def ended(address, machine, *, kill=None, way="waits"):
        variables = json.dumps(environment(proxy.url))
        process = start(RUN, address, tmp_path / machine, variables, way)
        count, killed = 0, False

        def fault(number, method, path):
            nonlocal count, killed
            count += 1
            if kill is not None and kill(count, method, path) and not killed:
                killed = True
                process.send_signal(signal.SIGKILL)
                return "pass" if count % 2 else "cut"  # It may arrive all the same.
            return "pass"

        proxy.fault = fault
        output, errors = process.communicate(timeout=SAFETY)
        proxy.fault = lambda number, method, path: "pass"
        assert process.returncode == (-signal.SIGKILL if killed else 0), errors
        return None if killed else json.loads(output.splitlines()[-1])

    return ended


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run ends with that nobody kills."""
    process = start(RUN, "memory://whole", tmp_path_factory.mktemp("whole"), "{}", "asynchronous")
    output, errors = process.communicate(timeout=SAFETY)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def check_left(address, tmp_path):
    """What is at an address is whole and sound, and nothing else is left there."""
    store = Store(address)
    checkpoints = ft.Checkpoints(address, staging=tmp_path / "look", keep_best="valid/loss")
    kept = {path.name for path in checkpoints.steps()}
    assert {name.partition("/")[0].partition(".")[0] for name in objects(store)} == kept | {"log"}
    for name in kept:
        assert [*checkpoints._place.folder.mirror.damages(name)] == []
    assert [name for name in store.listed(".functrain") if "lease" not in name] == []


@pytest.mark.parametrize(
    ("method", "path", "nth"),
    [
        pytest.param("PUT", "/6/facts/metadata", 1, marks=in_soak),
        ("PUT", "/6.manifest.json", 1),
        # Of the objects of a checkpoint whose manifest is gone.
        pytest.param("POST", "?delete", 5, marks=in_soak),
    ],
)
def test_killed_at_an_instant_of_an_upload_or_of_retention_it_ends_with_the_same_bits(
    run, whole, s3, tmp_path, method, path, nth
):
    seen = 0

    def kill(count, its, where):
        nonlocal seen
        seen += its == method and path in where
        return seen == nth

    assert run(s3, "a", kill=kill) is None
    assert run(s3, "b" if method == "PUT" else "a") == whole
    check_left(s3, tmp_path)


def test_killed_again_and_again_here_and_elsewhere_it_ends_with_the_same_bits(run, whole, s3, tmp_path):
    draw, kills, number = random.Random(14), 0, 0
    while kills < KILLS:
        address, ended, number = f"{s3}-{number}", None, number + 1
        while ended is None:
            at, machine = draw.randint(1, 110), draw.choice("aab")
            is_last = kills >= KILLS
            kill = None if is_last else lambda count, method, path, at=at: count == at
            ended = run(address, f"{number}{machine}", kill=kill, way=draw.choice(["waits", "asynchronous"]))
            kills += ended is None
        assert ended == whole, f"{address}, {kills} kills"
        check_left(address, tmp_path / address[-6:])
    print(f"{kills} kills in {number} runs, all of which end with the same bits")
