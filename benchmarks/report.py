"""What it takes to read and to draw a log of a million rows, as shares of `json.loads` of each of its lines."""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import machine, print_table

from functrain.loop.record.log import read_log
from functrain.loop.record.report import write


def make(path: Path, rows: int) -> None:
    """Writes a log of eight numbers a row."""
    noise = np.random.default_rng(0).random((rows, 3))
    with path.open("w") as file:
        for step in range(rows):
            trend, (a, b, c) = math.exp(-4 * step / rows), noise[step].tolist()
            row = {
                "step": step + 1, "time": 1.8e9 + step / 100, "epoch": step // 1000, "train/loss": 2 * trend + 0.3 * a,
                "train/accuracy": 1 - trend + 0.01 * b, "train/steps_per_second": 100 + c,
                "train/learning_rate/body": 1e-3 * (1 - step / rows), "train/learning_rate/head": 0.01,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def line_by_line(path: Path) -> list[dict[str, float]]:
    """The rows, read the plainest way."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "log.jsonl")
        make(path, args.rows)
        cases = {
            "json.loads of each line": lambda: line_by_line(path),
            "the log, read": lambda: read_log(path),
            "the log, read and drawn": lambda: write(Path(directory)),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, case in cases.items():
                start = time.perf_counter()
                case()
                times[name].append(time.perf_counter() - start)
    base = np.array(times["json.loads of each line"])
    print(machine())
    rows = [(name, f"{np.median(each / base):.2f}", f"{np.median(each):.1f}") for name, each in times.items()]
    print_table(f"{args.rows:,} rows of eight numbers", [("", "share", "seconds, for scale"), *rows])


if __name__ == "__main__":
    main()
