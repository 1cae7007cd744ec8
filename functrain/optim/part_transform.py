"""The transform of one part: it sees the model's own tree, and its state crosses calls flat."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from functrain.errors import OptimizerError, PartitionError
from functrain.mesh.constraints import brought, in_auto_axes
from functrain.optim.checks import check_one_of_each, check_shapes
from functrain.optim.declared import KNOWN, accepted, declared
from functrain.optim.layouts import on_device
from functrain.optim.own_tree import OwnTree
from functrain.optim.state_form import StateForm
from functrain.optim.states import in_one_dtype, laid_out, like_before, state_shardings
from functrain.tree.arrays import as_array, conjugate
from functrain.tree.partition import Partition
from functrain.tree.paths import Flat, PyTree
from functrain.tree.text import around_first_difference


@dataclasses.dataclass(frozen=True, eq=False)
class PartTransform:
    """An optax transform and the part that it is of. What goes in and comes out is flat, `{path: leaf}`.

    Attributes:
      parts: the partition.
      part: of it.
      tx: the transform.
      places: where the state of each leaf lies, by path; None for where its parameter does.
    """

    parts: Partition
    part: str
    tx: optax.GradientTransformation
    places: Mapping[str, Any] | None = None

    @functools.cached_property
    def tree(self) -> OwnTree:
        """The model's own tree."""
        return OwnTree(self.parts, self.part)

    @functools.cached_property
    def form(self) -> StateForm:
        """The forms of the state.

        Raises:
          PartitionError: a mask of the transform takes no leaf of the part.
        """
        try:
            return StateForm(self.tx.init, self.tree, self.parts.shapes(self.part))
        except PartitionError as error:
            raise PartitionError(f"the transform of part {self.part!r}: {error}") from None

    def init(self, params: Mapping[str, Any]) -> Any:
        """The initial state, laid out as the params are.

        Raises:
          OptimizerError: it has two hyperparameters of one name.
        """
        form = self.form  # Before init, as it says which part is at fault.

        def initial(params: Mapping[str, Any]) -> Any:
            return form.to_cross(jax.tree.map(as_array, self.tx.init(self.tree.nested(params))))

        check_one_of_each(self.part, form.shapes)
        if self.places is None:
            return laid_out(initial(params), params)
        # Compiled, as nothing of it may ever lie whole on a device.
        return jax.jit(initial, out_shardings=self.shardings(self.places))(dict(params))

    def shardings(self, places: Mapping[str, Any]) -> Any:
        """The shardings of the state, from those of what is shaped like the parameters."""
        return state_shardings(self.form.shapes, self.parts.shapes(self.part), places)

    def arguments(self, extra: Mapping[str, Any], grads: Mapping[str, Any], params: PyTree) -> dict[str, Any]:
        """Of optax's extra arguments those that the transform declares, as it is given them.

        Args:
          extra: of whole params, or by part. From `value_fn` follow `grad_fn`, which optax wants conjugated, and
            `obj_fn`, which is Sophia's name of it.
          grads: the gradients as they were given; `grad` is JAX's own, without the conjugate.
          params: the whole params.
        """
        given = {name: self.tree.argument(value, params) for name, value in extra.items()}
        if "grad" in self._declared:
            given.setdefault("grad", conjugate(self.tree.nested(grads)))
        if (value_fn := given.get("value_fn")) is not None:
            of_value = jax.grad(value_fn)
            given.setdefault("obj_fn", value_fn)
            given.setdefault("grad_fn", jax.tree_util.Partial(lambda tree, *_: conjugate(of_value(tree))))
        # Who does not say what it takes of a loss is given all of it; a step is nothing of a loss.
        unasked = KNOWN - (self._declared if self._declared - {"step"} else self._declared | extra.keys())
        return accepted(self.tx, {name: value for name, value in given.items() if name not in unasked})

    @functools.cached_property
    def _declared(self) -> frozenset[str]:
        """What it asks for; nothing where it takes anything, and does not say what."""
        return declared(self.tx)

    @property
    def _calls_the_loss(self) -> bool:
        """Whether it asks for the loss as a function, which is written for the mesh axes of the user's program."""
        return not self._declared.isdisjoint(("value_fn", "grad_fn", "obj_fn"))

    def update(self, grads: Mapping[str, Any], state: Any, params: Mapping[str, Any], **extra: Any) -> tuple[Flat, Any]:
        """The updates and the next state, of unchanged structure and dtypes.

        Args:
          grads: the gradients.
          state: the state that crosses calls.
          params: the parameters.
          **extra: from `arguments`.

        Raises:
          OptimizerError: the transform returns updates or a state of another structure or shapes.
        """
        if self.places is not None:
            state = brought(state, self.shardings(on_device(self.places)))
        wide_grads, wide_state, wide_params = in_one_dtype(grads, state, params)
        gradients = self.tree.nested(wide_grads)
        if self.form.looks_ahead:
            gradients = gradients.fast
        own_state, own_params, tx = self.form.to_own(wide_state), self.tree.nested(wide_params), self.tx
        if self._calls_the_loss:
            returned, new = tx.update(gradients, own_state, own_params, **extra)
        else:
            args = (gradients, own_state, own_params)
            returned, new = in_auto_axes(tx.update, args, (own_params, own_state), **extra)
        updates = self._flat_updates(returned)
        check_shapes(updates, params, f"the updates of part {self.part!r}")
        after = like_before(new, state, self.form, f"part {self.part!r}: the state that its transform returns")
        return updates, after if self.places is None else brought(after, self.shardings(self.places))

    def _flat_updates(self, returned: PyTree) -> Flat:
        try:
            return self.tree.flat(returned)
        except ValueError:
            given, expected = around_first_difference(jax.tree.structure(returned), jax.tree.structure(self.tree.named))
            raise OptimizerError(
                f"part {self.part!r}: its transform returned updates of another structure than the part's params:"
                f" {given} where {expected} was expected; return a tree like the gradients that it is given"
            ) from None
