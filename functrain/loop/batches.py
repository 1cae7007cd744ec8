"""Batches on their way to the devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.mesh.shares import Shardings, after_one_axis, assembled, check_divided, each_with, put
from functrain.tree.arrays import is_here


def put_ahead(batch: Any, sharding: Shardings) -> Any:
    """A batch on its way to the devices, before it is needed: where a sharding says, or to the first one."""
    return jax.device_put(batch) if sharding is None else put(batch, sharding)


def put_stacked(batches: Sequence[Any], sharding: Shardings) -> Any:
    """Several batches on a new leading axis, each where a sharding says."""
    stacked = jax.tree.map(_stacked, *batches)
    if sharding is None:
        return stacked
    several = jax.process_count() > 1

    def placed(leaf: Any, here: jax.sharding.Sharding) -> Any:
        here = after_one_axis(here, leaf.ndim)
        if several and is_here(leaf):  # The rows of this process's share.
            return assembled(leaf, here, axis=1)
        check_divided(leaf, here)
        return jax.device_put(leaf, here)

    return each_with(placed, sharding, stacked)


def are_alike(batches: Sequence[Any]) -> bool:
    """Whether batches have one structure, and their leaves the same shapes and dtypes."""
    return len({*map(_signature, batches)}) == 1


def _stacked(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


def _signature(batch: Any) -> Any:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
