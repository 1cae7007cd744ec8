"""Which checkpoint of a folder is best."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functrain.errors import CheckpointError
from functrain.loop.checkpoint.folder import Folder
from functrain.loop.checkpoint.retention import Retention
from functrain.tree.warn import warn


def best_in(folder: Folder, retention: Retention, metric: str | None) -> Path | None:
    """The best by a metric of those that are kept for it, here or by who wrote the newest; None if none has a value.

    Raises:
      CheckpointError: no best is kept by that metric, or it is none of several.
    """
    modes = retention.best or next((entry.best for entry in reversed(folder.entries()) if entry.best), {})
    if (metric is None and len(modes) != 1) or (metric is not None and metric not in modes):
        asked = "best()" if metric is None else f"best({metric!r})"
        raise CheckpointError(
            f"{asked}: the best is kept by {sorted(modes) or 'no metric'}; name one, or give keep_best="
        )
    name = Retention(best=modes).best_of(folder.metrics(), metric or next(iter(modes)))
    return None if name is None else folder.directory / name


def is_best(folder: Folder, retention: Retention, metrics: Mapping[str, Any]) -> bool:
    """Whether one of the metrics is better than that of every checkpoint, as far as it can be told."""
    try:
        return retention.is_best(metrics, folder.metrics())
    except CheckpointError as error:
        warn(f"{dict(metrics)} are taken for the best: {error}")
        return True
