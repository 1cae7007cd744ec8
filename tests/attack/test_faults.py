"""Faults that really come: at the operation that is meant, and as they are meant."""

import errno
import functools
import signal
from pathlib import Path

import pytest
import steps
import warm
from faults import CHANGE, WRITE, Fault, asked, why_not
from power import Disk
from power import why_not as no_cuts

HERE = Path(__file__).parent
DONE = ["done", "100", "4", "done", "done", "4", "1234", "done", "done", "done"]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def met(library, tmp_path):
    """`met(fault, directory)`: what a program prints of each step, its exit code, and what was logged."""
    return functools.partial(_met, library, tmp_path / "log")


def _met(library, log, fault, directory):
    log.unlink(missing_ok=True)
    process = warm.Process(HERE / "steps.py", directory, asked(fault, directory, log), preload=library)
    printed, errors = process.communicate(timeout=60)
    assert not errors
    return printed.splitlines(), process.returncode, log.read_text().replace("64", "").splitlines()


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "within").mkdir()
    return tmp_path / "within"


def test_each_operation_in_the_directory_is_seen(directory, met):
    assert met(Fault(), directory) == (DONE, 0, [*steps.STEPS])


def test_an_error_comes_once_or_from_then_on(directory, met):
    once = Fault(error=errno.EIO, at=3)
    assert met(once, directory)[0] == [*DONE[:2], "EIO", *DONE[3:5], "0", "", *DONE[7:]]
    full = Fault(CHANGE | WRITE, error=errno.ENOSPC, lasting=1, at=4)
    printed = met(full, directory)
    assert printed[0] == [*DONE[:3], *["ENOSPC"] * 2, "ENOENT", "1234", "done", *["ENOSPC"] * 2]
    assert printed[2] == ["8 fsync /new/file"]


def test_a_write_is_done_in_half(directory, met):
    full = Fault(WRITE, error=errno.ENOSPC, lasting=1, halves=1, at=1)
    assert met(full, directory)[0] == [*DONE[:2], "2", "ENOSPC", "done", "2", "12", *DONE[7:]]


@pytest.mark.parametrize("halves", [0, 1])
def test_a_process_is_killed_before_the_operation_or_within_the_write(directory, met, halves):
    kill = Fault(WRITE, signal=signal.SIGKILL, halves=halves, at=1)
    assert met(kill, directory) == (DONE[:2], -signal.SIGKILL, ["8 write /new/file"])
    assert (directory / "new/file").read_text() == ("12" if halves else "")


def test_a_process_gets_a_signal_and_goes_on(directory, met):
    printed, code, _ = met(Fault(signal=signal.SIGCHLD, at=3), directory)  # One that is ignored.
    assert (printed, code) == (DONE, 0)


@pytest.mark.parametrize(("journal", "name"), [(0, "file"), (1, "other")])
def test_a_power_cut_loses_what_is_not_synced(tmp_path, met, journal, name):
    if reason := no_cuts(tmp_path / "tried"):
        pytest.skip(reason)
    with Disk(tmp_path / "disk") as disk:
        run = disk.mounted / "run"
        run.mkdir()
        (run / "before").write_text("1234")
        disk.remount()
        (run / "unsynced").write_text("1234")
        cut = Fault(signal=signal.SIGKILL, cut=str(disk.mounted / "cut"), journal=journal, at=6)
        assert met(cut, run)[1] == -signal.SIGKILL
        with pytest.raises(OSError, match="Input/output error"):
            (run / "after").write_text("1234")
        disk.remount()
        assert (run / "before").read_text() == "1234"
        assert (run / "unsynced").read_text() == ""  # It had a name as the other was synced, but no data on disk.
        assert [path.name for path in (run / "new").iterdir()] == [name]  # It was renamed after it was synced.
        assert (run / "new" / name).read_text() == "1234"
