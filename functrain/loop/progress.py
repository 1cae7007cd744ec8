"""A progress bar on the terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from functrain.loop.run import Run


@contextlib.contextmanager
def progress_bar(
    run: Run, *, epochs: int | None, steps: int | None, data: Any, wanted: bool | None
) -> Iterator[Callable[[], None]]:
    """A bar of optimizer steps on the terminal, or none; gives the function that brings it up to date."""
    if jax.process_index() or not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda: None
        return
    from tqdm import tqdm

    shown = 0
    with tqdm(total=_total(run, epochs, data) if steps is None else steps, initial=run.step, unit="step") as bar:

        def show() -> None:
            nonlocal shown
            bar.update(run.step - bar.n)
            if len(run.history) != shown:
                shown = len(run.history)
                bar.set_postfix({name: value for name, value in run.history[-1].items() if name.endswith("/loss")})

        yield show


def _total(run: Run, epochs: int | None, data: Any) -> int | None:
    """The steps of all epochs, where the length of the data is known."""
    if epochs is None or not hasattr(data, "__len__"):
        return None
    batches, k = len(data), run.update.accumulate
    windows = {"flush": epochs * -(-batches // k), "drop": epochs * (batches // k), "carry": epochs * batches // k}
    return sum(map(len, run.update.schedule.turns(0, windows[run.update.options.remainder])))
