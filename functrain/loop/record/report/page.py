"""report.html of one run: the summary first, then the curves, then what stands behind them."""

import base64
import math
import re
from collections.abc import Sequence
from pathlib import Path

from functrain.loop.record.left import Left
from functrain.loop.record.reading import file_within
from functrain.loop.record.report import charts, elements, matrices, summary
from functrain.loop.record.report.charts import Chart, ends_of
from functrain.loop.record.report.figures import Marks, drawing, is_noisy
from functrain.loop.record.report.tables import escaped

_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = 8 << 20  # Bytes of a figure.


def page(left: Left) -> str:
    """The page of a run.

    Raises:
      LogError: matplotlib is not installed.
    """
    marks = marks_of(left)
    with drawing():
        of_results = charts.results_of(left)
        results = elements.charts(of_results, marks, "r")
        by_part = elements.charts(charts.by_part(left), marks, "p", small=True)
        speed = elements.charts(charts.speed(left.log.curves), marks, "s")
    recorded = left.recorded
    audit = elements.folded("which loss reaches which leaf", elements.verbatim(recorded.audit))
    optimizers = elements.folded("the optimizers", elements.verbatim(recorded.optimizers))
    versions = elements.folded("all other versions", elements.table(summary.versions(left)))
    body = (
        _head(left),
        _final(left),
        elements.section("Losses and results", results, _key(of_results, marks)),
        elements.section("Figures", elements.figures(_figures(left))),
        elements.section("Parts", elements.table(summary.parts(left)), audit, optimizers, by_part),
        elements.section("Time", elements.table(summary.sections(left)), speed),
        elements.section("What changed on the way", elements.table(summary.changes(left))),
        elements.section("Checkpoints", _where(left), elements.table(summary.checkpoints(left))),
        elements.section("Warnings", elements.table(summary.warnings(left))),
        elements.section("Configuration", elements.table(summary.configuration(left))),
        elements.section("Environment", elements.table(summary.environment(left)), versions),
        "<footer>Written by functrain from the files of the run.</footer>\n",
    )
    return elements.document(left.name, "".join(body))


def marks_of(left: Left) -> Marks:
    """Where a run was started again, and where its epochs begin."""
    restarts = [section.from_step for section in left.recorded.sections[1:] if section.from_step is not None]
    epochs = left.log.epochs
    begins: dict[int, int] = {}
    for step, epoch in zip(epochs.steps, epochs.values, strict=True):
        if epoch > 0:
            begins.setdefault(int(epoch), step)
    return Marks(restarts, [(step, epoch) for epoch, step in begins.items()], ends_of([left]))


def _head(left: Left) -> str:
    kind, words = summary.status(left)
    strong = re.split(r"[:,]", words)[0]
    lead = summary.lead(left)
    return (
        f"<header>\n<h1>{escaped(left.name)}</h1>\n"
        f'<p class="state {kind}"><b>{escaped(strong)}</b>{escaped(words.removeprefix(strong))}</p>\n'
        + (f"<p>{escaped(lead)}.</p>\n" if lead else "")
        + f"{elements.facts(summary.facts(left))}{elements.told(summary.problems(left))}</header>\n"
    )


def _final(left: Left) -> str:
    main, rest = summary.final(left)
    return elements.section("Results", elements.table(main), elements.folded_table(rest))


def _key(found: Sequence[Chart], marks: Marks) -> str:
    """What the marks in the charts mean, of those that there are."""
    lines = [line for chart in found for line in chart.lines]
    words = ["numbers along the top are epochs"] if marks.epochs else []
    words += ["○ the best"] if any(line.mode is not None for line in lines) else []
    words += ["\u00d7 not finite"] if not all(math.isfinite(sum(line.curve.values)) for line in lines) else []
    words += ["dashed where it was started again"] if marks.restarts else []
    words += ["pale from the lowest to the highest, strong the mean"] if any(map(is_noisy, lines)) else []
    return f'<p class="quiet">{" · ".join(words)}</p>\n' if lines and words else ""


def _figures(left: Left) -> dict[str, str]:
    """The figures of the results, and the matrices of which there is none."""
    found = {}
    for final in left.final:
        for name, file in final.figures.items():
            title = f"{name}, {final.of}"
            found[title] = elements.picture(title, _data_uri(file_within(left.directory, file)))
        for array, matrix in matrices.matrices_in(file_within(left.directory, final.arrays)).items():
            if (name := f"{final.evaluation}/{array}") not in final.figures:
                found[f"{name}, {final.of}"] = matrices.as_html(matrix)
    return found


def _data_uri(path: Path | None) -> str | None:
    if path is None or path.stat().st_size > _LARGEST:
        return None
    content = path.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(_PNG) else None


def _where(left: Left) -> str:
    said = left.recorded.checkpoints
    return "" if said is None else f'<p class="quiet">They are in {escaped(said)}.</p>\n'
