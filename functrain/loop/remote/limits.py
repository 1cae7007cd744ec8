"""How long remote storage may take."""

import dataclasses

from functrain.errors import StorageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long remote storage may take, in seconds.

    >>> Limits(patience=600).patience
    600

    Attributes:
      request: for one request, of at most 8 MiB.
      patience: for which a request that fails is made again.
      lease: after which a process that wrote to an address, and has not been heard of since, counts as dead.

    Raises:
      StorageError: one that is no time.
    """

    request: float = 60.0
    patience: float = 180.0
    lease: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise StorageError(f"Limits({name}={value!r}): give seconds, more than 0")
