"""What each value of a jaxpr depends on: a walk over the program, not over its numbers."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, Literal

# What returns an operand as it is, elsewhere or in part.
_MOVES = {
    "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims", "gather", "rev",
    "reshape", "slice", "split", "squeeze", "transpose",
}  # fmt: skip


class Marks(NamedTuple):
    """What a value depends on, as sets of inputs: bit i for the input with the number i.

    Attributes:
      uses: the inputs of which it is computed in any way.
      tangents: the tangent inputs of which it is a linear function.
      free: those of `tangents` that come to it also on a way that no gate multiplies.
      gates: the gates of which it is a copy, a part or a reshaped form.
    """

    uses: int = 0
    tangents: int = 0
    free: int = 0
    gates: int = 0


def flow(jaxpr: Jaxpr, inputs: Sequence[Marks]) -> list[Marks]:
    """The marks of a jaxpr's outputs, given those of its inputs.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x, y, dx: (x * y, y.reshape(1) * dx))(1.0, 2.0, 3.0).jaxpr
    >>> x, y, dx = Marks(uses=1), Marks(uses=2, gates=2), Marks(tangents=4, free=4)
    >>> flow(jaxpr, [x, y, dx])
    [Marks(uses=3, tangents=0, free=0, gates=0), Marks(uses=2, tangents=4, free=0, gates=0)]
    """
    marks: dict[Any, Marks] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> Marks:
        return Marks() if isinstance(atom, Literal) else marks.get(atom, Marks())

    for eqn in jaxpr.eqns:
        outputs = _through(eqn, [of(atom) for atom in eqn.invars])
        marks.update(zip(eqn.outvars, outputs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _through(eqn: Any, given: list[Marks]) -> list[Marks]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        fixed, carries = of_scan(params)
        carried, outputs = _looped(params["jaxpr"].jaxpr, given[:fixed], given[fixed:], carries)
        return outputs if params["length"] else [*carried, *outputs[len(carried) :]]
    if name == "while":
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        consts, carried = given[of_cond : of_cond + of_body], given[of_cond + of_body :]
        after, _ = _looped(params["body_jaxpr"].jaxpr, consts, carried, len(carried))
        (goes_on,) = flow(params["cond_jaxpr"].jaxpr, [*given[:of_cond], *after])
        return [mark._replace(uses=mark.uses | goes_on.uses) for mark in after]
    if name == "cond":
        branches = [flow(branch.jaxpr, given[1:]) for branch in params["branches"]]
        taken = [functools.reduce(_either, marks) for marks in zip(*branches, strict=True)]
        return [mark._replace(uses=mark.uses | given[0].uses) for mark in taken]
    # A closed jaxpr is a type of its own, with the jaxpr in it, or none, as JAX 0.12 has it.
    inner = [each for each in (getattr(value, "jaxpr", value) for value in params.values()) if isinstance(each, Jaxpr)]
    if len(inner) == 1 and len(inner[0].invars) == len(given) and len(inner[0].outvars) == len(eqn.outvars):
        return flow(inner[0], given)
    return [_computed(name, given)] * len(eqn.outvars)


def of_scan(params: Any) -> tuple[int, int]:
    """How many inputs of a scan are fixed, and how many it carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = params["ft_in"].unpack()  # Since JAX 0.12.
    return len(consts), len(carries)


def _looped(body: Jaxpr, fixed: list[Marks], others: list[Marks], carries: int) -> tuple[list[Marks], list[Marks]]:
    """What a loop carries, before its first turn or after any, and what its body returns.

    The body is given the fixed inputs, what it carries, and slices of the other inputs.
    """
    carried, sliced = others[:carries], others[carries:]
    while True:
        outputs = flow(body, [*fixed, *carried, *sliced])
        after = [_either(before, now) for before, now in zip(carried, outputs[:carries], strict=True)]
        if after == carried:
            return carried, outputs
        carried = after


def _computed(name: str, given: list[Marks]) -> Marks:
    """The marks of what a primitive computes, of all its operands."""
    every = functools.reduce(_either, given, Marks())
    gates = given[0].gates if name in _MOVES and given else 0
    is_gated = every.tangents and any(mark.gates for mark in given)
    return Marks(every.uses, every.tangents, 0 if is_gated else every.free, gates)


def _either(one: Marks, other: Marks) -> Marks:
    return Marks(one.uses | other.uses, one.tangents | other.tangents, one.free | other.free, one.gates & other.gates)
