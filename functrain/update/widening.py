"""Where the 32 bits begin that the first matrix product of a traced program computes with."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from functrain.tree.places import Level, Place, place_of

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
_CONSTANT = "a constant"
_LATE = 1 << 62


class Beginning(NamedTuple):
    """Of what a value of 32 bits is computed.

    Attributes:
      order: the number of the first operation that has 32 bits, in the order of the program.
      levels: where that operation stands.
      made_of: the dtypes that it makes them of; empty where it was given 32 bits, or nothing.
      arguments: the arguments of the program that are in it.
    """

    order: int = _LATE
    levels: tuple[Level, ...] = ()
    made_of: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        """The user's line of that operation."""
        return place_of(self.levels)


def beginning_of_first_product(jaxpr: Any, names: Sequence[str]) -> Beginning:
    """Where the 32 bits of the operands of the first product begin.

    >>> import jax
    >>> table, ids = jnp.ones((3, 2), jnp.bfloat16), jnp.arange(3)
    >>> traced = jax.make_jaxpr(lambda table, ids: table.astype(jnp.float32)[ids] @ jnp.ones((2, 2)))(table, ids)
    >>> beginning_of_first_product(traced, ["table", "ids"]).made_of
    ('bfloat16',)

    Args:
      jaxpr: a traced program that has a product.
      names: what its arguments are called.
    """
    walk = _Walk()
    arguments = [Beginning(arguments=(name,)) for name in names]
    walk.through(jaxpr.jaxpr, arguments, (Level.of(jaxpr.jaxpr),))
    return walk.found or Beginning()


def advice(beginning: Beginning) -> str:
    """Where 32 bits begin, and what to write there."""
    told = []
    if beginning.place.file:
        file, line, function = beginning.place
        made = f", which makes them of {' and '.join(beginning.made_of)}" if beginning.made_of else ""
        told.append(f"they begin at {file}:{line}, in {function}{made}")
    if any("/flax/" in frame.file_name for level in beginning.levels for frame in level.inside):
        told.append("give the layer of Flax there its dtype, as nnx.Embed(..., dtype=jnp.bfloat16)")
    elif beginning.made_of:
        told.append("cast to 16 bits there")
    for field, what in (
        ("batch", "let the batch be cast, not cast_batch=False"),
        ("model_state", "cast model_state in the loss function"),
        ("params", "give their part a compute_dtype"),
        (_CONSTANT, "cast constants in the loss function"),
    ):
        if any(field in name.partition("'")[0] for name in beginning.arguments):
            told.append(what)
    return "; ".join(told)


class _Walk:
    """A walk through a program up to its first product."""

    def __init__(self) -> None:
        self.found: Beginning | None = None
        self._count = 0

    def through(self, jaxpr: Jaxpr, given: Sequence[Beginning], levels: tuple[Level, ...]) -> list[Beginning]:
        """Where what a jaxpr returns begins, given that of its arguments."""
        begins: dict[Any, Beginning] = dict(zip(jaxpr.invars, given, strict=True))
        begins |= dict.fromkeys(jaxpr.constvars, Beginning(arguments=(_CONSTANT,)))

        def of(atom: Any) -> Beginning:
            if isinstance(atom, Literal):
                return Beginning(arguments=(_CONSTANT,) if jnp.ndim(atom.val) else ())
            return begins[atom] if _is_wide(atom) else Beginning()

        for eqn in jaxpr.eqns:
            operands = [of(atom) for atom in eqn.invars]
            if eqn.primitive.name in PRODUCTS:
                wide = [each for each, atom in zip(operands, eqn.invars, strict=True) if _is_wide(atom)]
                self.found = self._entered(_merged(wide), eqn, levels)
            else:
                begins |= zip(eqn.outvars, self._after(eqn, operands, levels), strict=True)
            if self.found is not None:
                return [Beginning()] * len(jaxpr.outvars)
        return [of(atom) for atom in jaxpr.outvars]

    def _after(self, eqn: Any, operands: list[Beginning], levels: tuple[Level, ...]) -> list[Beginning]:
        self._count += 1
        name, params = eqn.primitive.name, eqn.params
        if name == "cond":
            inner, operands = [branch.jaxpr for branch in params["branches"]], operands[1:]
        elif name == "while":
            inner, operands = [params["body_jaxpr"].jaxpr], operands[params["cond_nconsts"] :]
        else:
            values = (getattr(value, "jaxpr", value) for value in params.values())
            inner = [each for each in values if isinstance(each, Jaxpr)][:1]
        at = (*levels[:-1], levels[-1].at(eqn)) if inner else ()
        taken = [
            self.through(each, operands, (*at, Level.of(each)))
            for each in inner
            if len(each.invars) == len(operands) and len(each.outvars) == len(eqn.outvars)
        ]
        if taken:
            return [_merged(each) for each in zip(*taken, strict=True)]
        return [self._computed(eqn, operands, levels)] * len(eqn.outvars)

    def _computed(self, eqn: Any, operands: list[Beginning], levels: tuple[Level, ...]) -> Beginning:
        if not any(map(_is_wide, eqn.outvars)):
            return Beginning()
        wide = [each for each, atom in zip(operands, eqn.invars, strict=True) if _is_wide(atom)]
        if wide:
            return self._entered(_merged(wide), eqn, levels)
        made_of = dict.fromkeys(str(atom.aval.dtype) for atom in eqn.invars if hasattr(atom.aval, "dtype"))
        return Beginning(self._count, (*levels[:-1], levels[-1].at(eqn)), tuple(made_of))

    def _entered(self, merged: Beginning, eqn: Any, levels: tuple[Level, ...]) -> Beginning:
        """Where it is computed of arguments alone, it begins here."""
        if merged.levels:
            return merged
        return merged._replace(order=self._count, levels=(*levels[:-1], levels[-1].at(eqn)))


def _merged(several: Iterable[Beginning]) -> Beginning:
    """The first of several beginnings, with the arguments of all."""
    several = [*several]
    first = min(several, key=lambda each: each.order, default=Beginning())
    return first._replace(arguments=tuple(dict.fromkeys(name for each in several for name in each.arguments)))


def _is_wide(atom: Any) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
