"""State of a model of Flax that is kept in frozen parts, where it stays as it was."""

from collections.abc import Sequence
from typing import Any

from functrain.optim.optimizer import Optimizer
from functrain.tree.flow import Marks, flow
from functrain.tree.model_state import NNX_MODEL_STATE, RANDOM, told_of_statistics
from functrain.tree.text import listed
from functrain.tree.warn import warn


class Unmoved:
    """What of the frozen parts of an optimizer is state of a model, and what programs compute of it."""

    def __init__(self, optim: Optimizer, phases: int):
        frozen = [leaf.path for leaf in optim.parts.leaves if leaf.part not in optim.trained]
        self._kinds = {path: optim.parts.state[path] for path in frozen if path in optim.parts.state}
        self._unused = {path for path, kind in self._kinds.items() if kind != RANDOM}
        self._to_come = set(range(phases)) if self._kinds else set()

    def is_known(self, phases: set[int]) -> bool:
        """Whether programs of these phases would tell nothing new."""
        return not phases & self._to_come

    def see(self, jaxpr: Any, names: Sequence[str], phases: set[int], *, has_model_state: bool) -> None:
        """Warns of random state that a program uses, and of statistics that none does: those of training mode.

        Args:
          jaxpr: the program of a step, traced.
          names: of its arguments, "params 'norm/mean'".
          phases: the numbers of those that are in it.
          has_model_state: whether there is state that moves.
        """
        self._to_come -= phases
        path_of = {f"params {path!r}": path for path in self._kinds}
        used = {path_of[name] for name in _used(jaxpr.jaxpr, names, path_of)}
        self._unused -= used
        if random := [path for path in self._kinds if path in used and self._kinds[path] == RANDOM]:
            self._kinds = {path: kind for path, kind in self._kinds.items() if kind != RANDOM}
            warn(
                f"{listed(random)} is random state in a frozen part, and never moves: every step draws the same"
                f" numbers, one dropout mask for ever: pass it as model_state: {NNX_MODEL_STATE}"
            )
        unused = [path for path in self._kinds if path in self._unused]
        if unused and not self._to_come and not has_model_state:
            warn(
                f"{listed(unused)} is in a frozen part and never moves, while the losses are computed with the"
                " statistics of each batch, so that an evaluation with it is of another model:"
                f" {told_of_statistics(self._kinds, unused)}"
            )


def _used(jaxpr: Any, names: Sequence[str], asked: Any) -> list[str]:
    """Of which of the asked arguments a program computes anything that it returns."""
    bits = [1 << i if name in asked else 0 for i, name in enumerate(names)]
    given = {id(each) for each in jaxpr.invars}
    marks = flow(jaxpr, [Marks(uses=bit) for bit in bits])
    every = 0
    for mark, returned in zip(marks, jaxpr.outvars, strict=True):
        every |= 0 if id(returned) in given else mark.uses
    return [name for name, bit in zip(names, bits, strict=True) if bit & every]
