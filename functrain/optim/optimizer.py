"""One optax transform per part."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from functrain.mesh.constraints import brought
from functrain.optim.adoption import Adoption, adopted_states
from functrain.optim.checks import (
    check_extra_args,
    check_grads,
    check_params,
    check_state,
    check_using,
    checked_settings,
)
from functrain.optim.clipping import checked_norms, clipped
from functrain.optim.layouts import check_devices, with_updates
from functrain.optim.state_access import StateAccess
from functrain.optim.state_form import placeholder_type
from functrain.optim.states import laid_out
from functrain.tree.partition import Split
from functrain.tree.paths import PyTree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Optimizer(StateAccess):
    """One optax transform per part of a partition.

    >>> import jax.numpy as jnp
    >>> from functrain import FROZEN, partition, with_lr
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    >>> parts = partition(params, {"head": "head", "body": ...})
    >>> optim = Optimizer(parts, {"head": with_lr(optax.sgd, 0.5), "body": FROZEN})
    >>> opt_state = optim.init(params)
    >>> params, opt_state = optim.step(params, {"head": {"head": jnp.ones(2)}}, opt_state)
    >>> params["head"].tolist(), params["body"].tolist()
    ([0.5, 0.5], [1.0, 1.0])

    A transform is given the model's own tree, with `optax.MaskedNode()` where leaves of other parts are, as under
    `optax.multi_transform`: so are its masks and callables. `print(optim)` is a table.

    Args:
      parts: the partition.
      transforms: for every part an optax transform, or `FROZEN`.
      clip_norm: the largest norm, a positive float, that the gradients given to one `step` or `update` may have; larger
        ones are scaled down. `{part: norm}` clips these parts, and no others.
      clip_by: of what it is the norm: "all" parts together, the default; each "part", the default for norms by part; or
        each "tensor".
      frozen_until: `{part: step}`, parts that join a run on the way: they make their first update when it has finished
        that many steps, and cost nothing before: no gradient, no program that computes one, no change of their state.
      others: `{name: {part: transform}}`, more transforms of trained parts, each with a state of its own, under
        "part@name": `step(..., using=name)` steps these parts with them, in the place of their own. `ft.Phase(...,
        optim={part: transform})` makes them.
      layout: from `ft.layout`, of the same params: state, gradients, their sums and updates follow their parameter over
        the mesh, and are cut further where its `zero` says so.

    Raises:
      OptimizerError: a part without a transform, a transform without a part, a norm that is none, or a step from which
        no trained part can join.
    """

    def init(self, params: PyTree) -> dict[str, Any]:
        """The optimizer state of every trained part: `{part: state of its transform}`.

        Each is optax's own, but with `{path: leaf}` for each subtree of the model's structure; see `optax_state`.
        Outside of `jit`, moments are laid out as their parameters, and scalars are replicated over their mesh.

        Raises:
          PartitionError: params are not of the partition's structure.
          OptimizerError: a shape is not the partition's, a trained leaf is not floating point, or a part has two
            `with_lr`, or two hyperparameters of one name.
        """
        if isinstance(params, placeholder_type()):  # From optax.tree_map_params(optim, ...).
            return {part: of_part.form.with_placeholder(params) for part, of_part in self._transforms.items()}
        split = self.parts.split(params)
        check_params(self.parts, self.trained, split)
        check_devices(self.layout, split)
        return {name: of_part.init(split[of_part.part]) for name, of_part in self._transforms.items()}

    def update(
        self,
        grads: Mapping[str, Mapping[str, Any]],
        opt_state: Mapping[str, Any],
        params: PyTree,
        *,
        lr: Mapping[str, Any] | None = None,
        set: Mapping[str, Mapping[str, Any]] | None = None,  # noqa: A002
        using: str | None = None,
        **extra: Any,
    ) -> tuple[Split, dict[str, Any]]:
        """The updates that `step` adds to the parameters, in optax's own form.

        Args:
          grads: split gradients of any trained parts, `{part: {path: gradient}}`. A part that is not there is left as
            it is: parameters, decay, moments, counts, schedule.
          opt_state: from `init` or the last step.
          params: the whole tree.
          lr: learning rates of this step alone, by part; parts that make no step now may be named too.
          set: hyperparameters of this step alone, `{part: {name: scalar}}`, of parts made by `with_state`.
          using: a name of `others`, whose transforms step their parts in this step.
          **extra: optax's extra arguments, given to the transforms that declare them: `value=`, the loss, `value_fn=`,
            the loss as a function of whole params, or any other. Of a tree like params, or a split one, a part is given
            its own leaves; a function of whole params is one of the part's leaves to it. `grad` and `grad_fn` follow
            from the gradients and from `value_fn`. `step=`, the number of finished steps of the run, is what
            `with_lr(..., clock="run")` asks for.

        Returns:
          `{part: {path: update}}` of the given parts, and the whole new state, of unchanged structure and dtypes.

        Raises:
          OptimizerError: gradients, `lr` or `set` of an unknown or frozen part; wrong shapes; `lr` for a part without
            `with_lr`, or `set` of what is no state; a state that is not of this optimizer, or that a transform returns
            in another structure.
          PartitionError: gradients that are not of a part's paths, or params not of the partition's structure.
        """
        split = self.parts.split(params)
        check_grads(grads, self.parts, self.trained, split)
        check_state(opt_state, self._structures)
        settings = checked_settings(lr, set, opt_state, self.all_transforms)
        check_extra_args(extra, settings, self.all_transforms)
        check_using(using, self.others)
        if self.places_of_grads is not None:
            grads = {part: brought(dict(flat), self.places_of_grads[part]) for part, flat in grads.items()}
        unclipped = grads
        if self.clip_norm is not None:
            grads = clipped(grads, *checked_norms(self.clip_norm, self.clip_by, self.trained), self.norms)
        updates: Split = {}
        new_state, names = dict(opt_state), self.states_used(using)
        for part, flat in grads.items():
            name = names[part]
            of_part = self._transforms[name]
            given = of_part.arguments(extra, unclipped[part], params) | settings.get(name, {})
            updates[part], new_state[name] = of_part.update(flat, opt_state[name], split[part], **given)
        return updates, new_state

    def step(
        self,
        params: PyTree,
        grads: Mapping[str, Mapping[str, Any]],
        opt_state: Mapping[str, Any],
        *,
        lr: Mapping[str, Any] | None = None,
        set: Mapping[str, Mapping[str, Any]] | None = None,  # noqa: A002
        using: str | None = None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Updates the parameters of the parts whose gradients are given. Arguments and errors as for `update`.

        Returns:
          The whole new params, each leaf of its old dtype, and the new state. A `jit` of one's own over several devices
          may lay out state anew that is not shaped like its parameter; `out_shardings=optim.shardings(...)` keeps it.
        """
        updates, opt_state = self.update(grads, opt_state, params, lr=lr, set=set, using=using, **extra)
        return self.apply_updates(params, updates), opt_state

    def apply_updates(self, params: PyTree, updates: Mapping[str, Mapping[str, Any]]) -> PyTree:
        """The whole params with the updates of some parts added, each leaf of its old dtype."""
        split = self.parts.split(params)
        if self.layout is None:
            new = {part: optax.apply_updates(split[part], dict(updates[part])) for part in updates}
        else:
            new = {part: with_updates(self.layout, split[part], updates[part]) for part in updates}
        return self.parts.merge(new, into=params)

    def adopt(
        self, other: "Optimizer", other_state: Mapping[str, Any], params: PyTree
    ) -> tuple[dict[str, Any], Adoption]:
        """A state for this optimizer with what fits of another one's: a backbone unfrozen, a part split, SGD for Adam.

        >>> import jax.numpy as jnp
        >>> from functrain import FROZEN, partition
        >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
        >>> parts = partition(params, {"head": "head", "body": "body"})
        >>> frozen = Optimizer(parts, {"head": optax.adam(1e-3), "body": FROZEN})
        >>> optim = Optimizer(parts, {"head": optax.adam(1e-3), "body": optax.adam(1e-4)})
        >>> opt_state, report = optim.adopt(frozen, frozen.init(params), params)
        >>> print(report)
        head: carried over from 'head': count (1 leaf), mu (1 leaf), nu (1 leaf)
        body: started anew: count (1 leaf), mu (1 leaf), nu (1 leaf)

        Moments follow their parameter's path, wherever the transform has a field of the same name; counts follow if
        a part comes from a single one; a learning rate is this optimizer's own. All lies as its layout says.

        Args:
          other: the optimizer that the state is of.
          other_state: its state; what is carried over is not copied.
          params: the whole tree.

        Raises:
          OptimizerError: a state that is not of the other optimizer.
          PartitionError: params are not of the partition's structure.
        """
        check_state(other_state, other._structures)
        opt_state, report = adopted_states(self.init(params), other_state, self.parts, other.parts)
        if self.layout is not None:
            return jax.device_put(opt_state, self.shardings(self.layout.shardings(params))), report
        split = self.parts.split(params)
        return {name: laid_out(state, split[self.owners[name]]) for name, state in opt_state.items()}, report
