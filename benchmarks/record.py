"""What `fit` costs with what a run leaves beside its checkpoints, at updates of a millisecond: trackers."""

import argparse
import contextlib
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10_000)
    given = parser.parse_args()
    print(machine())
    trackers(given.rounds, given.steps)


if __name__ == "__main__":
    main()
