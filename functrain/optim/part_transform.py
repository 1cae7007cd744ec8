"""The transform of one part: it sees the model's own tree, and its state crosses calls flat."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from functrain.errors import OptimizerError, PartitionError
from functrain.optim.checks import check_one_rate, check_shapes
from functrain.optim.declared import KNOWN, accepted, declared
from functrain.optim.own_tree import OwnTree
from functrain.optim.state_form import StateForm
from functrain.optim.states import in_one_dtype, laid_out, like_before
from functrain.tree.arrays import as_array, conjugate
from functrain.tree.partition import Partition
from functrain.tree.paths import Flat, PyTree
from functrain.tree.text import around_first_difference


@dataclasses.dataclass(frozen=True, eq=False)
class PartTransform:
    """An optax transform and the part that it is of. What goes in and comes out is flat, `{path: leaf}`."""

    parts: Partition
    part: str
    tx: optax.GradientTransformation

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
          OptimizerError: it has two `with_lr`.
        """
        form = self.form  # Before init, as it says which part is at fault.
        state = form.to_cross(jax.tree.map(as_array, self.tx.init(self.tree.nested(params))))
        check_one_rate(self.part, state)
        return laid_out(state, params)

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
        wide_grads, wide_state, wide_params = in_one_dtype(grads, state, params)
        gradients = self.tree.nested(wide_grads)
        if self.form.looks_ahead:
            gradients = gradients.fast
        tx: Any = self.tx
        returned, new = tx.update(gradients, self.form.to_own(wide_state), self.tree.nested(wide_params), **extra)
        updates = self._flat_updates(returned)
        check_shapes(updates, params, f"the updates of part {self.part!r}")
        return updates, like_before(new, state, self.form, f"part {self.part!r}: the state that its transform returns")

    def _flat_updates(self, returned: PyTree) -> Flat:
        try:
            return self.tree.flat(returned)
        except ValueError:
            given, expected = around_first_difference(jax.tree.structure(returned), jax.tree.structure(self.tree.named))
            raise OptimizerError(
                f"part {self.part!r}: its transform returned updates of another structure than the part's params:"
                f" {given} where {expected} was expected; return a tree like the gradients that it is given"
            ) from None
