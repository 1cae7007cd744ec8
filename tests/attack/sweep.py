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
    return found | {"killed beside folders of others": [*_of(arena, KILL, [arena.crowded])]}


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


def sweep(rows, most=None, workers=1, tell=lambda failure: None):
    """Goes through the attacks, or so many of each row, and tells of each that failed.

    Returns:
      The count of each verdict by row, and what failed.
    """
    counts, failed = {row: collections.Counter() for row in rows}, []
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        for row, attacks in rows.items():
            drawn = attacks if most is None else random.Random(row).sample(attacks, min(most, len(attacks)))
            for attack, came in zip(drawn, threads.map(lambda each: each.go(), drawn), strict=True):
                if came is None:
                    continue
                counts[row][came[0]] += 1
                if came[0] in FAILURES:
                    failed.append(Failure(row, attack.what, *came))
                    tell(failed[-1])
    return counts, failed
