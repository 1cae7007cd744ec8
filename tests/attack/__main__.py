"""Attacks a run at every operation on files: `python tests/attack`, with --orbax one with Orbax's CheckpointManager."""

import argparse
import collections
import os
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(1, str(HERE.parent))
ENVIRONMENT = {  # As in the conftest of the tests.
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orbax", action="store_true")
    parser.add_argument("--most", type=int, help="draw so many attacks of each row; by default all are made")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--match", default="", help="a pattern of what they are called: 'EIO, once, at operation 5 '")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ENVIRONMENT, JAX_COMPILATION_CACHE_DIR=f"{folder}/compiled")
        sys.exit(attack(args, Path(folder)))


def attack(args, folder):
    """1 where an attack failed."""
    import arena
    import damage
    import faults
    import power
    import sweep
    import table

    if reason := faults.why_not():
        sys.exit(f"no attack: {reason}")
    ours = arena.Arena("orbax_victim" if args.orbax else "fit_victim", folder, faults.compiled(folder))
    rows = sweep.at_operations(ours) | damage.of_files(ours)
    if reason := power.why_not(ours.scratch()):
        print(f"no power cuts: {reason}")
    else:
        rows |= power.cuts(ours)
    rows = {
        row: [each for each in attacks if re.search(args.match, f"{row}, {each.what}")] for row, attacks in rows.items()
    }
    rows = {row: attacks for row, attacks in rows.items() if attacks}
    print(f"{sum(map(len, rows.values()))} attacks", table.HEAD, sep="\n\n", flush=True)
    total, failures = collections.Counter(), []
    for row, count, failed in sweep.sweep(rows, args.most, args.workers):
        total, failures = total + count, failures + failed
        print(table.line(row, count), flush=True)
        print(*map(table.described, failed), sep="\n", end="", file=sys.stderr, flush=True)
    print(table.line("all", total), table.grouped(failures), sep="\n\n")
    return bool(failures)


if __name__ == "__main__":
    main()
