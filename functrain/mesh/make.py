"""Makes a layout: rules resolved and checked as those of a partition are."""

from collections.abc import Mapping
from typing import Any

import jax

from functrain.errors import LayoutError, PartitionError
from functrain.mesh.constraints import HOST
from functrain.mesh.layout import BatchSpec, Layout, Rule, Spec, written
from functrain.mesh.specs import Axes, Largest, axes_in, axes_of, check_axes, size_of, spec_of
from functrain.tree.arrays import is_array
from functrain.tree.paths import PyTree, flatten
from functrain.tree.rules import owners
from functrain.tree.selectors import Selector, describe
from functrain.tree.text import listed

KINDS = ("device", *HOST)
_EVERYWHERE = jax.P()


def layout(
    params: PyTree,
    mesh: Any,
    rules: Mapping[Any, Spec],
    *,
    batch: BatchSpec = _EVERYWHERE,
    zero: Axes | None = None,
    memory: Mapping[Any, str] | None = None,
) -> Layout:
    """Says by path where parameters lie on a mesh: `ft.Optimizer(parts, transforms, layout=layout)` has all follow it.

    >>> import functrain as ft, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"embed": jnp.ones((8, 4)), "body": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    >>> mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
    >>> rules = {"embed": P("tensor"), "**/kernel": P("fsdp", "tensor"), ...: ft.largest("fsdp")}
    >>> print(ft.layout(params, mesh, rules, batch=P("fsdp")))
    rule       spec                 leaves  bytes a device
    embed      P('tensor')               1            64 B
    **/kernel  P('fsdp', 'tensor')       1            16 B
    ...        P('fsdp')                 1             8 B
    total                                3            88 B
    mesh: fsdp 2 x tensor 2
    batch: P('fsdp')

    Args:
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s; a leaf that is no array is left where it is.
      mesh: a `jax.sharding.Mesh`, of any axis types; an abstract one to plan with.
      rules: `{selector: spec}`, tried in order, as those of a partition; the first that matches takes a leaf. A spec is
        a `jax.P(...)` of mesh axes, `P()` for all of it on every device, or `ft.largest("fsdp")`.
      batch: the spec of batches, `P("data")`, or `{name: spec}` for batches that are dicts. Of an array with fewer
        dimensions its beginning counts.
      zero: an axis, or several, that cut optimizer state, sums of gradients, updates and averages further than their
        parameter, in its largest dimension that is left and divides (ZeRO-1 and 2). The table names what it can't cut.
      memory: `{part or selector: kind}`, of "pinned_host" and the like: where optimizer state lies between two steps.

    Raises:
      LayoutError: a rule takes no leaf, or a leaf has no rule; an axis that the mesh has not, or is named twice; a
        dimension that an axis does not divide; a spec of more dimensions than a leaf; a `zero` that cuts nothing.
    """
    _check_rules(rules, mesh)
    flat = {path: leaf for path, leaf in flatten(params).items() if is_array(leaf)}
    names = {_name(selector): selector for selector in rules}
    try:
        owner = owners(params, names)
    except PartitionError as error:
        raise LayoutError(str(error)) from None
    if uncovered := [path for path in flat if path not in owner]:
        raise LayoutError(
            f"no rule takes {listed(uncovered)}: add one, or ...: P() for all that is left on every device,"
            ' ...: ft.largest("fsdp") to cut it'
        )
    shapes = {path: _shape_of(leaf) for path, leaf in flat.items()}
    by_name = {_name(selector): rule for selector, rule in rules.items()}
    specs = {path: spec_of(by_name[owner[path]], path, of.shape, mesh, owner[path]) for path, of in shapes.items()}
    found = Layout(
        mesh=mesh,
        shapes=shapes,
        specs=specs,
        rules=tuple(
            Rule(name, written(rule), tuple(path for path in flat if owner[path] == name))
            for name, rule in by_name.items()
        ),
        batch_spec=_checked_batch(batch, mesh),
        zero=axes_of(zero),
        memory=_checked_memory(memory or {}),
    )
    check_axes(mesh, found.zero, "zero=")
    if found.zero and all(found.of_state(path).spec == spec for path, spec in specs.items()):
        raise LayoutError(
            f"zero={zero!r} cuts nothing: no leaf has a dimension left that {size_of(mesh, found.zero)} divides, or the"
            " rules cut all of them over it already: leave it out"
        )
    return found


def _check_rules(rules: Any, mesh: Any) -> None:
    if not isinstance(rules, Mapping) or not rules:
        raise LayoutError(f'rules are a dict of specs by selector, {{"**/kernel": P("fsdp"), ...: P()}}, not {rules!r}')
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        shown = type(mesh).__name__ if flatten(mesh) else repr(mesh)
        raise LayoutError(
            f"{shown} is no mesh: write ft.layout(params, mesh, rules), with mesh = jax.make_mesh((8,), ('data',))"
        )
    for selector, rule in rules.items():
        if isinstance(rule, Largest):
            check_axes(mesh, rule.axes, f"rule {_name(selector)}")
        elif isinstance(rule, jax.P):
            _check_spec(rule, mesh, f"rule {_name(selector)}")
        else:
            raise LayoutError(
                f"rule {_name(selector)}: {rule!r} is no spec: write P('fsdp', None), P() for all on every device, or"
                " ft.largest('fsdp')"
            )


def _check_spec(spec: jax.P, mesh: Any, where: str) -> None:
    if jax.P.UNCONSTRAINED in spec:
        raise LayoutError(f"{where}: a layout says where things lie: write None in the place of P.UNCONSTRAINED")
    check_axes(mesh, axes_in(spec), where)


def _checked_batch(batch: Any, mesh: Any) -> BatchSpec:
    specs = jax.tree.leaves(batch, is_leaf=lambda node: isinstance(node, jax.P))
    if not specs or not all(isinstance(spec, jax.P) for spec in specs):
        raise LayoutError(f'batch={batch!r}: write P("data"), or a spec by name, {{"image": P("data")}}')
    for spec in specs:
        _check_spec(spec, mesh, "batch=")
    found: BatchSpec = batch
    return found


def _checked_memory(memory: Mapping[Any, str]) -> dict[Any, str]:
    for key, kind in memory.items():
        if kind not in KINDS:
            raise LayoutError(f"memory={{{key!r}: {kind!r}}}: write one of {listed(KINDS)}")
    return dict(memory)


def _name(selector: Selector) -> str:
    return selector if isinstance(selector, str) else describe(selector)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(getattr(leaf, "shape", ())), getattr(leaf, "dtype", jax.numpy.result_type(leaf)))
