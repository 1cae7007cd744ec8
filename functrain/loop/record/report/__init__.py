"""The report of a run: report.html and report.md.

Knows what a run left, as `left` has it; draws with matplotlib, which is imported when it draws. What a file says is
text: it is escaped, and never executed. Imports `loop/record` and below.
"""

from pathlib import Path

from functrain.loop.checkpoint.durable import write_whole
from functrain.loop.record.left import read_left
from functrain.loop.record.report.markdown import markdown
from functrain.loop.record.report.page import page

HTML, MARKDOWN = "report.html", "report.md"


def write(run: Path) -> None:
    """Writes report.html and report.md into the folder of a run, of what is there of it; each whole or not at all.

    Args:
      run: the folder.

    Raises:
      CheckpointError: there is nothing of a run in it.
      LogError: matplotlib is not installed.
      OSError: a file can't be written.
    """
    left = read_left(run)
    write_whole(run / HTML, page(left))
    write_whole(run / MARKDOWN, markdown(left))
