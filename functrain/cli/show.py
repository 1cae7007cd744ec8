"""`functrain show`: what a run was, how far it came, and how it went."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from functrain.cli.answer import Answer
from functrain.cli.curves import sparkline
from functrain.cli.place import place_of
from functrain.loop.record.curves import Curve, results_in
from functrain.loop.record.left import Left, read_left
from functrain.loop.record.reading import Recorded
from functrain.loop.record.words import duration, ended_in_words, moment, number, shown
from functrain.tree.text import aligned, bytes_in_words, leaves_in_words

_MOST_POINTS = 200
_MOST_FINAL = 12


def run(arguments: Namespace) -> Answer:
    """Shows a run, as far as what is left of it can be read.

    Raises:
      CheckpointError: there is nothing of a run.
    """
    place = place_of(arguments.run)
    left = read_left(place.directory)
    curves = results_in(left.log.curves, everything=arguments.all)
    data = {
        "run": place.folder.where,
        "record": _record(left.recorded) if left.has_record else None,
        "final": [final._asdict() for final in left.final],
        "trained": _trained(left),
        "progress": _progress(left),
        "results": _results(left, results_in(left.log.curves)),
        "curves": {name: curve.thinned(_MOST_POINTS)._asdict() for name, curve in curves.items()},
        "checkpoints": [saved.name for saved in left.checkpoints],
        "best": left.best(),
        "log": {
            "path": None if left.log_path is None else place.said(str(left.log_path)),
            "rows": left.log.rows,
            "damaged": left.log.damaged,
            "repeated": left.log.repeated,
        },
        "problems": [place.said(problem) for problem in left.problems],
    }
    return Answer(_text(arguments.run, left, data, curves), data)


def _record(recorded: Recorded) -> dict[str, Any]:
    return {
        "name": recorded.name,
        "config": recorded.config,
        "parameters": recorded.parameters,
        "sections": [
            section._asdict() | {"warnings": [{"text": text, "count": count} for text, count in section.warnings]}
            for section in recorded.sections
        ],
    }


def _trained(left: Left) -> dict[str, Any] | None:
    if left.held is not None:
        parts = {
            name: {"optimizer": part.optimizer, "leaves": len(part.paths), "bytes": part.nbytes}
            for name, part in left.held.parts.items()
        }
        return {"parts": parts, "versions": left.held.versions}
    if left.recorded.parts:
        parts = {
            name: {"optimizer": part.optimizer, "leaves": part.leaves, "bytes": part.bytes}
            for name, part in left.recorded.parts.items()
        }
        return {"parts": parts, "versions": left.recorded.versions}
    return None


def _progress(left: Left) -> dict[str, Any]:
    """Where the run was when it was last heard of: of its log and its newest checkpoint the later one."""
    newest = left.checkpoints[-1] if left.checkpoints else None
    last, held = left.log.last, left.held
    saved = -1 if newest is None or newest.step is None else newest.step
    is_logged = last.get("step", -1) >= saved
    return {
        "step": last["step"] if last and is_logged else None if newest is None else newest.step,
        "epoch": last.get("epoch") if is_logged else None if held is None else held.epoch,
        "time": last.get("time") if last and is_logged else None if newest is None else newest.time,
        "seconds": None if held is None else held.seconds,
    }


def _results(left: Left, curves: Mapping[str, Curve]) -> dict[str, Any]:
    """The last and the best of each result of an evaluation."""
    results = {}
    for name, curve in curves.items():
        if not name.startswith("train/"):
            mode = left.mode(name)
            best = None if mode is None else curve.best(mode)
            found: dict[str, Any] = {"best": None, "best_step": None}
            if best is not None:
                found = {"best": curve.values[best], "best_step": curve.steps[best]}
            results[name] = {"last": curve.values[-1], "step": curve.steps[-1], "mode": mode, **found}
    return results


def _text(run: str, left: Left, data: Mapping[str, Any], curves: Mapping[str, Curve]) -> str:
    facts = _facts(left.recorded) if left.has_record else []
    for name, part in (data["trained"] or {"parts": {}})["parts"].items():
        size = bytes_in_words(part["bytes"] or 0) + (" with its state" if left.held is not None else "")
        facts.append((f"part {name}", f"{part['optimizer'] or '-'}, {leaves_in_words(part['leaves'] or 0)}, {size}"))
    facts.append(("progress", _progress_in_words(data["progress"])))
    for name, result in data["results"].items():
        best = "" if result["best"] is None else f", best {number(result['best'])} at step {result['best_step']}"
        facts.append((name, f"{number(result['last'])} at step {result['step']}{best}"))
    if data["checkpoints"]:
        best = "".join(f"; best by {name}: {best}" for name, best in data["best"].items() if best)
        facts.append(("checkpoints", f"{', '.join(data['checkpoints'])}{best}"))
    sections = [run, aligned(facts, [str.ljust, str.ljust])]
    rows = [(name, number(curve.values[0]), sparkline(curve.values), number(curve.values[-1]))
            for name, curve in curves.items()]  # fmt: skip
    sections += ["", aligned(rows, [str.ljust, str.rjust, str.ljust, str.ljust])] if rows else []
    sections += ["", _final(left)] if left.final else []
    sections += ["", *(f"! {problem}" for problem in data["problems"])] if data["problems"] else []
    return "\n".join(sections)


def _facts(recorded: Recorded) -> list[tuple[str, str]]:
    """What a record says: its name, how it ended, and of each time that it was started again what was another."""
    facts = [("name", recorded.name or "-")]
    facts += [("ended", ended_in_words(recorded.sections[-1]))] if recorded.sections else []
    for section in recorded.sections[1:]:
        changes = [f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in section.changed.items()]
        facts.append((f"from step {section.from_step}", f"started again {moment(section.started)} UTC"
                      + "".join(f"; {change}" for change in changes)))  # fmt: skip
    warnings = sum(count for section in recorded.sections for _, count in section.warnings)
    return facts + ([("warnings", str(warnings))] if warnings else [])


def _final(left: Left) -> str:
    """The final numbers, of the best and of the last side by side."""
    heads = [f"{final.of}" + ("" if final.step is None else f", step {final.step}") for final in left.final]
    names = list(dict.fromkeys(name for final in left.final for name in final.numbers))
    rows = [[name, *(number(final.numbers.get(name)) for final in left.final)] for name in names[:_MOST_FINAL]]
    table = aligned([["final", *heads], *rows], [str.ljust, *[str.rjust] * len(heads)])
    return table + (f"\n... and {len(names) - _MOST_FINAL} more, with --json" if len(names) > _MOST_FINAL else "")


def _progress_in_words(progress: Mapping[str, Any]) -> str:
    if progress["step"] is None:
        return "none is known"
    words = [f"step {progress['step']}"]
    words += [] if progress["epoch"] is None else [f"epoch {progress['epoch']}"]
    words += [f"{moment(progress['time'])} UTC"] if moment(progress["time"]) != "-" else []
    words += [] if progress["seconds"] is None else [f"after {duration(progress['seconds'])}"]
    return ", ".join(words)
