"""The confusion matrices among the arrays of a result, as tables of which the large cells are dark."""

import zipfile
from pathlib import Path
from typing import Any

from functrain.loop.record.report.tables import escaped

_LARGEST = 1 << 20  # Bytes of an array.
_MOST = 25  # Rows that one can read.


def matrices_in(path: Path | None) -> dict[str, Any]:
    """The square matrices of an npz file that are small enough to be read; none where it is damaged or no such file."""
    import numpy as np

    if path is None:
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [each.filename for each in archive.infolist() if each.file_size <= _LARGEST]
        with np.load(path, allow_pickle=False) as arrays:
            named = {name.removesuffix(".npy"): arrays[name.removesuffix(".npy")] for name in names}
    except (OSError, ValueError, LookupError, EOFError, TypeError, MemoryError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, SyntaxError):  # fmt: skip
        return {}
    return {name: array for name, array in named.items() if _is_matrix(array)}


def as_html(matrix: Any) -> str:
    """A matrix as a table; a cell is as dark as its share of its row."""
    head = "".join(f"<th>{column}</th>" for column in range(len(matrix)))
    rows = ""
    for number, row in enumerate(matrix.tolist()):
        total = sum(row) or 1
        rows += f"<tr><th>{number}</th>" + "".join(_cell(value, value / total) for value in row) + "</tr>\n"
    return f'<div class="scroll matrix"><table>\n<tr><th></th>{head}</tr>\n{rows}</table></div>\n'


def _cell(value: float, share: float) -> str:
    shade = f"color-mix(in srgb, var(--c1) {round(60 * share)}%, transparent)"
    return f'<td style="background: {shade}">{escaped(f"{value:,.4g}")}</td>'


def _is_matrix(array: Any) -> bool:
    import numpy as np

    is_small = array.ndim == 2 and 2 <= array.shape[0] == array.shape[1] <= _MOST
    return bool(is_small and array.dtype.kind in "iuf" and np.isfinite(array).all() and (array >= 0).all())
