"""`functrain show`: what a run was, how far it came, and how it went."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from functrain.cli.answer import Answer, duration, moment, number
from functrain.cli.checkpoints import saved_at
from functrain.cli.curves import Curve, Log, curves_of, log_of, sparkline
from functrain.cli.held import Held, held_in
from functrain.cli.place import Place, place_of
from functrain.errors import CheckpointError
from functrain.loop.checkpoint.folder import Entry, Name
from functrain.loop.checkpoint.retention import Mode, Retention, mode_of
from functrain.tree.text import aligned, bytes_in_words, leaves_in_words, listed

_MOST_POINTS = 200


def run(arguments: Namespace) -> Answer:
    """Shows a run, as far as what is left of it can be read.

    Raises:
      CheckpointError: there is neither a checkpoint nor a log.
    """
    place = place_of(arguments.run)
    entries, aside = [entry for entry in place.folder.entries() if entry.is_there], place.folder.corrupt()
    if not entries and not aside and place.log is None:
        raise CheckpointError(f"there is neither a checkpoint nor a log in {arguments.run}: give the folder of a run")
    newest, held, problems = _newest_readable(entries)
    log = Log([], 0, 0, [f"there is no log in {arguments.run}"]) if place.log is None else log_of(place.log)
    problems += log.problems
    problems += [] if entries else ["there is no checkpoint"]
    problems += [f"set aside as damaged: {listed(aside)}"] if aside else []
    modes: dict[str, Mode] = dict(next((entry.best for entry in reversed(entries) if entry.best), {}))
    curves = curves_of(log.rows, everything=arguments.all)
    results = _results(curves_of(log.rows, everything=False), modes)
    data = {
        "run": place.folder.where,
        "trained": None if held is None else _trained(held),
        "progress": _progress(newest, held, log),
        "results": results,
        "curves": {name: curve.thinned(_MOST_POINTS)._asdict() for name, curve in curves.items()},
        "checkpoints": [entry.path.name for entry in entries],
        "best": _best(entries, modes),
        "log": _log(place, log),
        "problems": problems,
    }
    return Answer(_text(arguments.run, data, curves), data)


def _newest_readable(entries: list[Entry]) -> tuple[Entry | None, Held | None, list[str]]:
    problems: list[str] = []
    for entry in reversed(entries):
        try:
            return entry, held_in(entry.path), problems
        except CheckpointError as error:
            problems.append(str(error))
    return (entries[-1] if entries else None), None, problems


def _trained(held: Held) -> dict[str, Any]:
    parts = {
        name: {"optimizer": part.optimizer, "leaves": len(part.paths), "bytes": part.nbytes}
        for name, part in held.parts.items()
    }
    return {"parts": parts, "versions": held.versions}


def _progress(newest: Entry | None, held: Held | None, log: Log) -> dict[str, Any]:
    """Where the run was when it was last heard of: of its log and its newest checkpoint the later one."""
    name = None if newest is None else Name.of(newest.path.name)
    last: Mapping[str, Any] = log.rows[-1] if log.rows else {}
    saved = -1 if name is None else name.step
    is_logged = last.get("step", -1) >= saved
    return {
        "step": last["step"] if last and is_logged else None if name is None else name.step,
        "epoch": last.get("epoch") if is_logged else None if held is None else held.epoch,
        "time": last.get("time") if last and is_logged else None if newest is None else saved_at(newest),
        "seconds": None if held is None else held.seconds,
    }


def _results(curves: Mapping[str, Curve], modes: Mapping[str, Mode]) -> dict[str, Any]:
    """The last and the best of each result of an evaluation."""
    results = {}
    for name, curve in curves.items():
        if not name.startswith("train/"):
            mode = modes.get(name) or _mode(name)
            best = None if mode is None else curve.best(mode)
            found: dict[str, Any] = {"best": None, "best_step": None}
            if best is not None:
                found = {"best": curve.values[best], "best_step": curve.steps[best]}
            results[name] = {"last": curve.values[-1], "step": curve.steps[-1], "mode": mode, **found}
    return results


def _mode(name: str) -> Mode | None:
    try:
        return mode_of(name, None)
    except ValueError:
        return None


def _best(entries: list[Entry], modes: Mapping[str, Mode]) -> dict[str, str | None]:
    """The best checkpoint by each result of which the run keeps it."""
    metrics = {entry.path.name: entry.metrics for entry in entries}
    return {name: Retention(best=modes).best_of(metrics, name) for name in modes}


def _log(place: Place, log: Log) -> dict[str, Any]:
    return {
        "path": place.shown_log,
        "rows": len(log.rows),
        "damaged": log.damaged,
        "repeated": log.repeated,
    }


def _text(run: str, data: Mapping[str, Any], curves: Mapping[str, Curve]) -> str:
    facts = []
    for name, part in (data["trained"] or {"parts": {}})["parts"].items():
        facts.append((f"part {name}", f"{part['optimizer']}, {leaves_in_words(part['leaves'])}, "
                      f"{bytes_in_words(part['bytes'])} with its state"))  # fmt: skip
    facts.append(("progress", _progress_in_words(data["progress"])))
    for name, result in data["results"].items():
        best = "" if result["best"] is None else f", best {number(result['best'])} at step {result['best_step']}"
        facts.append((name, f"{number(result['last'])} at step {result['step']}{best}"))
    if data["checkpoints"]:
        best = "".join(f"; best by {name}: {best}" for name, best in data["best"].items() if best)
        facts.append(("checkpoints", f"{', '.join(data['checkpoints'])}{best}"))
    left = [str.ljust, str.ljust]
    sections = [run, aligned(facts, left)]
    rows = [(name, number(curve.values[0]), sparkline(curve.values), number(curve.values[-1]))
            for name, curve in curves.items()]  # fmt: skip
    sections += ["", aligned(rows, [str.ljust, str.rjust, str.ljust, str.ljust])] if rows else []
    sections += ["", *(f"! {problem}" for problem in data["problems"])] if data["problems"] else []
    return "\n".join(sections)


def _progress_in_words(progress: Mapping[str, Any]) -> str:
    if progress["step"] is None:
        return "none is known"
    words = [f"step {progress['step']}"]
    words += [] if progress["epoch"] is None else [f"epoch {progress['epoch']}"]
    words += [f"{moment(progress['time'])} UTC"] if moment(progress["time"]) != "-" else []
    words += [] if progress["seconds"] is None else [f"after {duration(progress['seconds'])}"]
    return ", ".join(words)
