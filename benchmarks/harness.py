"""How the benchmarks measure: interleaved rounds in one process, medians of ratios, nothing absolute.

A shared machine changes its speed from one second to the next, so a time on its own says nothing. Each round runs
every candidate once, in an order that changes, and gives one ratio of each candidate to the first; the median of the
rounds' ratios is what a table shows.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax


def measure(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 31, calls: int = 20, host: bool = False
) -> dict[str, float]:
    """The median ratio of each candidate's time to that of the first one.

    Args:
      candidates: functions without arguments, each of which does its work once and returns what must be ready.
      rounds: how many ratios the median is of.
      calls: how often a candidate is called in a round.
      host: count what the calling thread takes of a processor until a call returns, when all before it is ready; the
        programs on simulated devices take the same cores, so that a clock would measure who is given one.

    Returns:
      `{name: ratio}`, 1.0 for the first, and under "seconds" the first one's median time a call, for scale alone.
    """
    for run in candidates.values():
        jax.block_until_ready(run())
        jax.block_until_ready(run())
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                of_calls = _of_the_thread if host else _until_ready
                times[name].append(of_calls(candidates[name], calls) / calls)
            gc.collect()
    finally:
        gc.enable()
    reference = times[names[0]]
    ratios = {name: statistics.median(t / r for t, r in zip(times[name], reference, strict=True)) for name in names}
    return ratios | {"seconds": statistics.median(reference)}


def _until_ready(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def _of_the_thread(run: Callable[[], Any], calls: int) -> float:
    total = 0.0
    for _ in range(calls):
        start = time.thread_time()
        result = run()
        total += time.thread_time() - start
        jax.block_until_ready(result)
    return total


def machine() -> str:
    """One line that says what the numbers were measured on."""
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("jax", "optax"))
    device = jax.devices()[0].device_kind
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}; Python {platform.python_version()}, {versions}"


def print_table(title: str, rows: list[tuple[str, ...]]) -> None:
    """Prints rows of text, the first of which is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
