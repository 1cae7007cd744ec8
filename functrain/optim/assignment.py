"""Which transform each part has, and from which step of a run."""

import bisect
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from functrain.mesh.layout import Layout
from functrain.mesh.sums import finite, norms
from functrain.optim.checks import check_joins, check_others, check_transforms
from functrain.optim.clipping import By, Norms, checked_norms, each_norm
from functrain.optim.describe import described
from functrain.optim.layouts import Places, check_layout, on_device, places_of
from functrain.optim.transforms import Frozen, Transform, state_name
from functrain.tree.arrays import is_finite
from functrain.tree.partition import Partition, Split, table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Assignment:
    """What an `Optimizer` is made with, checked, and what follows of it for a part; the fields are its arguments."""

    parts: Partition
    transforms: Mapping[str, Transform]
    clip_norm: Norms | None = dataclasses.field(default=None, kw_only=True)
    clip_by: By | None = dataclasses.field(default=None, kw_only=True)
    frozen_until: Mapping[str, int] = dataclasses.field(default_factory=dict, kw_only=True)
    others: Mapping[str, Mapping[str, Transform]] = dataclasses.field(default_factory=dict, kw_only=True)
    layout: Layout | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_transforms(self.parts, self.transforms)
        object.__setattr__(self, "transforms", dict(self.transforms))
        checked_norms(self.clip_norm, self.clip_by, self.trained)
        check_joins(self.frozen_until, self.transforms, self.trained)
        object.__setattr__(self, "frozen_until", dict(self.frozen_until))
        check_others(self.others, self.transforms, self.trained)
        object.__setattr__(self, "others", {name: dict(of_parts) for name, of_parts in self.others.items()})
        check_layout(self.layout, self.parts, self.trained)

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that have a transform; what to give to `make_train_step(..., wrt=optim.trained)`."""
        return tuple(part for part in self.parts.names if not isinstance(self.transforms[part], Frozen))

    @functools.cached_property
    def owners(self) -> dict[str, str]:
        """The part that each optimizer state is of: a part has one under its name, and one for each of its others."""
        own = {part: part for part in self.trained}
        return own | {state_name(part, name): part for name, of_parts in self.others.items() for part in of_parts}

    def states_used(self, using: str | None) -> dict[str, str]:
        """The name of the optimizer state that each part is stepped with, its own or its other of a name."""
        of_parts = self.others.get(using, {}) if using else {}
        return {part: state_name(part, str(using)) if part in of_parts else part for part in self.trained}

    @functools.cached_property
    def all_transforms(self) -> dict[str, Transform]:
        """The transforms by the name of their state; of frozen parts, by part."""
        others = {state_name(part, name): tx for name, of_parts in self.others.items() for part, tx in of_parts.items()}
        return {**self.transforms, **others}

    def trained_at(self, step: int) -> tuple[str, ...]:
        """The parts that an update trains when a run has finished this many steps: those that have joined.

        In a loop of one's own it is what to give to `make_train_step(..., wrt=optim.trained_at(step))`.
        """
        return tuple(part for part in self.trained if self.frozen_until.get(part, 0) <= step)

    @functools.cached_property
    def stages(self) -> tuple[int, ...]:
        """The steps from which other parts are trained than before; the first is 0."""
        return (0, *sorted({*self.frozen_until.values()}))

    def stage(self, step: int) -> int:
        """The number of the stage that a run is in when it has finished this many steps."""
        return bisect.bisect_right(self.stages, step) - 1

    @functools.cached_property
    def places(self) -> Places | None:
        """Where the optimizer state of each trained leaf lies; None without a layout."""
        return None if self.layout is None else places_of(self.layout, self.parts, self.trained)

    @functools.cached_property
    def places_of_grads(self) -> Places | None:
        """Where gradients of trained leaves, sums of them and updates lie; None without a layout."""
        return self.places and {part: on_device(places) for part, places in self.places.items()}

    def norms(self, groups: Mapping[Any, Split]) -> dict[Any, jax.Array]:
        """The norms of split trees by any name, float32 or wider; over a layout all from one collective."""
        return each_norm(groups) if self.layout is None else norms(groups, self.layout)

    def finite(self, groups: Mapping[Any, Split]) -> dict[Any, jax.Array]:
        """Whether every number of split trees is finite, bool scalars; over a layout all from one collective."""
        if self.layout is None:
            return {name: is_finite(split) for name, split in groups.items()}
        return finite(groups, self.layout)

    @property
    def described(self) -> dict[str, str]:
        """What the transform of each part is made of, as far as it can be told; "frozen" for a frozen one."""
        texts = {part: described(self.transforms[part]) for part in self.parts.names}
        texts |= {part: f"frozen until step {step}, then {texts[part]}" for part, step in self.frozen_until.items()}
        for name, of_parts in self.others.items():
            for part, tx in of_parts.items():
                texts[part] += f"; in {name} {described(tx)}"
        return texts

    def __str__(self) -> str:
        return table(self.parts, "optimizer", list(self.described.values()))

    def __repr__(self) -> str:
        return f"Optimizer({', '.join(f'{part}: {name}' for part, name in self.described.items())})"
