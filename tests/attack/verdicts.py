"""What an attack came to."""

import enum
import signal

from arena import BEFORE_LAST, LAST

STOPS = {143, 130, -signal.SIGTERM, -signal.SIGINT}  # With these a process ends as it was asked to.


class Verdict(enum.StrEnum):
    HELD = "held"  # The same bits, and nothing lost.
    TOLD = "told"  # An error or a warning came, nothing is lost, and all goes on when the fault is gone.
    LOST = "lost"  # A complete checkpoint, or rows of the log, without a word.
    WRONG = "wrong bits"
    SILENT = "silent new start"  # At step 0, without an error, though there were checkpoints.
    FOREIGN = "foreign"  # Files of others are not as they were.
    STUCK = "stuck"  # It hung, crashed, or does not go on though the fault is gone.


FAILURES = [verdict for verdict in Verdict if verdict not in (Verdict.HELD, Verdict.TOLD)]


def verdict(attempt, undisturbed, fault):
    """What an attempt came to, by what the undisturbed run ended with; and why, where it failed."""
    for failure, why in failures(attempt, undisturbed, fault):
        return failure, why
    raised = attempt.attacked.code not in (0, *ends(fault))
    return (Verdict.TOLD if raised or was_told(attempt) else Verdict.HELD), ""


def failures(attempt, undisturbed, fault):
    """Each failure of an attempt, the worst first, in words."""
    (expected, expected_rows), (attacked, again) = undisturbed, (attempt.attacked, attempt.again)
    told = was_told(attempt)
    if attempt.harmed:
        yield Verdict.FOREIGN, f"{', '.join(attempt.harmed)} of others"
    for name, ran in [("attacked", attacked), ("restarted", again)]:
        if ran.ended not in (None, expected.ended) or ran.results not in (None, expected.results):
            yield Verdict.WRONG, f"the {name} run ended with others"
    repeated = attempt.rows and [row for row in attempt.rows if attempt.rows.count(row) > 1]
    if repeated or [row for row in attempt.rows or [] if row not in expected_rows]:
        yield Verdict.WRONG, "the log has rows that never were, or twice"
    if attempt.before and attacked.began == 0:
        yield Verdict.SILENT, f"the attacked run began at 0, not at {attempt.before}"
    newest = LAST if attacked.code == 0 else max(attempt.before, attempt.after)
    if newest and again.began == 0:
        yield Verdict.SILENT, f"the restarted run began at 0, not at {newest}"
    if attacked.code is None or (attacked.code < 0 and attacked.code not in ends(fault)):
        yield Verdict.STUCK, f"the attacked run ended with {attacked.code}"
    if again.code != 0:
        yield Verdict.STUCK, f"the restarted run ended with {again.code}"
    if attacked.began is not None and attacked.began < attempt.before and not attacked.errors:
        yield Verdict.LOST, f"the attacked run began at {attacked.began}, not at {attempt.before}, and said nothing"
    if again.began is not None and again.began < newest:
        yield Verdict.LOST, f"the restarted run began at {again.began}, not at {newest}"
    if attempt.rows != expected_rows and not told:
        yield Verdict.LOST, "rows of the log, without a word"
    if again.best != expected.best and not told:
        yield Verdict.LOST, f"the best checkpoint, {expected.best}, without a word"


def was_told(attempt):
    """Whether there was a warning or an error; what a killed process came to say is none."""
    is_killed = attempt.attacked.code == -signal.SIGKILL
    return bool(attempt.again.errors or (attempt.attacked.errors and not is_killed))


def ends(fault):
    """The exit codes that a process is made to end with."""
    if fault.signal == signal.SIGKILL:
        return {-signal.SIGKILL}
    return STOPS if fault.signal else set()


def damage_verdict(attempt, undisturbed, *, verified, rows):
    """What became of a run that found a file damaged: `verified` where a manifest is left, `rows` that of the log."""
    for failure, why in damage_failures(attempt, undisturbed, verified, rows):
        return failure, why
    return (Verdict.TOLD if attempt.attacked.errors else Verdict.HELD), ""


def damage_failures(attempt, undisturbed, verified, rows):
    (expected, expected_rows), ran = undisturbed, attempt.attacked
    if attempt.harmed:
        yield Verdict.FOREIGN, f"{', '.join(attempt.harmed)} of others"
    if ran.ended not in (None, expected.ended) and (verified or not ran.errors):
        yield Verdict.WRONG, "it trained on what was damaged" + ("" if ran.errors else ", without a word")
    if ran.began == 0 and ran.code == 0:
        yield Verdict.SILENT, "it began at 0"
    if ran.code is None or ran.code < 0 or (ran.code == 0 and (attempt.again.code, attempt.again.began) != (0, LAST)):
        yield Verdict.STUCK, f"it ended with {ran.code}, and again with {attempt.again.code}"
    if ran.began is not None and ran.began < BEFORE_LAST and not ran.errors:
        yield Verdict.LOST, f"it began at {ran.began} without a word"
    if ran.code == 0 and [row for row in expected_rows if row in rows and row not in (attempt.rows or [])]:
        yield Verdict.LOST, "rows of the log that were not damaged"
