"""The state of a run: how it starts, and how it is laid out over devices."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import UpdateError
from functrain.gradients.accumulation import Accumulated
from functrain.optim.optimizer import Optimizer
from functrain.tree.arrays import as_array, committed_sharding, replicated_over
from functrain.tree.paths import PyTree, flatten
from functrain.tree.text import listed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """All that a resumed run needs; made by `update.init`, a pytree.

    Attributes:
      params: the whole tree.
      opt_state: `{part: state}` of the trained parts.
      model_state: what the loss function returns as such; None if it has none.
      key: the run's key; it never changes. The key of a batch follows from it and from `batches`.
      step: finished windows, skipped ones included; a 0-d int32 of the host.
      batches: batches seen; a 0-d int32 of the host.
      pending: batches in the unfinished window; a 0-d int32 of the host.
      window: the weighted sums of gradients and metrics of the unfinished window; None where none is pending.
      loss_scale: the state of the dynamic loss scale; None without one.
      configuration: what the update is made of, as JSON: the parts, their paths and optimizers, the accumulation, the
        phases. Static; a checkpoint is checked against it.
    """

    params: PyTree
    opt_state: dict[str, Any]
    model_state: Any
    key: Any
    step: Any
    batches: Any
    pending: Any
    window: Accumulated | None
    loss_scale: Any
    configuration: str = dataclasses.field(default="{}", metadata={"static": True})

    def __getattr__(self, name: str) -> Any:
        # Between two updates nobody looks at most fields, and flattening and unflattening them would cost more than
        # many a step: an update hands on their leaves, and a field is put together when it is first asked for.
        if name not in LASTING or "_leaves" not in self.__dict__:
            raise AttributeError(f"TrainState has no attribute {name!r}")
        value = self.__dict__["_form"].field(name, self.__dict__["_leaves"])
        object.__setattr__(self, name, value)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainState":
        # Leaf by leaf: the deepcopy of a Flax state takes its Variables away.
        copied = [jnp.array(x, copy=True) if isinstance(x, jax.Array) else copy.copy(x) for x in jax.tree.leaves(self)]
        state: TrainState = jax.tree.unflatten(jax.tree.structure(self), copied)
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


LASTING = ("params", "opt_state", "model_state", "loss_scale")


def initial_state(
    optim: Optimizer, params: PyTree, model_state: Any, key: Any, loss_scale: Any, configuration: str, *, copy: bool
) -> TrainState:
    """A state whose every buffer is its own, so that all of it can be donated."""
    arrays = jax.Array | np.ndarray | np.generic | int | float | complex
    if bad := [path for path, leaf in flatten(params).items() if not isinstance(leaf, arrays)]:
        raise UpdateError(
            f"params hold {listed(bad)}, which is no array: a TrainState takes arrays only; split the rest off first,"
            " e.g. with eqx.partition(model, eqx.is_array), and put it back in the loss function"
        )
    users = {id(leaf) for leaf in jax.tree.leaves((params, model_state))} if copy else set()
    params, model_state = jax.tree.map(as_array, (params, model_state))
    counter = np.zeros((), np.int32)
    opt_state = optim.init(params)
    state = TrainState(params, opt_state, model_state, key, counter, counter, counter, None, loss_scale, configuration)

    def own(leaf: Any) -> Any:
        shared = id(leaf) in users
        users.add(id(leaf))
        return jnp.array(leaf, copy=True) if shared else leaf

    replicated = replicated_over(params)

    def commit(leaf: Any) -> Any:
        return leaf if replicated is None or committed_sharding(leaf) else jax.device_put(leaf, replicated)

    on_device = {
        field: jax.tree.map(lambda leaf: commit(own(leaf)), getattr(state, field))
        for field in ("params", "opt_state", "model_state", "key", "loss_scale")
    }
    return dataclasses.replace(state, **on_device)


def abstract_state(
    optim: Optimizer, params: PyTree, model_state: Any, key: Any, loss_scale: Callable[[], Any], configuration: str
) -> TrainState:
    """The shapes, dtypes and shardings of an initial state, from arrays or shapes, without computing anything."""
    shapes = jax.eval_shape(
        lambda params, model_state, key: (params, optim.init(params), model_state, key, loss_scale()),
        params, model_state, key,
    )  # fmt: skip
    replicated = replicated_over(params)
    if replicated is not None:
        laid_out, *rest = jax.tree.map(lambda leaf: committed_sharding(leaf) or replicated, (params, model_state, key))
        shardings = (laid_out, optim.shardings(laid_out), *rest, jax.tree.map(lambda leaf: replicated, shapes[4]))
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    params, opt_state, model_state, key, scale = shapes
    return TrainState(params, opt_state, model_state, key, counter, counter, counter, None, scale, configuration)


def lasting(state: TrainState) -> list[Any]:
    """The lasting fields of a state, in order."""
    return [getattr(state, name) for name in LASTING]


class Form:
    """The tree types and shardings of the lasting fields of a state; hashed once, as every call looks at it.

    Attributes:
      leaves: how many leaves the lasting fields have together.
      shardings: of those leaves, where params are laid out over several devices; else None.
    """

    def __init__(self, state: TrainState):
        leaves, treedefs = zip(*map(jax.tree.flatten, lasting(state)), strict=True)
        ends = [*itertools.accumulate(map(len, leaves))]
        self._fields = dict(zip(LASTING, zip([0, *ends], ends, treedefs, strict=False), strict=True))
        self.leaves = ends[-1]
        self.shardings: list[Any] | None = None
        if replicated_over(state.params) is not None:
            self.shardings = [leaf.sharding for leaf in itertools.chain(*leaves)]
        self._values = (treedefs, tuple(self.shardings or ()))
        self._hash = hash(self._values)

    def field(self, name: str, leaves: Sequence[Any]) -> Any:
        """A lasting field, or a tree like it, from the leaves of all."""
        begin, end, treedef = self._fields[name]
        return jax.tree.unflatten(treedef, leaves[begin:end])

    def fields(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """All lasting fields, or trees like them."""
        return {name: self.field(name, leaves) for name in LASTING}

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Form) and self._values == other._values)


def taken_apart(state: TrainState) -> tuple[Form, list[Any]]:
    """The form of a state and the leaves of its lasting fields; found once and kept with the state."""
    if "_form" not in state.__dict__:
        object.__setattr__(state, "_form", Form(state))
        object.__setattr__(state, "_leaves", jax.tree.leaves(lasting(state)))
    return state.__dict__["_form"], state.__dict__["_leaves"]


def put_together(form: Form, leaves: list[Any], **others: Any) -> TrainState:
    """A state whose lasting fields are unflattened when they are first looked at, if ever."""
    state = object.__new__(TrainState)
    state.__dict__.update(others, _form=form, _leaves=leaves)
    return state
