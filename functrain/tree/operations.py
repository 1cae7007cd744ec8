"""A traced program as operations on numbered values: what is computed of what, and how to compute a part of it."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

_CALLS = ("closed_call", "jit", "pjit")


class Operation(NamedTuple):
    """One operation.

    Attributes:
      eqn: of the jaxpr.
      inputs: the number of a value, or a literal, for each operand.
      outputs: numbers of values.
    """

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class Operations(NamedTuple):
    """A program without calls of other programs, whose inputs are the values 0, 1 and so on.

    Attributes:
      operations: in order.
      outputs: numbers of values, or literals.
      constants: values that the program has, by number.
    """

    operations: list[Operation]
    outputs: list[Any]
    constants: dict[int, Any]


def operations_of(program: ClosedJaxpr) -> Operations:
    """The operations of a program, those of jitted functions that it calls among them.

    >>> import jax
    >>> program = jax.make_jaxpr(lambda x, y: (jax.jit(lambda x: 2.0 * x)(x), y + 1.0))(1.0, 2.0)
    >>> [(each.eqn.primitive.name, each.outputs) for each in operations_of(program).operations]
    [('mul', (2,)), ('add', (3,))]
    """
    operations: list[Operation] = []
    constants: dict[int, Any] = {}
    count = len(program.jaxpr.invars)

    def new() -> int:
        nonlocal count
        count += 1
        return count - 1

    def through(program: Any, inputs: Sequence[Any]) -> list[Any]:
        of_constants = {new(): value for value in getattr(program, "consts", ())}
        constants.update(of_constants)
        jaxpr = getattr(program, "jaxpr", program)  # JAX 0.12 has one type for both.
        numbers = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*of_constants, *inputs), strict=True))

        def of(atom: Any) -> Any:
            return atom if isinstance(atom, Literal) else numbers[atom]

        for eqn in jaxpr.eqns:
            given = tuple(map(of, eqn.invars))
            if eqn.primitive.name in _CALLS and isinstance(inner := eqn.params.get("jaxpr"), ClosedJaxpr):
                found = through(inner, given)
            else:
                found = [new() for _ in eqn.outvars]
                operations.append(Operation(eqn, given, tuple(found)))
            numbers.update(zip(eqn.outvars, found, strict=True))
        return [*map(of, jaxpr.outvars)]

    outputs = through(program, range(count))
    return Operations(operations, outputs, constants)


def needed_for(outputs: Iterable[Any], made_by: Mapping[int, int], operations: Sequence[Operation]) -> list[int]:
    """The indices of the operations that some outputs are computed by, in order.

    Args:
      outputs: numbers of values, or literals.
      made_by: the index of the operation of which a value is an output.
      operations: all of them.
    """
    needed: set[int] = set()
    left = [number for number in outputs if isinstance(number, int)]
    while left:
        index = made_by.get(left.pop())
        if index is not None and index not in needed:
            needed.add(index)
            left += [number for number in operations[index].inputs if isinstance(number, int)]
    return sorted(needed)


def computed(operations: Iterable[Operation], values: dict[int, Any], outputs: Iterable[Any]) -> list[Any]:
    """The outputs of some operations, whose values are added to those that are known."""

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for each in operations:
        found = evaluated(each.eqn, [*map(of, each.inputs)])
        values.update(zip(each.outputs, found, strict=True))
    return [*map(of, outputs)]


def evaluated(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """What one operation computes of values."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*values, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def written(operations: Iterable[Operation], outputs: Iterable[Any], called: Callable[[int], Hashable]) -> Hashable:
    """Some operations in a form that is equal where they compute the same of what is called the same.

    Args:
      operations: in order.
      outputs: numbers of values, or literals.
      called: what an input or a constant is called, by number.
    """
    local: dict[int, Hashable] = {}

    def of(atom: Any) -> Hashable:
        if isinstance(atom, Literal):
            value = np.asarray(atom.val)
            return str(atom.aval), value.dtype.str, value.tobytes()
        return local[atom] if atom in local else called(atom)

    lines = []
    for each in operations:
        params = tuple((name, _param(value)) for name, value in sorted(each.eqn.params.items()))
        lines.append((each.eqn.primitive.name, params, tuple(map(of, each.inputs))))
        local.update((number, ("made", len(local) + i)) for i, number in enumerate(each.outputs))
    return tuple(lines), tuple(map(of, outputs))


def _param(value: Any) -> Hashable:
    """A parameter of an operation in such a form; of functions and constants, which one it is."""
    if isinstance(value, tuple | list):
        return tuple(map(_param, value))
    if isinstance(value, ClosedJaxpr):
        inner, avals = operations_of(value), tuple(map(str, value.in_avals))
        return avals, written(
            inner.operations,
            inner.outputs,
            lambda number: ("constant", id(inner.constants[number])) if number in inner.constants else number,
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return str(value)
