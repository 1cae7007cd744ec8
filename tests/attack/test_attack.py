"""Runs that are attacked at their operations on files: nothing is lost, and nothing goes wrong without a word."""

import pytest
import table
from arena import Arena
from damage import of_files
from faults import why_not
from power import cuts
from power import why_not as no_cuts
from soak import SOAK
from sweep import at_operations, sweep
from verdicts import Verdict

MOST = SOAK  # Attacks of each row; `python tests/attack` goes through all of them.

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="session")
def arena(tmp_path_factory, library):
    """`arena(name)`: of the victim of this name."""
    return lambda name: Arena(name, tmp_path_factory.mktemp(name), library)


# Of faults that are alike one comes here; `python tests/attack` has all.
LEFT_OUT = {
    "EIO, once", "ENOSPC, once", "ENOSPC, from then on", "EACCES, once", "EACCES, from then on",
    "ENOENT, from then on", "killed", "SIGINT",
}  # fmt: skip


def attacks(arena):
    """All rows of the table, without those that there are none of here."""
    rows = at_operations(arena) | of_files(arena)
    return rows if no_cuts(arena.scratch()) else rows | cuts(arena)


def test_nothing_of_a_run_is_lost_whatever_befalls_it(arena):
    rows = attacks(arena("fit_victim"))
    tried, rows = 0, {row: rows[row] for row in rows if row not in LEFT_OUT}
    for row, count, failed in sweep(rows, MOST):
        assert not failed, "\n".join([table.HEAD, table.line(row, count), *map(table.described, failed)])
        tried += count.total()
    assert tried > 0.8 * MOST * len(rows)  # Where threads do a little less than they did, a run ends before its fault.


def test_of_a_careless_loop_the_attacks_find_what_is_lost(arena):
    rows = attacks(arena("careless_victim"))
    chosen = ("killed within a write", "the disk is full", "a damaged file", "power cut", "SIGTERM")
    for row, count, _ in sweep({row: rows[row] for row in chosen if row in rows}, most=4):
        assert count[Verdict.SILENT], row
