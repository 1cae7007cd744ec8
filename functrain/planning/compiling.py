"""A program as XLA's partitioner leaves it: what each device runs, before a backend makes it its own."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options with which LLVM works little on code that is never run; XLA's own passes are as ever."""


class Compiled(NamedTuple):
    """What XLA made of a program.

    Attributes:
      text: of each device's program, in HLO, after it was partitioned; None where there is one device.
      program: that can be called.
    """

    text: str | None
    program: Any


def compiled(lowered: Any) -> Compiled:
    """Compiles what `jax.jit(...).lower` gave.

    XLA shows its passes only as it runs them, so no cache may have the program: the name of a pass that there is none
    of makes it another one than any that is run, and it is not put into a cache.
    """
    with tempfile.TemporaryDirectory() as folder, _not_cached():
        options = {
            **FAST,
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": "spmd-partitioning",
            "xla_disable_hlo_passes": "none-for-a-plan",
        }
        program = lowered.compile(compiler_options=options)
        shown = [*Path(folder).glob("*.after_spmd-partitioning.*.txt")]
        return Compiled(shown[0].read_text() if shown else None, program)


@contextlib.contextmanager
def _not_cached() -> Iterator[None]:
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)
