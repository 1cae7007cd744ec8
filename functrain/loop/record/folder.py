"""The folder of a record: which files are of it, whole at any moment; one process writes to it."""

import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from functrain.errors import RecordError
from functrain.loop.checkpoint.durable import write_whole
from functrain.loop.lines import LOG
from functrain.loop.record.files import FILES, FORMAT, REPORTS, RESULTS, RESULTS_FOLDER, RUN
from functrain.loop.record.reading import read_results
from functrain.tree.warn import warn


class RecordFolder:
    """Writes the files of a record, each as a whole or not at all.

    Args:
      directory: where; made when something is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def files(self) -> list[Path]:
        """The files of the record that are there, the log first; none that is being written."""
        found = [path for pattern in (LOG, *FILES) for path in sorted(self.directory.glob(pattern))]
        return [path for path in found if not path.name.startswith(".")]

    def run(self) -> dict[str, Any] | None:
        """What `run.json` says; None where there is none, or none that can be read: then it is set aside.

        Raises:
          RecordError: it is of a newer format.
        """
        path = self.directory / RUN
        try:
            written = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            written = None
        if isinstance(written, dict) and written.get("format") == FORMAT and isinstance(written.get("sections"), list):
            return written
        if isinstance(written, dict) and isinstance(written.get("format"), int) and written["format"] > FORMAT:
            raise RecordError(
                f"{path} is of format {written['format']}, and this functrain writes format {FORMAT}: go on with the"
                " functrain that wrote it, or give this run a folder of its own"
            )
        aside = path.with_name(f"{RUN}.damaged")
        path.replace(aside)
        warn(f"{path} is no record of a run, and is kept as {aside.name!r}; a new one is begun")
        return None

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Writes `run.json`."""
        self.write(RUN, _text(run))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes `results.json`."""
        self.write(RESULTS, _text(results))

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays by name as a npz file."""
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
        self.write(name, packed.getvalue())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all.

        Raises:
          OSError: it is not written.
        """
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def evaluated(self, step: int) -> set[str]:
        """The names of the evaluations that found something of the last state, if that is of a step."""
        found = read_results(self.directory, [])
        return {final.evaluation for final in found if (final.of, final.step) == ("last", step)}

    def results(self) -> dict[str, dict[str, float]]:
        """The numbers of the final evaluation, by what they are of and by name."""
        found: dict[str, dict[str, float]] = {}
        for final in read_results(self.directory, []):
            found.setdefault(final.of, {}).update(final.numbers)
        return found

    def clear(self, aside: Path | None) -> Path | None:
        """Moves what is of an earlier run to a folder "before-1", or to the one that is given; returns it.

        What a run left that came to nothing is removed, and None returned.
        """
        mine = {path.name: path for path in sorted(self.directory.glob("*")) if _is_ours(path.name)}
        if aside is None and came_to_nothing({name: path.stat().st_size for name, path in mine.items()}):
            for path in mine.values():
                path.unlink()
            return None
        if aside is None:
            places = (self.directory / f"before-{number}" for number in itertools.count(1))
            aside = next(place for place in places if not place.exists())
        aside.mkdir(exist_ok=True)
        for path in mine.values():
            path.rename(aside / path.name)
        return aside


def came_to_nothing(sizes: Mapping[str, int]) -> bool:
    """Whether files, by name and size, are what a run left without rows or results; what is of no run is not."""
    is_of_a_run = RUN in sizes or sizes.keys() <= {LOG}
    return is_of_a_run and not sizes.get(LOG) and not any(name.startswith(RESULTS_FOLDER) for name in sizes)


def _is_ours(name: str) -> bool:
    is_source = name.startswith("source") and name.endswith(".tar.gz")
    return is_source or name in (RUN, RESULTS, RESULTS_FOLDER, LOG, f"{LOG}.damaged", f"{RUN}.damaged", *REPORTS)


def _text(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
