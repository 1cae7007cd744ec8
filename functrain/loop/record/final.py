"""The final evaluation of a run: its last and its best checkpoint, and what of the results goes where."""

import contextlib
import gc
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from functrain.errors import SaveError
from functrain.loop.checkpoint.checkpoints import Checkpoints
from functrain.loop.checkpoint.folder import Name
from functrain.loop.evaluation import Evaluation
from functrain.loop.evaluations import params_for
from functrain.loop.names import named_values
from functrain.loop.outcome import Outcome
from functrain.loop.record.files import FORMAT, RESULTS_FOLDER
from functrain.loop.record.folder import RecordFolder
from functrain.loop.record.plainly import plainly
from functrain.tree.warn import warn
from functrain.update.state import TrainState
from functrain.update.update import Update


class Final(NamedTuple):
    """What one evaluation found of one state of a run.

    Attributes:
      evaluation: which.
      of: "last", or "best valid/loss".
      step: of the state.
      checkpoint: its name; None where it was not saved.
      outcome: what was found.
    """

    evaluation: Evaluation
    of: str
    step: int
    checkpoint: str | None
    outcome: Outcome


def finals_of(
    evaluations: Sequence[Evaluation], update: Update, state: TrainState, checkpoints: Checkpoints | None
) -> Iterator[Final]:
    """Evaluates the last state, and the best checkpoint by each result of which the best is kept.

    Raises:
      EvaluationError: an evaluation can't be computed.
      CheckpointError: the best checkpoint can't be read.
    """
    if checkpoints is not None:
        with contextlib.suppress(SaveError):  # Whoever saved tells.
            checkpoints.wait()
    last = _saved_as(state, checkpoints)
    of_last = []
    for evaluation in evaluations:
        final = Final(evaluation, "last", int(state.step), last, outcome_of(evaluation, update, state))
        of_last.append(final)
        yield final
    for metric in checkpoints.retention.best if checkpoints is not None else ():
        assert checkpoints is not None
        best = checkpoints.best(metric)
        if best is None:
            continue
        if best.name == last:
            yield from (final._replace(of=f"best {metric}") for final in of_last)
            continue
        restored = checkpoints.restore(like=state, step=best)
        assert restored is not None
        for evaluation in evaluations:
            outcome = outcome_of(evaluation, update, restored.state)
            yield Final(evaluation, f"best {metric}", int(restored.state.step), best.name, outcome)
        del restored
        gc.collect()  # It is in cycles, and where there are several best states, each would be kept with those before.


def outcome_of(evaluation: Evaluation, update: Update, state: TrainState) -> Outcome:
    """What an evaluation finds of a state, or of its averages where it asks for them."""
    return evaluation.outcome(params_for(evaluation, update, state), state.model_state)


def numbers_of(finals: Sequence[Final]) -> dict[str, dict[str, float]]:
    """The results that are numbers, by what they are of and by name."""
    found: dict[str, dict[str, float]] = {}
    for final in finals:
        numbers = {name: value for name, value in final.outcome.results.items() if _is_number(value)}
        found.setdefault(final.of, {}).update(
            {f"{final.evaluation.name}/{name}": value for name, value in numbers.items()}
        )
    return found


def write_finals(folder: RecordFolder, finals: Sequence[Final]) -> None:
    """Writes results: numbers to `results.json`, arrays, outputs and figures beside it.

    Raises:
      OSError: something can't be written.
    """
    entries = []
    written: dict[int, dict[str, Any]] = {}  # What is of one outcome is written once.
    for final in finals:
        files = written.get(id(final.outcome))
        if files is None:
            files = written[id(final.outcome)] = _files(folder, final)
        numbers = plainly(numbers_of([final])[final.of])
        entry = {"evaluation": final.evaluation.name, "of": final.of, "step": final.step}
        entries.append(entry | {"checkpoint": final.checkpoint, "numbers": numbers} | files)
    folder.write_results({"format": FORMAT, "final": entries})


def _files(folder: RecordFolder, final: Final) -> dict[str, Any]:
    stem = f"{RESULTS_FOLDER}/{_slug(final.evaluation.name)}-{_slug(final.of)}"
    arrays = {name: np.asarray(value) for name, value in final.outcome.results.items() if not _is_number(value)}
    kept = {f"{stem}.npz": _plain_arrays(arrays), f"{stem}-outputs.npz": _plain_arrays(final.outcome.outputs)}
    for name, some in kept.items():
        if some:
            folder.write_arrays(name, some)
    figures = {}
    for name, metric in final.evaluation.metrics.items():
        picture = _drawn(name, metric, final.outcome.by_metric[name])
        if picture is not None:
            place = figures[f"{final.evaluation.name}/{name}"] = f"{stem}-{_slug(name)}.png"
            folder.write(place, picture)
    of_arrays, of_outputs = (name if some else None for name, some in kept.items())
    return {"arrays": of_arrays, "outputs": of_outputs, "figures": figures}


def _drawn(name: str, metric: Any, result: Any) -> bytes | None:
    """A metric's figure as a png; what goes wrong in a package of the user's costs its figure alone."""
    if not hasattr(metric, "figure"):
        return None
    try:
        picture = io.BytesIO()
        metric.figure(result).savefig(picture, format="png", dpi=150, bbox_inches="tight")
    except Exception as error:
        warn(f"the figure of {name!r} could not be drawn: {type(error).__name__}: {error}")
        return None
    return picture.getvalue()


def _plain_arrays(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Those that a file can hold without running code when it is read."""
    found = {name: np.asarray(value) for name, value in named_values(dict(arrays))}
    told = [name for name, value in found.items() if value.dtype == object]
    if told:
        warn(f"the results {told} are no arrays of numbers or texts, and are not kept: return arrays, or numbers")
    return {name: value for name, value in found.items() if value.dtype != object}


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _saved_as(state: TrainState, checkpoints: Checkpoints | None) -> str | None:
    """The name of the newest checkpoint, if it is of this state."""
    if checkpoints is None:
        return None
    newest = next(reversed(checkpoints.steps()), None)
    name = None if newest is None else Name.of(newest.name)
    is_it = name is not None and (name.step, name.pending) == (int(state.step), int(state.pending))
    return newest.name if is_it and newest is not None else None


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip(".") or "_"
