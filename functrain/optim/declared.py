"""Which of optax's extra arguments a transform declares, itself or in what it is made of."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

KNOWN = frozenset({"value", "grad", "value_fn", "grad_fn", "obj_fn", "step"})
"""What optax's transforms ask for, where `obj_fn` is what Sophia calls `value_fn`; and for `with_lr`, a run's step."""


def accepted(tx: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of some extra arguments those that the `update` of a transform takes, itself or to hand them on.

    >>> import optax
    >>> tx = optax.GradientTransformationExtraArgs(
    ...     lambda params: (), lambda updates, state, params=None, *, value: (updates, state)
    ... )
    >>> accepted(tx, {"value": 1.0, "grad": 2.0}), accepted(optax.identity(), {"value": 1.0})
    ({'value': 1.0}, {})
    """
    names, hands_on = _extra_arguments(tx.update)
    return {name: value for name, value in given.items() if hands_on or name in names}


def declared(tx: Any) -> frozenset[str]:
    """Which of the `KNOWN` arguments a transform declares, or one that it is made of, where it hands them on.

    >>> import optax
    >>> sorted(declared(optax.chain(optax.clip(1.0), optax.lbfgs())))
    ['grad', 'value', 'value_fn']

    Some refuse what they do not know (`optax.contrib.sam`, line searches), so that a chain that takes everything can't
    be given everything. What a chain is made of is in the closure of its `update`.
    """
    found: set[str] = set()
    seen: dict[int, Any] = {}
    left = [tx.update]
    while left:
        node = left.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            if callable(node) and not hasattr(node, "update"):
                names, hands_on = _extra_arguments(node)
                found |= names & KNOWN
                left += _made_of(node) if hands_on else []
            else:
                left += _within(node)
    return frozenset(found)


def _extra_arguments(update: Any) -> tuple[set[str], bool]:
    """The arguments after updates, state and params, and whether there may be any others."""
    try:
        parameters = list(inspect.signature(update).parameters.values())
    except (TypeError, ValueError):
        return set(), False
    hands_on = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY} | {p.name for p in parameters[3:]}
    return named, hands_on


def _made_of(function: Any) -> Iterator[Any]:
    """What a function calls: in its closure, in the object that it is a method of, or as it says itself."""
    if isinstance(function, functools.partial):
        yield from (function.func, function.args, function.keywords)
    if isinstance(function, MethodType):
        yield from (function.__func__, function.__self__)
    if isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # Not yet set: of a function that refers to itself.
                continue
        if hasattr(function, "makes"):  # Of with_lr, which makes its transform anew for each rate.
            yield function.makes()


def _within(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        yield from node.values()
    elif hasattr(node, "update"):
        yield node.update
        yield from getattr(node, "__dict__", {}).values()
    elif isinstance(node, tuple | list):
        yield from node
