"""Numbers, moments, durations and values for a reader."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from functrain.loop.record.reading import Section

_DIGEST = re.compile(r"\b[0-9a-f]{40,64}\b")


def number(value: float | None) -> str:
    """A number for a reader."""
    return "-" if value is None else f"{value:.4g}"


def alike(values: Sequence[float | None]) -> list[str]:
    """Numbers to be compared, with as many decimals each, and five digits in the largest.

    >>> alike([0.98, 0.9812, None]), alike([212.3, 6.022]), alike([1e-9, 2.0])
    (['0.9800', '0.9812', '-'], ['212.30', '6.02'], ['1e-09', '2'])
    """
    words = [number(value) for value in values]
    if any("e" in word or "n" in word for word in words):
        return words
    digits = max((len(word.strip("-").partition(".")[0].removeprefix("0")) for word in words), default=0)
    decimals = min(5 - min(digits, 5), max((len(word.partition(".")[2]) for word in words), default=0))
    return [word if value is None else f"{value:.{decimals}f}" for word, value in zip(words, values, strict=True)]


def moment(seconds: Any) -> str:
    """Seconds since 1970 as a date.

    >>> moment(0), moment(None)
    ('1970-01-01 00:00:00', '-')
    """
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(1.25), duration(200), duration(7260)
    ('1.2 s', '3 min 20 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shown(value: Any) -> str:
    """A value of a configuration.

    >>> shown(0.001), shown("relu"), shown([3, 3]), shown(None), shown("0123456789abcdef" * 3)
    ('0.001', 'relu', '[3, 3]', '-', '0123456789ab…')
    """
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _DIGEST.sub(lambda found: f"{found.group()[:12]}…", text)


def ended_in_words(section: Section) -> str:
    """How a run ended, by the last time that it was started."""
    if section.how is None:
        return f"not ended: it goes on, or was killed; started {moment(section.started)} UTC"
    words = [section.how + (f": {section.why}" if section.why else "")]
    words += [] if section.to_step is None else [f"at step {section.to_step}"]
    words += [] if section.ended is None else [f"{moment(section.ended)} UTC"]
    words += [] if section.seconds is None else [f"after {duration(section.seconds)} of training"]
    return ", ".join(words)
