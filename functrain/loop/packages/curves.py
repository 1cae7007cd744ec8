"""Curves of few points, for files and figures."""

import numpy as np

MOST = 200  # Points of a curve.


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST) -> np.ndarray:
    """The numbers of the points that a curve is drawn by, ascending: its ends, and what is lowest and highest between.

    The curve is cut into pieces of one length, on the way along it, so that a steep piece has as many points as a flat
    one. Of each the first point is kept, the lowest and the highest.

    >>> thinned(np.arange(1000.0), np.arange(1000) == 500, most=10).tolist()
    [0, 500, 501, 999]

    Args:
      x: real (points,).
      y: real (points,).
      most: how many may be left, at least 4.

    Returns:
      Their indices, int (at most `most`,).
    """
    if len(x) <= most:
        return np.arange(len(x))
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale = [np.ptp(each) or 1.0 for each in (x, y)]
    way = np.cumsum(np.abs(np.diff(x, prepend=x[0])) / scale[0] + np.abs(np.diff(y, prepend=y[0])) / scale[1])
    pieces = (most - 1) // 3
    starts = np.unique(np.searchsorted(way, np.linspace(0, way[-1], pieces + 1)[:-1]))
    ends = [*starts[1:], len(x)]
    kept = [each for start, end in zip(starts, ends, strict=True) for each in _of_piece(y, start, end)]
    return np.unique([*kept, len(x) - 1])


def _of_piece(y: np.ndarray, start: int, end: int) -> tuple[int, int, int]:
    return start, start + int(np.argmin(y[start:end])), start + int(np.argmax(y[start:end]))
