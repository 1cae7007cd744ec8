"""Which transform each part has."""

import dataclasses
from collections.abc import Mapping

from functrain.optim.checks import check_transforms
from functrain.optim.clipping import By, Norms, checked_norms
from functrain.optim.describe import described
from functrain.optim.transforms import Frozen, Transform
from functrain.tree.partition import Partition, table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Assignment:
    """What an `Optimizer` is made with, checked, and what follows of it for a part; the fields are its arguments."""

    parts: Partition
    transforms: Mapping[str, Transform]
    clip_norm: Norms | None = dataclasses.field(default=None, kw_only=True)
    clip_by: By | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_transforms(self.parts, self.transforms)
        object.__setattr__(self, "transforms", dict(self.transforms))
        checked_norms(self.clip_norm, self.clip_by, self.trained)

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that have a transform; what to give to `make_train_step(..., wrt=optim.trained)`."""
        return tuple(part for part in self.parts.names if not isinstance(self.transforms[part], Frozen))

    @property
    def described(self) -> dict[str, str]:
        """What the transform of each part is made of, as far as it can be told; "frozen" for a frozen one."""
        return {part: described(self.transforms[part]) for part in self.parts.names}

    def __str__(self) -> str:
        return table(self.parts, "optimizer", list(self.described.values()))

    def __repr__(self) -> str:
        return f"Optimizer({', '.join(f'{part}: {name}' for part, name in self.described.items())})"
