"""Specs of leaves: which mesh axes cut which of their dimensions, checked before anything is placed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from functrain.errors import LayoutError
from functrain.tree.text import did_you_mean, listed

Axes: TypeAlias = str | tuple[str, ...]
"""A mesh axis, or several that cut one dimension together."""


@dataclasses.dataclass(frozen=True)
class Largest:
    """A rule that cuts the largest dimension of a leaf that its axes divide; made by `largest`.

    Attributes:
      axes: the mesh axes.
      least: leaves of fewer elements are held by every device.
    """

    axes: tuple[str, ...]
    least: int

    def __str__(self) -> str:
        return f"largest({listed(self.axes)}{f', least={self.least}' if self.least > 1 else ''})"


def largest(axis: Axes, *, least: int = 2) -> Largest:
    """A rule for `ft.layout`: the largest dimension that the axis divides is cut over it. FSDP in a word.

    >>> largest("fsdp", least=1024)
    Largest(axes=('fsdp',), least=1024)

    Args:
      axis: a mesh axis, or a tuple of some that cut one dimension together.
      least: a leaf of fewer elements lies on every device whole; the table names it. By default these are scalars
        alone.

    Raises:
      LayoutError: an axis that is no name, or a size that is none.
    """
    axes = axes_of(axis)
    if not axes or not all(isinstance(each, str) for each in axes):
        raise LayoutError(f'ft.largest({axis!r}): name an axis of the mesh, ft.largest("fsdp")')
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise LayoutError(f"ft.largest(..., least={least!r}): give a number of elements, least=1024")
    return Largest(axes, least)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of one entry of a spec.

    >>> axes_of(None), axes_of("data"), axes_of(("data", "fsdp"))
    ((), ('data',), ('data', 'fsdp'))
    """
    return () if entry is None else tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def axes_in(spec: jax.P) -> tuple[str, ...]:
    """All axes of a spec, in order."""
    return tuple(axis for entry in spec for axis in axes_of(entry))


def size_of(mesh: Any, axes: Sequence[str]) -> int:
    """How many slices axes cut a dimension into."""
    return math.prod(mesh.shape[axis] for axis in axes)


def check_axes(mesh: Any, axes: Sequence[str], where: str) -> None:
    """Raises a LayoutError for an axis that the mesh has not, or that is named twice."""
    if unknown := [axis for axis in axes if axis not in mesh.shape]:
        raise LayoutError(
            f"{where} names the axis {listed(unknown)}, which the mesh has not: its axes are"
            f" {', '.join(f'{axis!r} of {size}' for axis, size in mesh.shape.items())}"
            f"{did_you_mean(unknown, mesh.shape)}"
        )
    if twice := [axis for axis in dict.fromkeys(axes) if axes.count(axis) > 1]:
        raise LayoutError(f"{where} names the axis {listed(twice)} twice: an axis cuts one dimension of a leaf")


def spec_of(rule: Any, path: str, shape: tuple[int, ...], mesh: Any, name: str) -> jax.P:
    """The spec that a rule gives a leaf.

    Raises:
      LayoutError: it does not fit: names the leaf, the dimension and the axis, and ends with what to write instead.
    """
    if isinstance(rule, Largest):
        if math.prod(shape) < rule.least:
            return jax.P()
        spec = cut_further(jax.P(), shape, rule.axes, mesh)
        if spec is None:
            raise LayoutError(
                f"rule {name}: no dimension of {path!r}, shaped {shape}, is a multiple of {size_of(mesh, rule.axes)},"
                f" the size of {listed(rule.axes)}: {_padding(shape, mesh, rule.axes)}write a rule of its own before,"
                f' {{"{path}": P()}} for all of it on every device, or least={math.prod(shape) + 1} in ft.largest'
            )
        return spec
    if len(rule) > len(shape):
        raise LayoutError(
            f"rule {name}: {rule} is for arrays of at least {len(rule)} dimensions, and {path!r} has {len(shape)},"
            f" {shape}: write a rule of its own before it, {{{path!r}: {_shortened(rule, len(shape))}}}"
        )
    for number, axes in enumerate(map(axes_of, rule)):
        if axes and shape[number] % size_of(mesh, axes):
            raise LayoutError(
                f"rule {name}: dimension {number} of {path!r}, shaped {shape}, is {shape[number]}, which"
                f" {listed(axes)} of {size_of(mesh, axes)} does not divide: pad it to"
                f" {_padded(shape[number], size_of(mesh, axes))}, or write a rule of its own before,"
                f" {{{path!r}: P()}} for all of it on every device"
            )
    return shortened(rule)


def shortened(spec: jax.P) -> jax.P:
    """A spec without what it ends with in vain.

    >>> [*shortened(jax.P(None, "data", None))], [*shortened(jax.P(None))]
    ([None, 'data'], [])
    """
    entries = [*spec]
    while entries and entries[-1] in (None, ()):
        entries.pop()
    return jax.P(*entries)


def cut_further(spec: jax.P, shape: tuple[int, ...], axes: Sequence[str], mesh: Any) -> jax.P | None:
    """A spec with one more dimension cut, or one further: the largest that is left of which there is an equal slice.

    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    >>> [*cut_further(jax.P("model"), (16, 8), ("data",), mesh)]
    ['model', 'data']

    Args:
      spec: what is cut already; of axes that are in it, none is cut again.
      shape: of the whole array.
      axes: that cut one dimension together.
      mesh: of the axes.

    Returns:
      None where the axes divide no dimension.
    """
    new = tuple(axis for axis in axes if axis not in axes_in(spec))
    if not new:
        return spec
    entries = [axes_of(entry) for entry in spec] + [()] * (len(shape) - len(spec))
    here = [length // size_of(mesh, entry) for length, entry in zip(shape, entries, strict=True)]
    fits = [number for number in range(len(shape)) if here[number] and here[number] % size_of(mesh, new) == 0]
    if not fits:
        return None
    best = max(fits, key=lambda number: here[number])
    entries[best] = (*entries[best], *new)
    return shortened(jax.P(*map(_entry, entries)))


def _entry(axes: tuple[str, ...]) -> Any:
    return axes if len(axes) > 1 else axes[0] if axes else None


def _shortened(spec: jax.P, rank: int) -> str:
    return f"P({', '.join(map(repr, [*spec][:rank]))})"


def _padding(shape: tuple[int, ...], mesh: Any, axes: Sequence[str]) -> str:
    if not shape:
        return ""
    longest = max(shape)
    return f"pad {longest} to {_padded(longest, size_of(mesh, axes))}, "


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
