"""What the attacks came to, to be read."""

import collections
import re

from verdicts import Verdict

HEAD = "\n".join(
    f"| {' | '.join(line)} |" for line in [["attack", "tried", *Verdict], ["---", *["---:"] * (1 + len(Verdict))]]
)


def line(row, count):
    """How often an attack came to each verdict, as a line of Markdown."""
    return f"| {' | '.join([row, *map(str, [count.total(), *(count[verdict] for verdict in Verdict)])])} |"


def described(failure):
    """A failure, its operation, and what the processes told."""
    attempt = failure.attempt
    lines = [f"{failure.verdict.upper()}: {failure.row}, {failure.what}: {attempt.at}: {failure.why}"]
    for name, ran in [("attacked", attempt.attacked), ("restarted", attempt.again)]:
        errors = ran.errors.strip().splitlines()[-3 if ran.code is not None else 0 :]  # Of one that hung, where.
        lines += [f"  {name}: exit code {ran.code}, began at {ran.began}", *(f"    {line[:600]}" for line in errors)]
    return "\n".join(lines)


def grouped(failed):
    """How many failed alike: at one kind of file, by one operation."""
    groups = collections.Counter(
        (
            failure.verdict,
            failure.row,
            re.sub(r"[0-9a-f]{32}", "*", re.sub(r"/\d+", "/N", failure.attempt.at)),
            failure.why,
        )
        for failure in failed
    )
    return "\n".join(f"{count:5} {' | '.join(group)}" for group, count in groups.most_common())
