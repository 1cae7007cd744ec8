"""Several runs beside each other: what differs, and nothing else."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from functrain.loop.names import named_values
from functrain.loop.record.curves import results_in
from functrain.loop.record.left import Left
from functrain.loop.record.report import summary
from functrain.loop.record.report.tables import Table
from functrain.loop.record.words import alike, shown

_GROUPS = ("config", "parts", "command", "device", "git", "versions")


class Differences(NamedTuple):
    """What differs, by key, a value for each run; None where a run does not have it.

    Attributes:
      names: of the runs, no two alike.
      configuration: what they were made with.
      results: what came of it, the main ones first.
      same: how many keys of the configuration have the same value in all.
      unknown: the runs of which no record says what they were made with.
    """

    names: list[str]
    configuration: dict[str, list[Any]]
    results: dict[str, list[float | None]]
    same: int
    unknown: list[str]

    @property
    def configuration_tables(self) -> tuple[Table | None, Table | None]:
        """What differs in the configuration, and in versions that seldom matter."""
        rows = {key: [key, *map(shown, values)] for key, values in self.configuration.items()}
        return _tables(["", *self.names], rows, _is_main, words=1 + len(self.names))

    @property
    def results_tables(self) -> tuple[Table | None, Table | None]:
        """What differs in the results: the main ones, and those of which there are many, as of each class."""
        rows = {key: [key, *alike(values)] for key, values in self.results.items()}
        return _tables(["", *self.names], rows, summary.is_main)


def differences(runs: Sequence[Left]) -> Differences:
    """Compares runs. One of which a file is missing is not compared in what that file would say."""
    names = _distinct(runs)
    made = _by_key([_made_with(left) if left.has_record else None for left in runs])
    configuration = _differing(made)
    final = [{f"{name}, {each.of}": value for each in left.final for name, value in each.numbers.items()} or None
             for left in runs]  # fmt: skip
    results = {
        key: values
        for found in (final, [_of_log(left) or None for left in runs], [_time(left) for left in runs])
        for key, values in _differing(_by_key(found)).items()
    }
    unknown = [name for name, left in zip(names, runs, strict=True) if not left.has_record]
    return Differences(names, configuration, results, len(made) - len(configuration), unknown)


def _is_main(key: str) -> bool:
    return not key.startswith("versions/") or key.removeprefix("versions/") in summary.FIRST_VERSIONS


def _tables(
    head: list[str], rows: Mapping[str, list[str]], is_main: Callable[[str], bool], words: int = 1
) -> tuple[Table | None, Table | None]:
    main, rest = ([row for key, row in rows.items() if is_main(key) is wanted] for wanted in (True, False))
    return Table(head, main, words) if main else None, Table(head, rest, words) if rest else None


class _Unknown:
    """What a run would have said."""


def _by_key(found: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    keys = sorted(dict.fromkeys(key for each in found for key in each or {}), key=_group)
    return {key: [_Unknown if each is None else each.get(key) for each in found] for key in keys}


def _group(key: str) -> int:
    """Where a key stands: those of runs that have others are not put behind all."""
    first = key.partition("/")[0]
    return _GROUPS.index(first) if first in _GROUPS else len(_GROUPS)


def _differing(found: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    return {
        key: [None if value is _Unknown else value for value in values]
        for key, values in found.items()
        if len({shown(value) for value in values if value is not _Unknown}) > 1
    }


def _made_with(left: Left) -> dict[str, Any]:
    """All that a run was made with, by key, the configuration of its own first."""
    said = left.recorded
    parts = {name: part._asdict() for name, part in said.parts.items()}
    about = {"command": " ".join(said.command)} if said.command else {}
    made = {"parts": parts, "device": said.device, "git": said.git, **about, "versions": said.versions}
    return {f"config/{name}": value for name, value in named_values(said.config)} | dict(named_values(made))


def _of_log(left: Left) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, curve in results_in(left.log.curves).items():
        mode = None if name.startswith("train/") else left.mode(name)
        best = None if mode is None else curve.best(mode)
        found |= {} if best is None else {f"{name}, best of the log": curve.values[best]}
        found[f"{name}, last of the log"] = curve.values[-1]
    return found | ({"steps": float(left.log.last["step"])} if left.log.last else {})


def _time(left: Left) -> dict[str, float] | None:
    seconds = summary.seconds(left)
    return None if seconds is None else {"seconds of training": seconds}


def _distinct(runs: Sequence[Left]) -> list[str]:
    """Their names; those that are alike by their folders, and the same folder by a number."""
    names = [left.name for left in runs]
    for depth in (1, 2, 3, 4):
        counts = collections.Counter(names)
        folders = ["/".join(left.directory.absolute().parts[-depth:]) for left in runs]
        names = [name if counts[name] == 1 else folder for name, folder in zip(names, folders, strict=True)]
    counts, seen = collections.Counter(names), collections.Counter[str]()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = name if counts[name] == 1 else f"{name} ({seen[name]})"
    return names
