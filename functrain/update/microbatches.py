"""A batch in slices that are computed one after the other, for memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import UpdateError
from functrain.mesh.constraints import brought, is_explicit
from functrain.mesh.layout import Layout
from functrain.mesh.shares import after_one_axis, each_with
from functrain.mesh.specs import axes_of, size_of
from functrain.tree.arrays import common_length, leading_lengths
from functrain.tree.paths import flatten
from functrain.tree.text import listed
from functrain.update.options import Options
from functrain.update.window import empty_like

OfBatch = Callable[[Any, Any, Any], tuple[Any, Any, Any, Any]]
"""From a batch, a key and a model state to `(gradients, metrics, weight, model_state)`."""


def of_microbatches(
    of_batch: OfBatch,
    batch: Any,
    key: Any,
    model_state: Any,
    options: Options,
) -> tuple[Any, Any, Any, Any]:
    """What `of_batch` returns for a whole batch, from its slices, the model state handed on from one to the next.

    Where it returns that of each shard, so does this.
    """
    count, add = options.microbatches, options.added
    if count == 1:
        return of_batch(batch, key, model_state)

    def microbatch(carry: Any, inputs: Any) -> tuple[Any, None]:
        window, model_state = carry
        index, batch = inputs
        folded = None if key is None else jax.random.fold_in(key, index)
        grads, metrics, weight, model_state = of_batch(batch, folded, model_state)
        return (add(window, grads, metrics, weight), model_state), None

    slices = sliced(batch, count, options.optim.layout)
    one = jax.tree.map(lambda leaf: leaf[0], slices)
    start = (empty_like(lambda: add(None, *of_batch(one, key, model_state)[:3])), model_state)
    (window, model_state), _ = jax.lax.scan(microbatch, start, (jnp.arange(count), slices))
    return (*options.means(window), window.weight, model_state)


def sliced(batch: Any, count: int, layout: Layout | None = None) -> Any:
    """A batch as slices on a new leading axis; each takes every count-th example, so that none leaves its device.

    Raises:
      UpdateError: the count does not divide the rows of the batch, or of a layout those that each device holds.
    """
    lengths = leading_lengths(batch)
    if len({*lengths.values()}) > 1:
        shapes = {path: jnp.shape(leaf) for path, leaf in flatten(batch).items()}
        raise UpdateError(
            f"microbatches={count}: the leaves of a batch must have one leading axis, of examples: {shapes}"
        )
    if lengths and (common_length(lengths.values()) or 1) % count:
        path, leaf = next(iter(flatten(batch).items()))
        raise UpdateError(
            f"microbatches={count}: the leading axis of {path!r}, shaped {jnp.shape(leaf)}, is no multiple of it"
        )
    if layout is None:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1), batch)
    return each_with(lambda leaf, here: _sliced(leaf, here, count), layout.batch_shardings, batch)


def _sliced(leaf: Any, here: Any, count: int) -> Any:
    """Slices of a leaf, each laid out as the whole of it is."""
    axes = axes_of(here.spec[0]) if len(here.spec) else ()
    shards = size_of(here.mesh, axes)
    rows = leaf.shape[0] // shards
    if rows % count:
        fits = [number for number in range(1, rows + 1) if rows % number == 0]
        raise UpdateError(
            f"microbatches={count}: the {leaf.shape[0]} rows of a batch are cut over {listed(axes)} of {shards}, and"
            f" the {rows} that each device holds are no multiple of {count}, so that rows would move and devices wait:"
            f" write one of {', '.join(map(str, fits))}, or give batches of a multiple of {shards * count} rows"
        )
    split: dict[str, Any] = {}
    if is_explicit(jax.typeof(leaf).sharding.mesh):  # Then JAX asks which of the new axes is cut.
        split["out_sharding"] = here.update(spec=jax.P(*here.spec[:1], None, *here.spec[1:]))
    slices = jnp.reshape(leaf, (-1, count, *leaf.shape[1:]), **split).swapaxes(0, 1)
    return brought(slices, after_one_axis(here, slices.ndim))
