"""What each device holds of a run between and within its steps: bytes by part, from shapes and shardings alone."""

import collections
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functrain.update.state import TrainState
from functrain.update.update import Update
from functrain.update.window import Window

WHATS = ("parameters", "gradients", "optimizer state", "window", "ema", "model state")


class Held(NamedTuple):
    """Bytes that each device holds.

    Attributes:
      what: "parameters", "gradients", "optimizer state", "window" (sums of gradients), "ema" or "model state".
      part: whose; "" for model state.
      memory: the kind of the memory: "device", or "pinned_host" and the like.
      nbytes: on each device.
    """

    what: str
    part: str
    memory: str
    nbytes: int


class Kept(NamedTuple):
    """An array that devices hold, or their shares of it; `leaf` is its shape, with its sharding."""

    what: str
    part: str
    path: str
    leaf: Any

    @property
    def nbytes(self) -> int:
        """On each device."""
        return math.prod(self.shape_here) * int(self.leaf.dtype.itemsize)

    @property
    def shape_here(self) -> tuple[int, ...]:
        """The shape of a device's share."""
        sharding = getattr(self.leaf, "sharding", None)
        return tuple(self.leaf.shape if sharding is None else sharding.shard_shape(self.leaf.shape))

    @property
    def mesh(self) -> Any:
        """The mesh that it lies over; None where there is none."""
        return getattr(getattr(self.leaf, "sharding", None), "mesh", None)

    @property
    def memory(self) -> str:
        """The kind of memory that it lies in."""
        return getattr(getattr(self.leaf, "sharding", None), "memory_kind", None) or "device"


def kept(update: Update, state: TrainState, window: Window | None) -> list[Kept]:
    """All that is kept in a step, of the state that `update.abstract` gives and the window that is pending in it.

    Gradients are those of all trained parts; where microbatches are summed, the window is their sums.
    """
    optim = update.optim
    split, owners = optim.parts.split(state.params), optim.owners
    found = [Kept("parameters", part, path, leaf) for part, flat in split.items() for path, leaf in flat.items()]
    grads = [_gradient(update, part, path, split[part][path]) for part in optim.trained for path in split[part]]
    found += grads
    for name, of_part in state.opt_state.items():
        found += _under("optimizer state", owners[name], of_part)
    for part, average in (state.ema or {}).items():
        found += _under("ema", part, average)
    if window is not None:
        by_loss = [*window.grads.values()] if update.options.by_loss else [window.grads]
        for of_loss in by_loss:
            for part, flat in of_loss.items():
                found += _under("window", part, flat)
    elif update.options.microbatches > 1:
        found += [each._replace(what="window", leaf=_wide(each.leaf)) for each in grads]
    return found + _under("model state", "", state.model_state)


def held(found: Iterable[Kept]) -> list[Held]:
    """The bytes of what is kept, by what it is, whose, and where."""
    sums: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for each in found:
        sums[each.what, each.part, each.memory] += each.nbytes
    return [Held(*key, sums[key]) for key in sums]


def _gradient(update: Update, part: str, path: str, leaf: Any) -> Kept:
    places = update.optim.places_of_grads
    place = getattr(leaf, "sharding", None) if places is None else places[part][path]
    leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return Kept("gradients", part, path, leaf if update.options.loss_scale is None else _wide(leaf))


def _wide(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32), sharding=leaf.sharding)


def _under(what: str, part: str, tree: Any) -> list[Kept]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [Kept(what, part, jax.tree_util.keystr(keys), leaf) for keys, leaf in leaves]
