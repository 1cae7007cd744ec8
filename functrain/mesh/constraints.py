"""Arrays brought to where they are to lie: outside of a trace placed, inside of one constrained."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from functrain.tree.arrays import placed
from functrain.tree.paths import PyTree

HOST = ("pinned_host", "unpinned_host")


def brought(tree: PyTree, shardings: PyTree) -> PyTree:
    """A tree with each leaf where its sharding says; in a program a constraint, which costs what it moves.

    Args:
      tree: arrays, traced or not.
      shardings: a tree like it, of `jax.NamedSharding`s, in a memory of theirs or in the one that programs compute in.
    """
    return jax.tree.map(_brought, tree, shardings)


def in_auto_axes(fn: Callable[..., PyTree], args: tuple[PyTree, ...], like: PyTree, **others: Any) -> PyTree:
    """`fn(*args, **others)`, for a function that knows no mesh axes in types: within it they are none.

    Args:
      fn: such as the update of Muon, whose products contract cut dimensions.
      args: its positional arguments.
      like: what it returns lies as this does, tree for tree.
      **others: its arguments by keyword. A function among them, such as the loss, is one of explicit axes: it can't be
        called there.
    """
    if not any(map(_is_explicit, jax.tree.leaves(args))):
        return fn(*args, **others)
    functions = {name: value for name, value in others.items() if callable(value)}
    values = {name: value for name, value in others.items() if name not in functions}

    def free(args: tuple[PyTree, ...], values: dict[str, Any]) -> PyTree:
        return fn(*args, **values, **functions)

    shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, like)
    return jax.sharding.auto_axes(free, out_sharding=shardings)(args, values)


def is_explicit(mesh: Any) -> bool:
    """Whether a mesh has axes that are a part of an array's type."""
    return jax.sharding.AxisType.Explicit in (mesh.axis_types or ())


@contextlib.contextmanager
def told_of_explicit_axes(mesh: Any) -> Iterator[None]:
    """Adds to what JAX says of types over a mesh where they come from: explicit axes are its default."""
    try:
        yield
    except Exception as error:
        if is_explicit(mesh) and type(error).__name__ == "ShardingTypeError":
            error.add_note(
                "the layout's mesh has explicit axes, JAX's default, where the model says how each result lies; to have"
                f" the partitioner find that out: jax.make_mesh({mesh.axis_sizes}, {mesh.axis_names},"
                f" axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
            )
        raise


def _is_explicit(leaf: Any) -> bool:
    return is_explicit(jax.typeof(leaf).sharding.mesh)


def _brought(leaf: Any, sharding: Any) -> Any:
    if not isinstance(leaf, jax.core.Tracer):
        return leaf if getattr(leaf, "sharding", None) == sharding else placed(leaf, sharding)
    if (jax.typeof(leaf).memory_space == jax.memory.Space.Host) != (sharding.memory_kind in HOST):
        return jax.device_put(leaf, sharding)
    if is_explicit(sharding.mesh):
        return jax.sharding.reshard(leaf, sharding)
    return jax.lax.with_sharding_constraint(leaf, sharding)
