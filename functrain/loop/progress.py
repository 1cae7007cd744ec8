"""What is shown of a run while it goes on: a bar on a terminal, else a line now and then."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from functrain.loop.run import Run

_MOST = 8  # Numbers of a line.


class Shown(NamedTuple):
    """What is shown of a run.

    Attributes:
      update: brings it up to date.
      say: shows a line of text beside it.
    """

    update: Callable[[], None]
    say: Callable[[str], None]


@contextlib.contextmanager
def progress_shown(
    run: Run, *, epochs: int | None, steps: int | None, data: Any, wanted: bool | None
) -> Iterator[Shown]:
    """Shows how far a run is, on the terminal or to a file."""
    if jax.process_index() or wanted is False:
        yield Shown(lambda: None, lambda text: None)
    elif wanted or sys.stderr.isatty():
        with _bar(run, steps or _total(run, epochs, data)) as shown:
            yield shown
    else:
        yield Shown(_lines(run), _say)


def went_on(run: Run, checkpoint: str) -> str:
    """From which checkpoint a run goes on, in a line."""
    return f"went on from {checkpoint}, step {run.step:,}, epoch {run.epoch}"


def stopped_by(run: Run, signal: str) -> str:
    """Where a run stands that a signal has stopped, and what is left of it, in a line."""
    kept = "nothing of it is saved, as it has no checkpoints"
    if run.checkpoints is not None:
        kept = f"saved to {run.checkpoints.where}: start it again to go on"
    return f"stopped by {signal} at step {run.step:,}, epoch {run.epoch}; {kept}"


def nothing_to_do(run: Run, where: str) -> str:
    """Why a run made no step, in a line."""
    why = f" ({run.stopped})" if run.stopped else ""
    return (
        f"{where} was finished at step {run.step:,}, epoch {run.epoch}{why}: nothing to do; for another run give"
        " another folder, or fit(..., fresh=True)"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(run: Run, total: int | None) -> Iterator[Shown]:
    from tqdm import tqdm

    shown = 0
    with tqdm(total=total, initial=run.step, unit="step") as bar:

        def show() -> None:
            nonlocal shown
            bar.update(run.step - bar.n)
            if len(run.history) != shown:
                shown = len(run.history)
                bar.set_postfix({name: value for name, value in run.history[-1].items() if name.endswith("/loss")})

        yield Shown(show, lambda text: bar.write(text, file=sys.stderr))


def _lines(run: Run) -> Callable[[], None]:
    epoch = run.epoch

    def show() -> None:
        nonlocal epoch
        if run.evaluated or run.epoch != epoch:
            epoch = run.epoch
            _say(f"step {run.step:,}, epoch {run.epochs_given}: {_numbers(run)}")

    return show


def _numbers(run: Run) -> str:
    """The losses of training that were logged at this step, and the results of the evaluations that just ended."""
    found: dict[str, float] = {}
    of: dict[str, int] = {}  # Updates in a mean.
    for row in reversed(run.history):
        if row["step"] != run.step:
            break
        found |= {name: value for name, value in row.items() if name.startswith("train/") and name.endswith("loss")}
        of |= {name: count for name in found if (count := row.get(f"{name.rpartition('/')[0]}/mean_of_updates"))}
    found |= {name: value for name, value in run.evaluated.items() if np.ndim(value) == 0}
    shown = {name: f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float | int)}
    said = [f"{text} (mean of {of[name]})" if name in of else text for name, text in shown.items()]
    return ", ".join(said[:_MOST]) or "nothing logged"


def _total(run: Run, epochs: int | None, data: Any) -> int | None:
    """The steps of all epochs, where the length of the data is known."""
    if epochs is None or not hasattr(data, "__len__"):
        return None
    batches, k = len(data), run.update.accumulate
    windows = {"flush": epochs * -(-batches // k), "drop": epochs * (batches // k), "carry": epochs * batches // k}
    return sum(map(len, run.update.schedule.turns(0, windows[run.update.options.remainder])))
