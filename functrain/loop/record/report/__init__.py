"""The report of a run: report.html and report.md.

Knows what a run left, as `left` has it; draws with matplotlib, which is imported when it draws. What a file says is
text: it is escaped, and never executed. Imports `loop/record` and below.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from functrain.loop.checkpoint.durable import write_whole
from functrain.loop.record.left import read_left
from functrain.loop.record.report import comparison, summary
from functrain.loop.record.report.comparing import Differences, differences
from functrain.loop.record.report.markdown import markdown
from functrain.loop.record.report.page import page

HTML, MARKDOWN = "report.html", "report.md"


class Written(NamedTuple):
    """A report that was written.

    Attributes:
      html: the page.
      markdown: for a pull request.
      problems: what could not be read.
    """

    html: Path
    markdown: Path
    problems: tuple[str, ...]


def write(run: Path, out: Path | None = None) -> Written:
    """Writes report.html and report.md of a run, of what is there of it; each whole or not at all.

    Args:
      run: its folder.
      out: the folder to write to; by default the run's.

    Raises:
      CheckpointError: there is nothing of a run in it.
      LogError: matplotlib is not installed.
      OSError: a file can't be written.
    """
    left = read_left(run)
    return _write(run if out is None else out, page(left), markdown(left), tuple(summary.problems(left)))


def compare(runs: Sequence[Path], out: Path) -> tuple[Written, Differences]:
    """Writes one report of several runs: their curves over each other, and what differs.

    Args:
      runs: their folders.
      out: the folder to write to.

    Raises:
      CheckpointError: there is nothing of a run in one of them.
      LogError: matplotlib is not installed.
      OSError: a file can't be written.
    """
    found = [read_left(run) for run in runs]
    differing = differences(found)
    problems = tuple(
        f"{name}: {told}" for name, left in zip(differing.names, found, strict=True) for told in summary.problems(left)
    )
    return _write(out, comparison.page(found, differing), comparison.markdown(found, differing), problems), differing


def _write(folder: Path, html: str, text: str, problems: tuple[str, ...]) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / HTML, html)
    write_whole(folder / MARKDOWN, text)
    return Written(folder / HTML, folder / MARKDOWN, problems)
