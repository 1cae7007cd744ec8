"""Target networks: a part of the parameters that follows another one."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from functrain.errors import UpdateError
from functrain.optim.optimizer import Optimizer
from functrain.tree.arrays import wide
from functrain.tree.paths import PyTree, difference, flatten, unflatten
from functrain.tree.rest import Whole
from functrain.tree.selectors import Selector, non_float, take
from functrain.tree.text import listed
from functrain.update.ema import leaves_taken_by
from functrain.update.step import After


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A function for `after`, made by `ema`; `make_update` binds it to the partition.

    Attributes:
      target: the part that follows, or a selector.
      of: the one that it follows.
      decay: how much of it stays at a step, or a schedule of the step.
      pairs: `{path in the target: path that it follows}`; None until it is bound.
    """

    target: Selector
    of: Selector
    decay: float | Callable[[Any], Any]
    pairs: dict[str, str] | None = None

    def __call__(self, params: PyTree, model_state: Any, step: Any) -> tuple[PyTree, Any]:
        """The params after the target has followed, and the model state as it was."""
        flat = flatten(params)
        pairs = self.pairs or self._paired(*([*take(params, each)[0]] for each in (self.target, self.of)))
        self._check_leaves(pairs, flat)
        decay = self.decay(step) if callable(self.decay) else self.decay
        followed = {path: _followed(flat[path], flat[other], decay) for path, other in pairs.items()}
        return unflatten(flat | followed, like=params), model_state

    def bound(self, optim: Optimizer) -> "Target":
        """The same for the parts of an optimizer.

        Raises:
          UpdateError: one of the two takes no leaf, their paths differ, or the target is trained.
        """
        taken, others = (leaves_taken_by(optim.parts, each, str(self)) for each in (self.target, self.of))
        if trained := [path for path, part in taken.items() if part in optim.trained]:
            raise UpdateError(
                f"{self}: {listed(trained)} of the target is trained by an optimizer as well: give the target a part of"
                ' its own that is frozen, {"target": ft.FROZEN}'
            )
        bound = dataclasses.replace(self, pairs=self._paired([*taken], [*others]))
        bound._check_leaves(bound.pairs or {}, {leaf.path: leaf for leaf in optim.parts.leaves})
        return bound

    def _paired(self, targets: Sequence[str], others: Sequence[str]) -> dict[str, str]:
        """The path that each path of the target follows: the same below the two."""
        mine, theirs = _below(targets), _below(others)
        if differs := difference(mine, theirs):
            raise UpdateError(
                f"{self}: the target must have the paths of what it follows, but it {differs}; begin with a copy,"
                ' {"target": params["online"], ...}'
            )
        return {path: theirs[rest] for rest, path in mine.items()}

    def _check_leaves(self, pairs: dict[str, str], flat: dict[str, Any]) -> None:
        for path, other in pairs.items():
            (shape, dtype), (its, _) = ((jnp.shape(flat[p]), jnp.result_type(flat[p])) for p in (path, other))
            if path == other or shape != its:
                raise UpdateError(
                    f"{self}: {path!r} of shape {shape} can't follow {other!r} of shape {its}: give two parts of the"
                    " same shapes"
                )
            if jnp.issubdtype(dtype, jnp.floating) and jnp.promote_types(dtype, jnp.float32) != dtype:
                raise UpdateError(
                    f"{self}: {path!r} is {dtype}, in which steps this small are rounded away: keep the target in"
                    " float32, and compute with it in 16 bits, make_update(..., compute_dtype={'target': ...})"
                )

    def __str__(self) -> str:
        return f"ft.ema({self.target!r}, of={self.of!r})"


def ema(target: Selector, *, of: Selector, decay: float | Callable[[Any], Any]) -> Target:
    """A target network, which follows another one after each step: `decay * target + (1 - decay) * online`.

    >>> import functrain as ft
    >>> params = {"online": {"w": jnp.ones(2)}, "target": {"w": jnp.zeros(2)}}
    >>> parts = ft.partition(params, {"online": "online", "target": "target"})
    >>> optim = ft.Optimizer(parts, {"online": optax.sgd(1.0), "target": ft.FROZEN})
    >>> def loss_fn(params, batch):
    ...     return jnp.sum(params["online"]["w"] * batch)
    >>> update = ft.make_update(loss_fn, optim, after=ema("target", of="online", decay=0.75))
    >>> state, _ = update(update.init(params), jnp.array([-1.0, 1.0]))
    >>> state.params["target"]["w"].tolist()
    [0.5, 0.0]

    That is `optax.incremental_update` of one part from another. For averages of parameters that nothing computes with
    while they are trained, `make_update(ema=...)` needs no part of their own.

    Args:
      target: the part that follows, frozen, or a selector of its leaves. Its paths below what they all begin with are
        those of the other, and its leaves have the same shapes, in float32 or wider; those that are not floating point
        are taken over as they are.
      of: the part that it follows, or a selector.
      decay: at least 0 and below 1, or a schedule of the step, which counts from 1.

    Returns:
      What `make_update(after=)` and `ft.Phase(after=)` take. It is a function, too, for an `after` of one's own, which
      knows selectors and no parts.

    Raises:
      UpdateError: a decay that is none; and from `make_update`, paths or shapes that differ, or a target that is
        trained.
    """
    if not callable(decay) and (isinstance(decay, bool) or not isinstance(decay, float | int) or not 0 <= decay < 1):
        raise UpdateError(f"ft.ema(..., decay={decay!r}): give a number of at least 0 and below 1, or a schedule")
    return Target(target, of, decay)


def bound(after: Any, optim: Optimizer, whole: Whole) -> After:
    """What is done after each step, for the parts of an optimizer; a function is given whole params.

    Raises:
      UpdateError: it is no function, or a target that can't follow.
    """
    if isinstance(after, Target):
        return after.bound(optim)
    if not callable(after):
        raise UpdateError(f"after={after!r}: give a function (params, model_state, step) -> (params, model_state)")
    if not whole.partition.rest:
        function: After = after
        return function

    def of_arrays(params: PyTree, model_state: Any, step: Any) -> Any:
        returned = after(whole.tree(params), model_state, step)
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        return (whole.arrays(returned[0]), returned[1]) if is_pair else returned

    return of_arrays


def _below(paths: Sequence[str]) -> dict[str, str]:
    """The paths by what is left of them below the folder that all are in; of a single one that is nothing."""
    if len(paths) == 1:
        return {"": paths[0]}
    names = [path.split("/") for path in paths]
    levels = zip(*(path[:-1] for path in names), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda level: len({*level}) == 1, levels))
    return {"/".join(path[depth:]): whole for path, whole in zip(names, paths, strict=True)}


def _followed(target: Any, other: Any, decay: Any) -> Any:
    if non_float("", target):
        return other
    moved = optax.incremental_update(wide(other), wide(target), 1 - decay)
    return jnp.asarray(moved, jnp.result_type(target))
