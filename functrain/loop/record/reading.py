"""What run.json and results.json say, as far as they can be read: nothing in them is trusted."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from functrain.loop.record.fields import Fields

RUN, RESULTS, FORMAT = "run.json", "results.json", 1
_DEEPEST = 30


class Part(NamedTuple):
    """A part of the model; None is what is not said."""

    optimizer: str | None
    hyperparameters: dict[str, float]
    selector: str | None
    leaves: int | None
    parameters: int | None
    bytes: int | None
    trained: bool | None


class Section(NamedTuple):
    """A time that a run was started; None is what is not said, as of one that goes on.

    Attributes:
      started: in seconds since 1970; `ended` too.
      from_step: where it began; `from_epoch` too.
      checkpoint: the name of the one from which it went on.
      to_step: where it ended; `to_epoch` too.
      seconds: of training in all sections so far.
      how: "finished", "stopped" or "failed".
      why: it ended so.
      changed: what was and what is now, by key.
      warnings: and how often each was given.
      memory: peaks in bytes, by "device" and "host".
    """

    started: float | None
    ended: float | None
    from_step: int | None
    from_epoch: int | None
    checkpoint: str | None
    to_step: int | None
    to_epoch: int | None
    seconds: float | None
    how: str | None
    why: str | None
    changed: dict[str, tuple[Any, Any]]
    warnings: tuple[tuple[str, int], ...]
    memory: dict[str, float]


class Recorded(NamedTuple):
    """What run.json says; empty or None is what it does not say."""

    name: str | None
    config: dict[str, Any]
    command: tuple[str, ...]
    versions: dict[str, Any]
    device: dict[str, Any]
    git: dict[str, Any]
    source: dict[str, Any]
    parts: dict[str, Part]
    parameters: dict[str, int]
    optimizers: str | None
    audit: str | None
    checkpoints: str | None
    keep_best: dict[str, str]
    sections: tuple[Section, ...]


NOTHING = Recorded(None, {}, (), {}, {}, {}, {}, {}, {}, None, None, None, {}, ())


class Final(NamedTuple):
    """The results of an evaluation when a run had ended.

    Attributes:
      evaluation: its name.
      of: what was evaluated, "last" or "best valid/accuracy".
      step: of what was evaluated.
      checkpoint: its name; None where it was not saved.
      numbers: by name.
      arrays: the file of those that are arrays, within the record; None without one.
      outputs: the file of outputs, likewise.
      figures: files by name.
    """

    evaluation: str
    of: str
    step: int | None
    checkpoint: str | None
    numbers: dict[str, float]
    arrays: str | None
    outputs: str | None
    figures: dict[str, str]


def read_run(directory: Path, problems: list[str]) -> Recorded | None:
    """What the run.json of a record says; None where there is none that can be read, which `problems` is told."""
    said = _said(directory / RUN, problems)
    return None if said is None else _recorded(said)


def read_results(directory: Path, problems: list[str]) -> tuple[Final, ...]:
    """What the results.json of a record says; what is wrong with it, `problems` is told."""
    said = _said(directory / RESULTS, problems)
    return () if said is None else tuple(_final(each) for each in said.each("final"))


def file_within(directory: Path, name: str | None) -> Path | None:
    """The file of a name that a record gives, if it is one within its folder, whatever links there are."""
    try:
        path = None if name is None else (directory / name).resolve()
        is_within = path is not None and path.is_file() and path.is_relative_to(directory.resolve())
    except (OSError, ValueError, RuntimeError):
        return None
    return path if is_within else None


def _said(path: Path, problems: list[str]) -> Fields | None:
    try:
        said = json.loads(path.read_bytes())
        problem = None if isinstance(said, dict) else "is no record"
        problem = problem or (f"is nested deeper than {_DEEPEST}" if _depth(said) > _DEEPEST else None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problem = f"can't be read: {error}"
    if problem is not None:
        problems.append(f"{path.name} {problem}; it is left out")
        return None
    if (number := said.get("format")) != FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        problems.append(
            f"{path.name} is of format {number!r}, and this functrain reads {FORMAT}: what it knows of it is shown"
            + ("; a newer functrain shows all" if newer else "")
        )
    return Fields(said, path.name, problems)


def _depth(value: Any) -> int:
    """How deep a value is nested, without recursion; of what is far too deep, enough of it."""
    depth, level = 0, [value]
    while level and depth <= _DEEPEST:
        depth += 1
        level = [inner for each in level if isinstance(each, dict | list)
                 for inner in (each.values() if isinstance(each, dict) else each)]  # fmt: skip
    return depth


def _recorded(said: Fields) -> Recorded:
    model, checkpoints = said.fields("model"), said.fields("checkpoints")
    parts = model.fields("parts")
    return Recorded(
        name=said.text("name"),
        config=said.mapping("config"),
        command=tuple(map(str, said.items("command"))),
        versions=said.mapping("versions"),
        device=said.mapping("device"),
        git=said.mapping("git"),
        source=said.mapping("source"),
        parts={name: _part(parts.fields(name)) for name in parts.names},
        parameters=model.wholes("parameters"),
        optimizers=model.text("optimizers"),
        audit=model.text("audit"),
        checkpoints=checkpoints.text("directory"),
        keep_best=checkpoints.texts("keep_best"),
        sections=tuple(_section(each) for each in said.each("sections")),
    )


def _part(said: Fields) -> Part:
    return Part(
        said.text("optimizer"),
        said.numbers("hyperparameters"),
        said.text("selector"),
        said.whole("leaves"),
        said.whole("parameters"),
        said.whole("bytes"),
        said.flag("trained"),
    )


def _section(said: Fields) -> Section:
    changed = {
        key: (pair[0], pair[1])
        for key, pair in said.mapping("changed").items()
        if isinstance(pair, list) and len(pair) == 2
    }
    warnings = tuple((each.text("text") or "-", each.whole("count") or 1) for each in said.each("warnings"))
    return Section(
        started=said.number("started"),
        ended=said.number("ended"),
        from_step=said.whole("from_step"),
        from_epoch=said.whole("from_epoch"),
        checkpoint=said.text("checkpoint"),
        to_step=said.whole("to_step"),
        to_epoch=said.whole("to_epoch"),
        seconds=said.number("seconds"),
        how=said.text("how"),
        why=said.text("why"),
        changed=changed,
        warnings=warnings,
        memory=said.numbers("memory"),
    )


def _final(said: Fields) -> Final:
    return Final(
        evaluation=said.text("evaluation") or "-",
        of=said.text("of") or "-",
        step=said.whole("step"),
        checkpoint=said.text("checkpoint"),
        numbers=said.numbers("numbers"),
        arrays=said.text("arrays"),
        outputs=said.text("outputs"),
        figures=said.texts("figures"),
    )
