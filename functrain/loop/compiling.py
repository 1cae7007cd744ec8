"""Programs of a run are compiled side by side before it begins, and kept for the next time that it is started."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.loop.every import Every
from functrain.loop.run import Run
from functrain.loop.shares import check_sharers
from functrain.loop.slices import tell_of_no_mean


def compile_for(
    run: Run, *, log: Every, epochs: int | None, steps: int | None, batch: Any = None, scan: Any = None
) -> None:
    """Compiles what calls with such a batch will run, and returns when all of it is there; once for each kind of call.

    With the first it is found out whether microbatches have the loss of the whole batch.

    Args:
      run: where it stands.
      log: how often it measures.
      epochs: when it ends.
      steps: when it ends.
      batch: what `update` is given next.
      scan: what `update.scan` is given next.
    """
    kind = "scan" if batch is None else "batch"
    if kind in run.compiled:
        return
    is_first = not run.compiled
    run.compiled.add(kind)
    if is_first:
        of_scan = 0 if scan is None else 1
        given = batch if scan is None else scan
        check_sharers(given, run.reader.data, axis=of_scan)
        run.batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[of_scan:], _dtype(leaf)), given)
    if scan is not None and _leaves_single(run, scan):
        run.compiled.add("batch")
        batch = jax.tree.map(lambda leaf: leaf[0], scan)
    end = most_steps(run, epochs=epochs, steps=steps)
    if log.updates is None:
        measures = log.minutes is not None
    else:
        measures = end is None or end // log.updates > run.step // log.updates
    is_cut_short = (run.reader.batches_an_epoch or 0) % run.update.accumulate > 0
    run.update.compile(run.state, batch, scan=scan, measured=measures, flush=is_cut_short, until=end)
    options = run.update.options
    is_apart = options.microbatches > 1 or options.by_shard is not None or options.per_example is not None
    if is_apart and is_first:
        tell_of_no_mean(run.update, run.state, jax.tree.map(lambda leaf: leaf[0], scan) if batch is None else batch)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _leaves_single(run: Run, scan: Any) -> bool:
    """Whether an epoch has batches that no scan takes."""
    batches = run.reader.batches_an_epoch
    return batches is not None and batches % len(jax.tree.leaves(scan)[0]) > 0


def most_steps(run: Run, *, epochs: int | None, steps: int | None) -> int | None:
    """An upper bound of the steps of a run; None where the length of the data is not known."""
    bounds = [steps] if steps is not None else []
    if epochs is not None and (batches := run.reader.batches_an_epoch) is not None:
        of_a_turn = max(map(len, run.update.schedule.every_turn))
        bounds.append(of_a_turn * epochs * -(-batches // run.update.accumulate))
    return min(bounds, default=None)


def keep_programs(directory: str | os.PathLike[str] | None) -> None:
    """Has JAX keep what it compiles from now on in a folder, if one is given, and take it from there; to its end."""
    if directory is None:
        return
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    # All of it: by default what compiles in less than a second is compiled again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX looks for a folder once, at the first program of a process.
