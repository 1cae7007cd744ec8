"""The layout: where on a mesh each leaf lies, resolved once from the parameters and never again."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import LayoutError, PartitionError
from functrain.mesh.constraints import brought
from functrain.mesh.shares import Shardings, after_one_axis, check_divided, each_with, put
from functrain.mesh.specs import Largest, axes_in, axes_of, cut_further, size_of
from functrain.tree.arrays import is_array, placed
from functrain.tree.paths import Flat, PyTree, check_paths, flatten
from functrain.tree.text import aligned, bytes_in_words, leaves_in_words, listed

Spec: TypeAlias = jax.P | Largest
BatchSpec: TypeAlias = "jax.P | Mapping[str, BatchSpec] | tuple[BatchSpec, ...]"


class Rule(NamedTuple):
    """A rule of a layout: its selector and spec as one would write them, and the paths of the leaves that it took."""

    selector: str
    spec: str
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """Where the leaves of a tree lie on a mesh, and batches; made by `layout`. `print(layout)` is a table of its rules.

    Attributes:
      mesh: the mesh.
      shapes: of every array, by path, as `jax.ShapeDtypeStruct`s.
      specs: the spec of every array, by path.
      rules: the rules, in order.
      batch_spec: of batches; or by name, for batches that are dicts.
      zero: the axes that cut what is kept beside each parameter.
      memory: `{part or selector: memory kind}`, where optimizer state lies.
    """

    mesh: Any
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    specs: Mapping[str, jax.P]
    rules: tuple[Rule, ...]
    batch_spec: BatchSpec
    zero: tuple[str, ...]
    memory: Mapping[Any, str]

    def sharding(self, path: str) -> jax.NamedSharding:
        """Where a parameter lies."""
        return self._of_params[path]

    def of_state(self, path: str) -> jax.NamedSharding:
        """Where lies what is kept beside a parameter: moments, sums of its gradient, its average."""
        return self._of_state[path]

    def shardings(self, tree: PyTree) -> PyTree:
        """A tree of the shardings of a tree like params, of whatever leaves.

        Raises:
          LayoutError: the tree has other paths than the one that was laid out.
        """
        flat = flatten(tree)
        self._check(flat)
        return jax.tree.unflatten(jax.tree.structure(tree), [self._of_params.get(path) for path in flat])

    def put(self, tree: PyTree) -> PyTree:
        """A tree like params with each array in its place, copied unless it lies there; processes each have all of it.

        >>> import functrain as ft, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> placed = ft.layout({"w": jnp.ones(4)}, mesh, {...: ft.largest("data")}).put({"w": jnp.ones(4)})
        >>> [*placed["w"].sharding.spec]
        ['data']

        Raises:
          LayoutError: the tree has other paths, or an array another shape, than what was laid out.
        """
        flat = flatten(tree)
        self._check(flat)
        self._check_shapes(flat)
        return jax.tree.unflatten(jax.tree.structure(tree), [self._put(path, leaf) for path, leaf in flat.items()])

    def init(self, fn: Callable[..., PyTree], *args: Any) -> PyTree:
        """What a function returns, params, made in place: no device ever holds more than its own share of them.

        >>> import functrain as ft, jax.numpy as jnp
        >>> def fn(key):
        ...     return {"w": jax.random.normal(key, (4,))}
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> of_shapes = ft.layout(jax.eval_shape(fn, jax.random.key(0)), mesh, {...: ft.largest("data")})
        >>> of_shapes.init(fn, jax.random.key(0))["w"].shape
        (4,)

        Args:
          fn: a pure function, compiled here. What it returns may hold leaves that are no arrays, such as functions.
          *args: its arguments, arrays that all processes have alike.

        Raises:
          LayoutError: it returns other paths or shapes than those that were laid out, or is no function.
        """
        if not callable(fn):
            raise LayoutError(
                f"layout.init takes a function that makes params, no {type(fn).__name__}: write layout.init(make, key)."
                " Params that are there are placed by layout.put(params)"
            )
        made: list[PyTree] = []

        def arrays(*args: Any) -> Flat:
            made[:] = [fn(*args)]
            return {path: leaf for path, leaf in flatten(made[0]).items() if path in self.specs or is_array(leaf)}

        def like_made(leaves: Flat) -> PyTree:
            whole = [leaves.get(path, leaf) for path, leaf in flatten(made[0]).items()]
            return jax.tree.unflatten(jax.tree.structure(made[0]), whole)

        shapes = jax.eval_shape(arrays, *args)
        self._check(flatten(like_made(shapes)))
        self._check_shapes(shapes)
        return like_made(jax.jit(arrays, out_shardings={path: self.sharding(path) for path in shapes})(*args))

    def abstract(self, tree: PyTree) -> PyTree:
        """A tree like params as `jax.ShapeDtypeStruct`s with shardings: what to compile for, or to restore like."""
        flat = flatten(tree)
        self._check(flat)
        self._check_shapes(flat)
        return jax.tree.unflatten(jax.tree.structure(tree), [self._abstract(path, leaf) for path, leaf in flat.items()])

    def batch(self, batch: Any) -> Any:
        """A batch on its devices; of several processes each gives the rows that its devices hold.

        Raises:
          LayoutError: a dimension that the spec does not divide; other names than those of `batch=`.
        """
        return put(batch, self.batch_shardings)

    def constrained(self, batch: Any, *, stacked: bool = False) -> Any:
        """A batch in a program, or batches on a new leading axis, cut as the layout says wherever it came from.

        Raises:
          LayoutError: a dimension that the spec does not divide.
        """

        def one(leaf: Any, here: Any) -> Any:
            if stacked:
                here = after_one_axis(here, leaf.ndim)
            check_divided(leaf, here)
            return brought(leaf, here)

        return each_with(one, self.batch_shardings, batch)

    @functools.cached_property
    def batch_shardings(self) -> Shardings:
        """The sharding of batches, or of their leaves by name; of arrays of fewer dimensions its beginning counts."""
        return jax.tree.map(self._named, self.batch_spec, is_leaf=lambda node: isinstance(node, jax.P))

    @functools.cached_property
    def data_axes(self) -> tuple[str, ...]:
        """The mesh axes that the rows of a batch are cut over."""
        specs = jax.tree.leaves(self.batch_spec, is_leaf=lambda node: isinstance(node, jax.P))
        return next((axes_of(spec[0]) for spec in specs if len(spec)), ())

    @functools.cached_property
    def data_shards(self) -> int:
        """How many slices the rows of a batch are cut into."""
        return size_of(self.mesh, self.data_axes)

    @functools.cached_property
    def uncut(self) -> tuple[str, ...]:
        """The leaves whose state `zero` does not cut, as it divides none of their dimensions."""
        return tuple(path for path in self.specs if self.zero and self._further(path) is None)

    def bytes_here(self, path: str) -> int:
        """The bytes of a parameter on each device."""
        shape, of = self.sharding(path).shard_shape(self.shapes[path].shape), self.shapes[path].dtype
        return math.prod(shape) * int(of.itemsize)

    def __str__(self) -> str:
        rows = [("rule", "spec", "leaves", "bytes a device")]
        for rule in self.rules:
            specs = dict.fromkeys(written(self.specs[path]) for path in rule.paths)
            for number, spec in enumerate(specs):
                mine = [path for path in rule.paths if written(self.specs[path]) == spec]
                shown = rule.selector if number == 0 else ""
                rows.append((shown, spec, f"{len(mine):,}", bytes_in_words(sum(map(self.bytes_here, mine)))))
        rows.append(("total", "", f"{len(self.specs):,}", bytes_in_words(sum(map(self.bytes_here, self.specs)))))
        table = aligned(rows, (str.ljust, str.ljust, str.rjust, str.rjust))
        return "\n".join([table, *self._others()])

    def __repr__(self) -> str:
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return f"Layout({leaves_in_words(len(self.specs))} over {mesh})"

    def _others(self) -> list[str]:
        """What the table says beneath its rules."""
        lines = [f"mesh: {' x '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())}"]
        uncut = "" if self.data_axes else ", so that every device computes all of it"
        lines += [f"batch: {of_batch(self.batch_spec)}{uncut}"]
        whole = [path for path, spec in self.specs.items() if not axes_in(spec)]
        if whole and len(whole) < len(self.specs):
            lines.append(f"whole on every device: {listed(whole)}")
        if self.zero:
            lines.append(f"zero: optimizer state, sums of gradients and averages are cut over {listed(self.zero)} too")
        if self.uncut:
            lines.append(f"zero cuts no dimension of {listed(self.uncut)}")
        return lines + [f"memory: the optimizer state of {key!r} in {kind}" for key, kind in self.memory.items()]

    @functools.cached_property
    def _of_params(self) -> dict[str, jax.NamedSharding]:
        return {path: self._named(spec) for path, spec in self.specs.items()}

    @functools.cached_property
    def _of_state(self) -> dict[str, jax.NamedSharding]:
        if not self.zero:
            return self._of_params
        return {path: self._named(self._further(path) or spec) for path, spec in self.specs.items()}

    def _named(self, spec: jax.P) -> jax.NamedSharding:
        return jax.NamedSharding(self.mesh, spec)

    def _further(self, path: str) -> jax.P | None:
        return cut_further(self.specs[path], self.shapes[path].shape, self.zero, self.mesh)

    def _put(self, path: str, leaf: Any) -> Any:
        if path not in self.specs:
            return leaf
        sharding = self.sharding(path)
        if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return _moved(leaf, sharding)
        if getattr(leaf, "sharding", None) == sharding:
            return leaf
        # JAX hands on the buffers of what lies there already, of numpy too: a call that consumes them would take both.
        return placed(jnp.array(leaf, copy=True) if isinstance(leaf, jax.Array) else np.array(leaf), sharding)

    def _abstract(self, path: str, leaf: Any) -> Any:
        if path not in self.specs:
            return leaf
        of = self.shapes[path]
        return jax.ShapeDtypeStruct(of.shape, getattr(leaf, "dtype", of.dtype), sharding=self.sharding(path))

    def _check(self, flat: Flat) -> None:
        try:
            check_paths([path for path, leaf in flat.items() if path in self.specs or is_array(leaf)], self.specs, "")
        except PartitionError as error:
            raise LayoutError(
                f"the tree{error}, of those that were laid out: give a tree like the one that ft.layout was given, or"
                " lay out this one"
            ) from None

    def _check_shapes(self, flat: Flat) -> None:
        for path, leaf in flat.items():
            shape = tuple(getattr(leaf, "shape", ()))
            if path in self.specs and shape != self.shapes[path].shape:
                raise LayoutError(
                    f"{path!r} has shape {shape}, and was laid out with {self.shapes[path].shape}: lay out these"
                    " params, ft.layout(params, mesh, rules)"
                )


def _moved(leaf: Any, sharding: Any) -> Any:
    """An array of several processes, or a traced one, elsewhere."""
    if isinstance(leaf, jax.core.Tracer):
        return brought(leaf, sharding)
    return leaf if leaf.sharding == sharding else jax.jit(lambda leaf: leaf, out_shardings=sharding)(leaf)


def written(spec: Spec) -> str:
    """A spec as one would write it."""
    if isinstance(spec, Largest):
        return str(spec)
    return f"P({', '.join(map(repr, spec))})"


def of_batch(batch: BatchSpec) -> str:
    """The spec of batches as one would write it."""
    if isinstance(batch, jax.P):
        return written(batch)
    if not isinstance(batch, Mapping):  # Of batches that are tuples.
        return f"({', '.join(map(of_batch, batch))})"
    return ", ".join(f"{name} {of_batch(spec)}" for name, spec in batch.items())
