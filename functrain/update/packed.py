"""What keeps the leaves of a state together from one call to the next, for speed.

Between two updates nobody looks at most fields of a state, and to flatten and unflatten them at every call would cost
more than many a step. So a call hands on the leaves of these fields as one list, with their `Form`, and a field is put
together when it is first asked for, if ever.
"""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from functrain.tree.arrays import replicated_over
from functrain.update.consumed import check_not_deleted, is_deleted

S = TypeVar("S", bound="Packable")


class Packable:
    """A frozen dataclass, registered as a pytree, some of whose fields may be held as leaves alone.

    Attributes:
      packed: the names of these fields; `params` is one of them.
    """

    packed: ClassVar[tuple[str, ...]]

    def __getattr__(self, name: str) -> Any:
        if name not in type(self).packed or "_leaves" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = self.__dict__["_form"].field(name, self.__dict__["_leaves"])
        if "_consumed" in self.__dict__:
            check_not_deleted(jax.tree.leaves(value), name)
        object.__setattr__(self, name, value)
        return value

    def __repr__(self) -> str:
        if "_consumed" in self.__dict__ and is_deleted(self.__dict__["_leaves"]):
            return f"<a {type(self).__name__} that was consumed; the call returned the one to go on from>"
        values = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(values)})"

    def __deepcopy__(self: S, memo: dict[int, Any]) -> S:
        # Leaf by leaf: the deepcopy of a Flax state takes its Variables away.
        copied = [jnp.array(x, copy=True) if isinstance(x, jax.Array) else copy.copy(x) for x in jax.tree.leaves(self)]
        state: S = jax.tree.unflatten(jax.tree.structure(self), copied)
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


class Form:
    """The tree types and shardings of the packed fields of a state; hashed once, as every call looks at it.

    Attributes:
      leaves: how many leaves these fields have together.
      shardings: of those leaves, where params are laid out over several devices; else None.
    """

    def __init__(self, state: Packable):
        names = type(state).packed
        leaves, treedefs = zip(*(jax.tree.flatten(getattr(state, name)) for name in names), strict=True)
        ends = [*itertools.accumulate(map(len, leaves))]
        self._fields = dict(zip(names, zip([0, *ends], ends, treedefs, strict=False), strict=True))
        self.leaves = ends[-1]
        self.shardings: list[Any] | None = None
        if replicated_over(state.params) is not None:
            self.shardings = [leaf.sharding for leaf in itertools.chain(*leaves)]
        self._values = (treedefs, tuple(self.shardings or ()))
        self._hash = hash(self._values)

    def field(self, name: str, leaves: Sequence[Any]) -> Any:
        """A packed field, or a tree like it, from the leaves of all."""
        begin, end, treedef = self._fields[name]
        return jax.tree.unflatten(treedef, leaves[begin:end])

    def fields(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """All packed fields, or trees like them."""
        return {name: self.field(name, leaves) for name in self._fields}

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Form) and self._values == other._values)


def pack(state: Packable) -> tuple[Form, list[Any]]:
    """The form of a state and the leaves of its packed fields; found once and kept with the state."""
    if "_form" not in state.__dict__:
        object.__setattr__(state, "_form", Form(state))
        object.__setattr__(state, "_leaves", packed_leaves(state))
    return state.__dict__["_form"], state.__dict__["_leaves"]


def unpack(kind: type[S], form: Form, leaves: list[Any], **others: Any) -> S:
    """The inverse of `pack`: a state whose packed fields are unflattened when they are first looked at."""
    state = object.__new__(kind)
    state.__dict__.update(others, _form=form, _leaves=leaves)
    return state


def consume(state: Packable) -> None:
    """Has the packed fields of a state of which leaves were deleted say so, from here on, where they are asked for."""
    fields = state.__dict__
    fields["_consumed"] = True
    for name in type(state).packed:
        fields.pop(name, None)


def as_it_was(state: S) -> S:
    """A state whose fields can be looked at, for shapes, dtypes and places, even where it was consumed."""
    if "_consumed" not in state.__dict__:
        return state
    twin = object.__new__(type(state))
    twin.__dict__.update({name: value for name, value in state.__dict__.items() if name != "_consumed"})
    return twin


def packed_leaves(state: Packable) -> list[Any]:
    """The leaves of the packed fields, in order."""
    return jax.tree.leaves([getattr(state, name) for name in type(state).packed])
