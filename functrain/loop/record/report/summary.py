"""What there is to say of a run, in words and tables: the same for the page and for a pull request."""

import re
from collections.abc import Mapping
from typing import Any

from functrain.loop.names import named_values
from functrain.loop.record.curves import results_in
from functrain.loop.record.left import Left
from functrain.loop.record.reading import RUN, Part, Section
from functrain.loop.record.report.tables import Table
from functrain.loop.record.words import alike, duration, ended_in_words, moment, number, shown
from functrain.tree.text import bytes_in_words

_MOST = 12
FIRST_VERSIONS = ("python", "functrain", "jax", "jaxlib", "optax", "numpy")


def lead(left: Left) -> str:
    """What was trained by what, in a sentence."""
    parts = _optimizers(left)
    total, trained = _parameters(left)
    words = [] if total is None else [f"{total:,} parameters" + (f" in {len(parts)} parts" if len(parts) > 1 else "")]
    words += [] if trained in (None, total) else [f"{trained:,} of them trained"]
    named = [f"{name} by {_short(optimizer)}" for name, optimizer in parts.items()]
    named = named[:6] + ([f"{len(named) - 6} more"] if len(named) > 6 else [])
    return ": ".join(piece for piece in (", ".join(words), ", ".join(named)) if piece)


def status(left: Left) -> tuple[str, str]:
    """How a run ended: "finished", "stopped", "failed" or "open", and in words."""
    sections = left.recorded.sections
    if not sections:
        return "open", "how it ended is not recorded"
    how = sections[-1].how
    return how if how in ("finished", "stopped", "failed") else "open", ended_in_words(sections[-1])


def problems(left: Left) -> list[str]:
    """What could not be read, or is not there."""
    return [*left.problems, *([] if left.has_record else [f"there is no {RUN} that says what it was made with"])]


def facts(left: Left) -> list[tuple[str, str]]:
    """Numbers of the whole run."""
    sections = left.recorded.sections
    last = sections[-1] if sections else None
    step = max((each for each in (last and last.to_step, left.log.last.get("step")) if each is not None), default=None)
    epoch = last.to_epoch if last and last.to_epoch is not None else left.log.last.get("epoch")
    found = [("steps", None if step is None else f"{step:,}"), ("epochs", None if epoch is None else f"{epoch:,}")]
    found.append(("training", None if seconds(left) is None else duration(seconds(left) or 0)))
    found.append(("steps per second", _speed(left)))
    found.append(("started again", _times(len(sections) - 1) if len(sections) > 1 else None))
    found += [(f"peak memory, {name}", bytes_in_words(size)) for name, size in _memory(sections).items()]
    found.append(("device", _device(left)))
    return [(name, value) for name, value in found if value is not None]


def seconds(left: Left) -> float | None:
    """Of training, in all."""
    said = [section.seconds for section in left.recorded.sections if section.seconds is not None]
    return said[-1] if said else left.held.seconds if left.held is not None else None


def final(left: Left) -> tuple[Table | None, Table | None]:
    """The final numbers of best and last, the main ones and those of which there are many; else those of the log."""
    if not left.final:
        return _of_log(left), None
    head = ["", *(f"{each.of}" + ("" if each.step is None else f" · step {each.step:,}") for each in left.final)]
    rows = {
        name: [name, *alike([each.numbers.get(name) for each in left.final])]
        for name in dict.fromkeys(name for each in left.final for name in each.numbers)
    }
    main = [name for name in rows if is_main(name)][:_MOST] or [*rows][:_MOST]
    rest = [row for name, row in rows.items() if name not in main]
    return (
        Table(head, [rows[name] for name in main]) if main else None,
        Table(head, rest) if rest else None,
    )


def is_main(name: str) -> bool:
    """Whether a result is no detail of another, as "test/report/f1/3" is."""
    return name.partition(",")[0].count("/") < 2


def parts(left: Left) -> Table | None:
    """The table of parts."""
    if left.recorded.parts:
        rows = [
            [
                name,
                _optimizer(part),
                part.selector or "-",
                _whole(part.leaves),
                _whole(part.parameters),
                _size(part.bytes),
            ]
            for name, part in left.recorded.parts.items()
        ]
        return Table(["part", "optimizer", "selector", "leaves", "parameters", "bytes"], rows, words=3)
    if left.held is not None and left.held.parts:
        held = [
            [name, part.optimizer, f"{len(part.paths):,}", bytes_in_words(part.nbytes)]
            for name, part in left.held.parts.items()
        ]
        return Table(["part", "optimizer", "leaves", "bytes with its state"], held, words=2)
    return None


def changes(left: Left) -> Table | None:
    """What was another in the configuration, each time that the run was started again."""
    sections = left.recorded.sections
    rows = [
        [f"step {_whole(section.from_step)}", key, shown(old), shown(new)]
        for section in sections
        for key, (old, new) in section.changed.items()
    ]
    return Table(["from", "what", "was", "is"], rows, words=4) if rows else None


def sections(left: Left) -> Table | None:
    """Each time that the run was started."""
    rows = [
        [
            f"{moment(each.started)} UTC",
            each.checkpoint or "-",
            _how(each),
            _whole(each.from_step),
            _whole(each.to_step),
        ]
        for each in left.recorded.sections
    ]
    return Table(["started", "from checkpoint", "ended", "from step", "to step"], rows, words=3) if rows else None


def checkpoints(left: Left) -> Table | None:
    """The checkpoints that are there."""
    best: dict[str, list[str]] = {}
    for result, checkpoint in left.best().items():
        best.setdefault(checkpoint or "", []).append(result)
    names = list(dict.fromkeys(name for saved in left.checkpoints for name in saved.results))[:6]
    rows = [
        [saved.name, f"{moment(saved.time)} UTC", "best " + ", ".join(best[saved.name]) if saved.name in best else "",
         *(number(saved.results.get(name)) for name in names)]
        for saved in left.checkpoints
    ]  # fmt: skip
    return Table(["checkpoint", "saved", "", *names], rows, words=3) if rows else None


def configuration(left: Left) -> Table | None:
    """The configuration, by key."""
    return _named(left.recorded.config)


def environment(left: Left) -> Table | None:
    """The command, the device, the commit and the versions that matter most."""
    said: dict[str, Any] = {"command": " ".join(left.recorded.command)} if left.recorded.command else {}
    said |= {"device": left.recorded.device, "git": left.recorded.git, "source": left.recorded.source}
    return _named(said | {"version": {name: each for name, each in _versions(left).items() if name in FIRST_VERSIONS}})


def versions(left: Left) -> Table | None:
    """The versions of all else."""
    return _named({name: each for name, each in _versions(left).items() if name not in FIRST_VERSIONS})


def warnings(left: Left) -> Table | None:
    """What was warned of, and how often."""
    counts: dict[str, int] = {}
    for section in left.recorded.sections:
        for text, count in section.warnings:
            counts[text] = counts.get(text, 0) + count
    return Table(["warning", "times"], [[text, str(count)] for text, count in counts.items()]) if counts else None


def _of_log(left: Left) -> Table | None:
    rows = []
    for name, curve in results_in(left.log.curves).items():
        mode = None if name.startswith("train/") else left.mode(name)
        best = None if mode is None else curve.best(mode)
        found = ["-", "-"] if best is None else [number(curve.values[best]), f"{curve.steps[best]:,}"]
        rows.append([name, *found, number(curve.values[-1]), f"{curve.steps[-1]:,}"])
    head = ["", "best", "at step", "last", "at step"]
    if all(row[1] == "-" for row in rows):  # Of losses of training alone none is said to be the best.
        head, rows = [head[0], *head[3:]], [[row[0], *row[3:]] for row in rows]
    return Table(head, rows) if rows else None


def _optimizers(left: Left) -> dict[str, str]:
    if left.recorded.parts:
        return {name: part.optimizer or "-" for name, part in left.recorded.parts.items()}
    return {} if left.held is None else {name: part.optimizer for name, part in left.held.parts.items()}


def _optimizer(part: Part) -> str:
    optimizer = part.optimizer or "-"
    with_what = "".join(f", {name} {number(value)}" for name, value in part.hyperparameters.items())
    return f"{optimizer}{with_what}" + (" (frozen)" if part.trained is False and optimizer != "frozen" else "")


def _short(optimizer: str) -> str:
    """What an optimizer is called, without what it was made with."""
    return re.split(r"[(,\n]", optimizer.removeprefix("with_lr("))[0].strip() or optimizer


def _parameters(left: Left) -> tuple[int | None, int | None]:
    said = left.recorded.parameters
    return said.get("total"), said.get("trained")


def _speed(left: Left) -> str | None:
    curve = left.log.curves.get("train/steps_per_second")
    return None if curve is None else f"{sorted(curve.values)[len(curve.values) // 2]:,.4g}"


def _memory(found: tuple[Section, ...]) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for section in found:
        for name, size in section.memory.items():
            peaks[name] = max(size, peaks.get(name, 0.0))
    return peaks


def _device(left: Left) -> str | None:
    said = left.recorded.device
    kind, count = said.get("kind") or said.get("platform"), said.get("devices")
    return None if kind is None else f"{kind} \u00d7 {count}" if isinstance(count, int) and count > 1 else str(kind)


def _how(section: Section) -> str:
    return "-" if section.how is None else section.how + (f": {section.why}" if section.why else "")


def _size(count: int | None) -> str:
    return "-" if count is None else bytes_in_words(count)


def _versions(left: Left) -> Mapping[str, Any]:
    return left.recorded.versions or (left.held.versions if left.held is not None else {})


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _named(said: Mapping[str, Any]) -> Table | None:
    rows = [[name, shown(value)] for name, value in named_values(said)]
    return Table(["", ""], rows, words=2) if rows else None
