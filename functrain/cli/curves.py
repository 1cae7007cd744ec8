"""The numbers of a log as lines of text."""

import math
from collections.abc import Sequence

from functrain.loop.record.curves import extremes

_BARS, _NOT_FINITE = "▁▂▃▄▅▆▇█", "!"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a line of bars, the lowest and the highest of every stretch among them; "!" is what is not finite.

    >>> sparkline([0.0, 1.0, 7.0, math.nan])
    '▁▂█!'
    >>> len(sparkline([*range(1000)]))
    40
    """
    shown = [values[index] for index in extremes(values, width)]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high / 2 - low / 2  # In halves, as all of it can be too large for a float.

    def bar(value: float) -> str:
        return _BARS[round((value / 2 - low / 2) / span * (len(_BARS) - 1)) if span else 0]

    return "".join(bar(value) if math.isfinite(value) else _NOT_FINITE for value in shown)
