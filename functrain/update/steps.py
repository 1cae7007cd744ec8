"""The steps of an update, one of each phase in each stage, as its options have them made."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from functrain.errors import UpdateError
from functrain.gradients.objective import make_objective
from functrain.gradients.train_step import make_gradient
from functrain.optim.optimizer import Optimizer
from functrain.tree.paths import PyTree
from functrain.tree.rest import Whole
from functrain.tree.selectors import Selector
from functrain.tree.text import listed
from functrain.update.options import Options
from functrain.update.phases import Phase
from functrain.update.precision import on_narrow_batches
from functrain.update.stages import with_reach_checked
from functrain.update.step import After, Step
from functrain.update.target import bound


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """What steps are made of beside their phase: the options of `make_update`, and what follows of them."""

    options: Options
    cast: Callable[[PyTree], PyTree]
    cast_batch: "bool | Selector"
    after: After | None
    audit: bool

    def of_stage(self, phases: Sequence[Phase], begin: int) -> tuple[Step, ...]:
        """The step of each phase in the stage that begins at a step."""
        return tuple(self._step_of(phase, index, begin) for index, phase in enumerate(phases))

    def _step_of(self, phase: Phase, index: int, begin: int) -> Step:
        optim, whole = self.options.optim, self.options.whole
        loss = on_narrow_batches(whole.given_to(phase.loss_fn), self.options.narrow, self.cast_batch)
        trained = tuple(part for part in phase.trained if part in optim.trained_at(begin))
        losses: Any = {"cast": self.cast, "route": phase.route, "loss_weights": phase.loss_weights}

        def gradient_of(parts: tuple[str, ...], **options: Any) -> Any:
            return make_gradient(loss, optim.parts, parts, **losses | self._of_each(phase, parts) | options)

        gradient = gradient_of(phase.trained, audit=_where(phase) if self.audit else None)
        if trained != phase.trained:
            of_stage = gradient_of(trained, held=[part for part in phase.trained if part not in trained])
            gradient = with_reach_checked(of_stage, gradient) if self.audit else of_stage
        return Step(
            name=phase.name,
            index=index,
            parts=trained,
            using=phase.name if phase.optim else None,
            gradient=gradient,
            objective=make_objective(loss, phase.trained, **losses),
            after=tuple(bound(each, optim, whole) for each in (phase.after, self.after) if each is not None),
            options=self.options,
        )

    def _of_each(self, phase: Phase, parts: tuple[str, ...]) -> dict[str, Any]:
        """What of the gradients of some parts is computed of each loss, or of each example, by itself."""
        per_example = self.options.per_example
        if isinstance(per_example, Mapping):
            per_example = {part: fn for part, fn in per_example.items() if part in parts} or None
        if not self.options.by_loss:
            return {"per_example": per_example}
        if phase.route is not None or per_example is not None:
            what = "route=" if phase.route is not None else "per_example="
            raise UpdateError(
                f"the function of gradients= declares per_loss, which excludes {what}: leave one out, and combine the"
                " losses of each part in the function"
            )
        return {"per_loss": True, "loss_weights": None}


def of_arrays(optim: Optimizer) -> tuple[Whole, Optimizer]:
    """The optimizer of the arrays of its trees, and how whole trees come of them.

    Raises:
      UpdateError: it is no optimizer, or trains a part with a leaf that is no array.
    """
    if not isinstance(optim, Optimizer):
        raise UpdateError(f"make_update(loss_fn, optim) takes an ft.Optimizer, not {type(optim).__name__}")
    whole = Whole(optim.parts)
    if not optim.parts.rest:
        return whole, optim
    trained = {leaf.path for leaf in optim.parts.leaves if leaf.part in optim.trained}
    if bad := [path for path in optim.parts.rest if path in trained]:
        raise UpdateError(
            f"{listed(bad)} is no array, in a part that is trained: give such leaves a frozen part of their own, before"
            ' the others, partition(model, {"static": ft.non_float, ...})'
        )
    transforms = {part: optim.transforms[part] for part in whole.parts.names}
    return whole, dataclasses.replace(optim, parts=whole.parts, transforms=transforms)


def _where(phase: Phase) -> str:
    return f" of phase {phase.name!r}" if phase.name else ""
