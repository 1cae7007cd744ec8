"""Batches on their way to the devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def put(batch: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A batch where a sharding says; in a run of several processes each gives its own slice, what is there stays."""
    if sharding is None:
        return batch
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda leaf: leaf if _lies(leaf, sharding) else jax.make_array_from_process_local_data(sharding, leaf), batch
    )


def put_ahead(batch: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A batch on its way to the devices, before it is needed: where a sharding says, or to the first one."""
    return jax.device_put(batch) if sharding is None else put(batch, sharding)


def put_stacked(batches: Sequence[Any], sharding: jax.sharding.Sharding | None) -> Any:
    """Several batches on a new leading axis, each where a sharding says."""
    stacked = jax.tree.map(_stacked, *batches)
    if isinstance(sharding, jax.NamedSharding):
        sharding = jax.NamedSharding(sharding.mesh, jax.P(None, *sharding.spec))
    return put(stacked, sharding)


def are_alike(batches: Sequence[Any]) -> bool:
    """Whether batches have one structure, and their leaves the same shapes and dtypes."""
    return len({*map(_signature, batches)}) == 1


def _lies(leaf: Any, sharding: jax.sharding.Sharding) -> bool:
    return isinstance(leaf, jax.Array) and leaf.sharding == sharding


def _stacked(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


def _signature(batch: Any) -> Any:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
