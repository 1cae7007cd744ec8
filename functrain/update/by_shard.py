"""Gradients summed by data shard: each shard of a batch is a microbatch of its own, and a window reduces once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import LossError, UpdateError
from functrain.mesh.constraints import brought, is_explicit
from functrain.mesh.layout import Layout
from functrain.mesh.shares import each_with
from functrain.mesh.specs import axes_of, shortened
from functrain.tree.text import listed
from functrain.update.window import Window, add_to_window


@dataclasses.dataclass(frozen=True)
class ByShard:
    """What is done by shard, of a layout that cuts batches; its outputs have a leading axis, of shards."""

    layout: Layout

    @property
    def place(self) -> jax.NamedSharding:
        """Where arrays of one number, or slice, by shard lie."""
        return jax.NamedSharding(self.layout.mesh, jax.P(self.layout.data_axes))

    def in_place(self, numbers: Any) -> Any:
        """A tree of arrays of one number by shard, each shard's on its devices."""
        return jax.tree.map(lambda leaf: brought(leaf, self.place), numbers)

    def places(self, of_grads: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Where the sums of shards lie: each device has all of its shard's, but for what other axes cut."""
        return {part: {path: self._place(here) for path, here in flat.items()} for part, flat in of_grads.items()}

    def of_batch(self, of_one: Any, batch: Any, key: Any, model_state: Any) -> tuple[Any, Any, Any, Any]:
        """`(gradients, metrics, weight, model_state)`, by shard, from a function that returns these of a batch.

        Raises:
          LossError: the loss changes the model state.
        """
        shards = self.layout.data_shards
        split = each_with(self._split, self.layout.batch_shardings, batch)
        axes = each_with(lambda leaf, here: self._axis(here), self.layout.batch_shardings, batch)

        def of_shard(batch: Any, index: Any) -> tuple[Any, Any, Any]:
            folded = None if key is None else jax.random.fold_in(key, index)
            grads, metrics, weight, new = of_one(batch, folded, model_state)
            if [*map(id, jax.tree.leaves(new))] != [*map(id, jax.tree.leaves(model_state))]:
                raise LossError(
                    "reduce='window' and a loss function that returns a new model_state exclude each other, as each"
                    " shard of the batch would have another one: write reduce='batch', or use layers without"
                    " statistics of the batch, such as group norm"
                )
            return grads, metrics, jnp.asarray(weight)

        found: Any = jax.vmap(of_shard, in_axes=(axes, 0), axis_size=shards, spmd_axis_name=self.layout.data_axes)
        found = found(split, self.in_place(jnp.arange(shards)))
        return (*jax.tree.map(self._with_axis, found), model_state)

    def added(self, window: Window | None, grads: Any, metrics: Any, weight: Any) -> Window:
        """A window with what a batch gave, by shard."""
        before = None if window is None else self.fitted(window)
        of_window = None if window is None else 0
        add: Any = jax.vmap(add_to_window, in_axes=(of_window, 0, 0, 0), spmd_axis_name=self.layout.data_axes)
        found: Window = add(before, grads, metrics, weight)
        return found

    def means(self, window: Window) -> tuple[Any, Any]:
        """The means of each shard."""
        mean: Any = jax.vmap(Window.mean, spmd_axis_name=self.layout.data_axes)
        grads, metrics = mean(window)
        return grads, metrics

    def united(self, grads: Any, metrics: Any, weight: Any) -> tuple[Any, Any, Any]:
        """The means over all shards, and their weight."""
        window = self.added(None, grads, metrics, weight).summed()
        return (*window.mean(), window.weight)

    def fitted(self, window: Window) -> Window:
        """The same sums by the shards that there are now: those of a window of others are all the first's."""
        shards = self.layout.data_shards
        if jnp.shape(window.weight) == (shards,):
            return window

        def first_of_all(leaf: Any) -> jax.Array:
            return jnp.concatenate([leaf[None], jnp.zeros((shards - 1, *leaf.shape), leaf.dtype)])

        found: Window = jax.tree.map(first_of_all, window.summed())
        return found

    def _with_axis(self, leaf: Any) -> Any:
        """What a shard returned, with the axis of shards in its type where that has axes: a constant is without."""
        if not is_explicit(self.layout.mesh):
            return leaf
        spec = jax.P(self.layout.data_axes, *jax.typeof(leaf).sharding.spec[1:])
        return brought(leaf, jax.NamedSharding(self.layout.mesh, spec))

    def _axis(self, here: Any) -> int | None:
        axes = axes_of(here.spec[0]) if len(here.spec) else ()
        if axes and axes != self.layout.data_axes:
            raise UpdateError(
                f"reduce='window': the rows of one leaf of the batch are cut over {listed(axes)}, those of another over"
                f" {listed(self.layout.data_axes)}: cut all alike, ft.layout(..., batch=P({self.layout.data_axes!r}))"
            )
        return 0 if axes else None

    def _split(self, leaf: Any, here: Any) -> Any:
        """A leaf by shard, where its rows are cut; else the same for all of them."""
        if self._axis(here) is None:
            return leaf
        place = here.update(spec=jax.P(*here.spec[:1], None, *here.spec[1:]))
        # On a mesh of explicit axes JAX asks which of the new axes is cut.
        split: dict[str, Any] = {"out_sharding": place} if is_explicit(jax.typeof(leaf).sharding.mesh) else {}
        return brought(jnp.reshape(leaf, (self.layout.data_shards, -1, *leaf.shape[1:]), **split), place)

    def _place(self, here: Any) -> Any:
        data = self.layout.data_axes
        others = [tuple(axis for axis in axes_of(entry) if axis not in data) or None for entry in here.spec]
        return here.update(spec=shortened(jax.P(data, *others)))
