"""A transform that works matrix by matrix, run once for all matrices that it treats alike, spread over devices."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from functrain.errors import OptimizerError
from functrain.mesh.constraints import in_auto_axes
from functrain.mesh.layout import Layout
from functrain.mesh.specs import Axes, axes_of, check_axes, size_of
from functrain.optim.by_leaf import ByLeaf
from functrain.optim.declared import accepted
from functrain.tree.arrays import is_array
from functrain.tree.paths import flatten, structure_difference


def stacked(
    tx: optax.GradientTransformation, layout: Layout | None = None, over: Axes | None = None
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform once for all matrices that it treats alike, as one stack, which a layout spreads over devices.

    >>> tx = stacked(optax.contrib.muon(0.1))
    >>> params = {"a": jnp.eye(4), "b": 2 * jnp.eye(4), "bias": jnp.ones(4)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> expected, _ = optax.contrib.muon(0.1).update(params, tx.init(params), params)
    >>> bool(jnp.allclose(updates["a"], expected["a"], atol=1e-6))
    True

    Muon and Shampoo make of each matrix another one by many products, and every device of a data parallel run makes all
    of them. Here each makes its share: leaves of two or more dimensions, of one shape and dtype, for which the
    transform computes the same, are stacked; the stack is cut over the axes, and what comes of it is brought back.
    Masks and labels hold: leaves that they tell apart are not stacked with each other. The state is the transform's
    own, so that checkpoints, `Optimizer.adopt` and the layouts of states know nothing of it.

    The price: the gradients and moments of stacked leaves go from their layout to that of the stack and back in each
    step, and a stack of fewer matrices than devices is filled up. For a transform that works number by number, such as
    Adam, it buys nothing. Results differ from those of the transform alone by rounding.

    Args:
      tx: an optax transform that works leaf by leaf, `optax.contrib.muon(0.02)` or `ft.with_lr(optax.contrib.muon,
        0.02)`.
      layout: from `ft.layout`; without one nothing is spread, and the program is smaller and compiles faster.
      over: the mesh axis, or a tuple of axes, that stacks are cut over; by default all of the mesh.

    Raises:
      OptimizerError: `tx` is no transform, `over` is given without a layout; and from an update, what a leaf is given
        follows from other leaves, as in `optax.clip_by_global_norm`.
      LayoutError: an axis that the mesh has not.
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise OptimizerError(f"ft.stacked({tx!r}): give an optax transform, ft.stacked(optax.contrib.muon(0.02))")
    if layout is None and over is not None:
        raise OptimizerError(
            f"ft.stacked(tx, over={over!r}) has no mesh to spread over: ft.stacked(tx, layout, {over!r})"
        )
    spread = None
    if layout is not None:
        axes = tuple(layout.mesh.shape) if over is None else axes_of(over)
        check_axes(layout.mesh, axes, "ft.stacked(..., over=)")
        spread = _Spread(layout, axes)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        def run(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
            return _updated(tx, spread, updates, state, params, extra)

        found: tuple[Any, Any] = in_auto_axes(run, (updates, state, params), (updates, state), **accepted(tx, extra))
        return found

    return optax.GradientTransformationExtraArgs(tx.init, update)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """How stacks lie on a mesh, and what was stacked."""

    layout: Layout
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        return size_of(self.layout.mesh, self.axes)

    def cut(self, stack: jax.Array, path: str, *, as_param: bool) -> jax.Array:
        """A stack of leaves that lie as they do outside, with its share of them for each device."""
        return self._through(stack, self._way(stack, path, as_param))

    def back(self, stack: jax.Array, path: str, *, as_param: bool) -> jax.Array:
        """The inverse of `cut`."""
        return self._through(stack, self._way(stack, path, as_param)[::-1])

    def _way(self, stack: jax.Array, path: str, as_param: bool) -> list[jax.P]:
        """The specs from that of leaves as they lie outside, as parameters or as what is kept beside one, to the cut.

        Between them one mesh axis moves at a time: XLA copies everything to every device for two at once.
        """
        sharding = self.layout.sharding(path) if as_param else self.layout.of_state(path)
        spec = sharding.spec if stack.shape[1:] == self.layout.shapes[path].shape else ()
        own = [axes_of(entry) for entry in spec]
        moves = any(axis in self.axes for entry in own for axis in entry)
        specs = [jax.P(None, *spec)]
        for end in range(1 if moves else len(self.axes), len(self.axes) + 1):
            taken = self.axes[:end]
            left = [tuple(axis for axis in entry if axis not in taken) for entry in own] if moves else []
            specs.append(jax.P(taken, *(entry or None for entry in left)))
        return specs

    def of(self, path: str) -> Hashable:
        """What is equal for leaves that lie alike."""
        if path not in self.layout.specs:
            raise OptimizerError(
                f"ft.stacked: {path!r} is no leaf of its layout: give the layout of the params that are trained,"
                " ft.stacked(tx, ft.layout(params, mesh, rules))"
            )
        return self.layout.sharding(path).spec, self.layout.of_state(path).spec

    def _through(self, stack: jax.Array, specs: Sequence[jax.P]) -> jax.Array:
        known = jax.typeof(stack).sharding.mesh  # Of a mesh that is set its axes are told by type.
        mesh = self.layout.mesh if known.empty else known
        for spec in specs:
            stack = jax.lax.with_sharding_constraint(stack, jax.NamedSharding(mesh, spec))
        return stack


def _updated(
    tx: optax.GradientTransformation,
    spread: _Spread | None,
    updates: Any,
    state: Any,
    params: Any,
    extra: Mapping[str, Any],
) -> tuple[Any, Any]:
    """What the transform's own update returns, stack by stack."""
    leaves, treedef = jax.tree.flatten((updates, state, params, extra))
    numbers = [number for number, leaf in enumerate(leaves) if is_array(leaf)]

    def run(arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        given = jax.tree.unflatten(treedef, [*map(dict(zip(numbers, arrays, strict=True)).get, range(len(leaves)))])
        new, after = tx.update(*given[:3], **given[3])
        for made, like, what in ((new, updates, "updates"), (after, state, "state")):
            if differs := structure_difference(made, like):
                raise OptimizerError(
                    f"ft.stacked: the transform returns {what} of another structure than it is given: the tree"
                    f" {differs}; stack the transform within it"
                )
        return jax.tree.leaves(new), jax.tree.leaves(after)

    paths, inputs = [*flatten(updates)], [leaves[number] for number in numbers]
    program = jax.make_jaxpr(run)(inputs)
    states = len(jax.tree.leaves(state))
    by_leaf = ByLeaf(
        program,
        paths,
        params=range(len(paths) + states, len(paths) + states + len(jax.tree.leaves(params))),
        states=[(len(paths) + i, len(paths) + i) for i in range(states)],
    )
    found = dict(zip(by_leaf.places, by_leaf.of_none(inputs), strict=True))
    for group in _groups(by_leaf, paths, jax.tree.leaves(updates), spread):
        found |= _of_group(by_leaf, group, inputs, paths, spread)
    made = [found[place] for place in range(len(found))]
    new = jax.tree.unflatten(jax.tree.structure(updates), made[: len(paths)])
    return new, jax.tree.unflatten(jax.tree.structure(state), made[len(paths) :])


def _groups(by_leaf: ByLeaf, paths: Sequence[str], grads: Sequence[Any], spread: _Spread | None) -> list[list[int]]:
    """The leaves that are stacked with each other, by number; most others are alone."""
    groups: dict[Hashable, list[int]] = {}
    for number, (path, grad) in enumerate(zip(paths, grads, strict=True)):
        lies = None if spread is None else spread.of(path)
        form = (by_leaf.form(number), lies) if jnp.ndim(grad) > 1 else number
        groups.setdefault(form, []).append(number)
    return [*groups.values()]


def _of_group(
    by_leaf: ByLeaf, group: Sequence[int], inputs: Sequence[Any], paths: Sequence[str], spread: _Spread | None
) -> dict[int, Any]:
    """The outputs of leaves that are computed alike, by place."""
    programs = [by_leaf.leaves[number] for number in group]
    shared, own = by_leaf.given(programs[0].shared, inputs), [by_leaf.given(each.owned, inputs) for each in programs]
    if len(group) == 1:
        outputs = by_leaf.of_leaf(group[0], own[0], shared)
        return dict(zip(programs[0].places, outputs, strict=True))
    path, size = paths[group[0]], 1 if spread is None else spread.size
    padding = -len(group) % size

    def stack(number: int, *leaves: Any) -> jax.Array:
        # Filled up with what is there, as zeros may have no inverse.
        whole = jnp.stack([*leaves, *leaves[-1:] * padding])
        if spread is None:
            return whole
        return spread.cut(whole, path, as_param=number in by_leaf.params)

    stacks = [stack(*each) for each in zip(programs[0].owned, *own, strict=True)]
    run: Any = jax.vmap(lambda own: by_leaf.of_leaf(group[0], own, shared), axis_size=len(group) + padding)
    outputs = run(stacks)
    if spread is not None:
        outputs = [
            spread.back(each, path, as_param=place in by_leaf.updates)
            for place, each in zip(programs[0].places, outputs, strict=True)
        ]
    return {
        place: each[number]
        for number, program in enumerate(programs)
        for place, each in zip(program.places, outputs, strict=True)
    }
