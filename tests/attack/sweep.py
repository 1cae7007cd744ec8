"""The attacks at every operation on files, how they are gone through, and the table of what they came to."""

import collections
import concurrent.futures
import dataclasses
import random
import signal
from collections.abc import Callable

from faults import ERRORS, KILL, WRITE, Fault
from verdicts import FAILURES, Verdict, verdict

FAULTS = {
    "killed": KILL,
    "killed within a write": Fault(WRITE, signal=signal.SIGKILL, halves=1),
    "SIGTERM": Fault(signal=signal.SIGTERM),
    "SIGINT": Fault(signal=signal.SIGINT),
    **{f"{name}, once": error for name, error in ERRORS.items()},
    **{f"{name}, from then on": dataclasses.replace(error, lasting=1) for name, error in ERRORS.items()},
    "a write done in half": Fault(WRITE, halves=1),
    "the disk is full": Fault(WRITE, error=ERRORS["ENOSPC"].error, halves=1, lasting=1),
}
PLACES = {"killed beside folders of others": "crowded", "killed in a folder 'layers=[64,64]'": "bracketed"}


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack in words, and what goes through with it: its verdict, why, and the attempt; None if it came to none."""

    what: str
    go: Callable


@dataclasses.dataclass(frozen=True)
class Failure:
    """An attack that failed: of which row, what it was, and what it came to."""

    row: str
    what: str
    verdict: Verdict
    why: str
    attempt: object


def at_operations(arena):
    """`{row: attacks}`: each fault at each operation of a run, of a new one and of one that goes on."""
    found = {row: [*_of(arena, fault, [arena.fresh, arena.interrupted])] for row, fault in FAULTS.items()}
    for row, base in PLACES.items():
        folder = getattr(arena, base)
        left_alone = Attack("by nothing", _strike(arena, folder, Fault(), 1))
        found[row] = [left_alone, *_of(arena, KILL, [folder])]
    return found


def _of(arena, fault, bases):
    for base in bases:
        count = sum(bool(fault.kinds & kind) for kind in arena.operations(base))
        for at in range(1, count + 1):
            yield Attack(f"at operation {at} of a run that is {base.name}", _strike(arena, base, fault, at))


def _strike(arena, base, fault, at):
    def go():
        attempt = arena.attack(base, dataclasses.replace(fault, at=at))
        return attempt and (*verdict(attempt, arena.undisturbed, fault), attempt)

    return go


def sweep(rows, most=None, workers=1):
    """Goes through the attacks, or so many of each row; yields each row, how often it came to what, and what failed."""
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        for row, attacks in rows.items():
            drawn = attacks if most is None else random.Random(row).sample(attacks, min(most, len(attacks)))
            came = zip(drawn, threads.map(lambda each: each.go(), drawn), strict=True)
            found = [(attack.what, *verdict) for attack, verdict in came if verdict is not None]
            failed = [Failure(row, *each) for each in found if each[1] in FAILURES]
            yield row, collections.Counter(verdict for _, verdict, *_ in found), failed
