"""What a command has to say."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from functrain.loop.lines import SPELLED

_CONTROL = re.compile(r"[^\n\x20-\x7e\xa0-\U0010ffff]")


class Answer(NamedTuple):
    """The answer of a command.

    Attributes:
      text: for people.
      data: the same and more, for programs.
      exit_code: of the command.
      notes: what there is to warn of.
    """

    text: str
    data: dict[str, Any]
    exit_code: int = 0
    notes: tuple[str, ...] = ()


def plain(text: str) -> str:
    r"""A text that does nothing to a terminal, whatever the files say that it is made of.

    >>> plain("loss\x1b[31m\n")
    'loss\\x1b[31m\n'
    """
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def strict(value: Any) -> Any:
    """What JSON can hold, with NaN and the infinities spelled as they are in a log.

    >>> strict({"loss": [1.0, math.nan]})
    {'loss': [1.0, 'NaN']}
    """
    if isinstance(value, Mapping):
        return {str(name): strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return SPELLED[str(value)]
    return value
