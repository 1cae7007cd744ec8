"""What `fit` costs with what a run leaves, at updates of a millisecond: records, trackers, remote checkpoints."""

import argparse
import contextlib
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import optax
from harness import machine, print_table
from loop import BATCH, fitted, model

import functrain as ft

os.environ.update(
    WANDB_MODE="offline", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false", MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
)  # fmt: skip


BEGUN = 2000  # Updates after which what is done once, such as finding the run in MLflow, has been done.


class Timed(ft.Hook):
    """The seconds from when a run has begun to its last update, and those of the processor."""

    def update_ended(self, run: ft.Run) -> None:
        if run.step == BEGUN:
            self.began = time.perf_counter(), time.process_time()

    def run_ended(self, run: ft.Run, error: object) -> None:
        self.seconds = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def compared(cases: Mapping[str, Callable[[Path, Timed], object]], rounds: int) -> dict[str, tuple[float, ...]]:
    """The medians, over interleaved rounds, of ratios to the first case: of time, processor time, and time in all.

    Args:
      cases: each runs `fit` with this hook, and may use this folder.
      rounds: how many ratios the medians are of.
    """
    names, times = list(cases), {name: [] for name in cases}
    for i in range(-1, rounds):  # The first one warms up.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            timed, start = Timed(), time.perf_counter()
            with tempfile.TemporaryDirectory() as directory:
                cases[name](Path(directory), timed)
                whole = time.perf_counter() - start
            if i >= 0:
                times[name].append((*timed.seconds, whole))
    ratios = {name: np.array(times[name]) / np.array(times[names[0]]) for name in names}
    return {name: tuple(statistics.median(column) for column in each.T) for name, each in ratios.items()}


@contextlib.contextmanager
def mlflow_server() -> Iterator[str]:
    """The address of one, on the cores that the updates use."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", port, "--workers", "1",
            "--backend-store-uri", f"sqlite:///{directory}/store.db", "--artifacts-destination", directory,
        ]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet, start_new_session=True) as server:
            try:
                for _ in range(600):
                    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                        break
                    time.sleep(0.2)
                yield f"http://127.0.0.1:{port}"
            finally:
                os.killpg(server.pid, 15)


def trackers(rounds: int, steps: int) -> None:
    """MLflow and W&B, to JSON lines alone; the server of MLflow has the cores of the updates."""
    params, update, data, _ = model(2048)
    data = data.take(BATCH * steps)

    def case(make: Callable[[Path], list]) -> Callable[[Path, Timed], object]:
        def run(directory: Path, timed: Timed) -> object:
            log = ft.JsonLines(directory / "log.jsonl")
            return fitted(params, update, data, loggers=[log, *make(directory)], hooks=[timed], progress=False)

        return run

    with mlflow_server() as uri:
        ratios = compared(
            {
                "JSON lines": case(lambda directory: []),
                "MLflow": case(lambda directory: [ft.MLflow(directory.name, uri=uri)]),
                "W&B, offline": case(lambda directory: [ft.WandB("run", directory=directory)]),
            },
            rounds,
        )
    rows = [("beside JSON lines", "once it has begun", "of the processor", f"the whole run of {steps:,}")]
    rows += [(name, *(f"{ratio:.3f}" for ratio in each)) for name, each in ratios.items()]
    print_table("Trackers", rows)


def records(rounds: int, steps: int) -> None:
    """A record, with its source and a final evaluation, and its report, to JSON lines alone."""
    params, update, data, evaluation = model(2048)
    data, root = data.take(BATCH * steps), Path(__file__).parents[1]
    final = dataclasses.replace(evaluation, name="test")

    def alone(directory: Path, timed: Timed) -> object:
        log = ft.JsonLines(directory / "log.jsonl")
        return fitted(params, update, data, loggers=[log], hooks=[timed], progress=False)

    def case(**options: object) -> Callable[[Path, Timed], object]:
        def run(directory: Path, timed: Timed) -> object:
            record = ft.Record(directory / "run", config={"rate": 1e-3}, **options)
            return fitted(params, update, data, record=record, hooks=[timed], progress=False)

        return run

    cases = {
        "JSON lines": alone,
        "a record": case(report=False),
        "with its source and a final evaluation": case(report=False, source=root / "functrain", final=final),
        "and its report": case(source=root / "functrain", final=final),
    }
    ratios = compared(cases, rounds)
    rows = [("beside JSON lines", "once it has begun", "of the processor", f"the whole run of {steps:,}")]
    rows += [(name, *(f"{ratio:.3f}" for ratio in each)) for name, each in ratios.items()]
    print_table("A record", rows)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an S3 API on loopback, on the cores that the updates use."""
    program = (
        "import logging, sys; from moto.server import ThreadedMotoServer;"
        "logging.getLogger('werkzeug').setLevel(logging.ERROR);"
        "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False); server.start();"
        "print(server.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as server:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).read()
        yield url
        server.stdin.close()


def addresses(rounds: int, steps: int) -> None:
    """Updates while 100 MB are saved again and again, at an address to in a folder; the end is not waited for."""
    params, update, data, _ = model(2048)
    large = {"frozen": np.zeros(25_000_000, np.float32), **params}
    parts = ft.partition(large, {"frozen": "frozen", "body": "body", "head": "head"})
    whole = ft.Optimizer(parts, {"frozen": ft.FROZEN, "body": optax.adamw(1e-4), "head": optax.adamw(1e-3)})
    update = ft.make_update(update.schedule.phases[0].loss_fn, whole)
    data = data.take(BATCH * steps)

    def case(place: Callable[[Path], object], **options: object) -> Callable[[Path, Timed], object]:
        def run(directory: Path, timed: Timed) -> object:
            checkpoints = ft.Checkpoints(
                place(directory), every=ft.Every(updates=steps // 4), **{k: v(directory) for k, v in options.items()}
            )
            return fitted(large, update, data, checkpoints=checkpoints, hooks=[timed], progress=False)

        return run

    with s3_server() as url:
        os.environ |= {
            "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing",
        }  # fmt: skip
        cases = {
            "in a folder": case(lambda directory: directory / "checkpoints"),
            "at an address": case(
                lambda directory: f"s3://bucket/{directory.name}", staging=lambda directory: directory / "staging"
            ),
        }
        ratios = compared(cases, rounds)
    rows = [(f"{steps:,} updates, 4 saves", "updates", "of the processor", "with the end of the last save")]
    rows += [(name, *(f"{ratio:.3f}" for ratio in each)) for name, each in ratios.items()]
    print_table("Checkpoints of 100 MB", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", action="append", choices=("records", "trackers", "addresses"))
    given = parser.parse_args()
    print(machine())
    wanted = given.only or ("records", "trackers", "addresses")
    for name, measure in (("records", records), ("trackers", trackers), ("addresses", addresses)):
        if name in wanted:
            measure(given.rounds, given.steps)


if __name__ == "__main__":
    main()
