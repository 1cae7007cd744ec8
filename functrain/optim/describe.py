"""What a transform is made of, as far as it can be told: the names and numbers in the closures of its `update`."""

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functrain.optim.transforms import Frozen, Transform

Makeup: TypeAlias = list[Any]
"""As JSON has it: a name, `{name: number or text}`, and the makeup of each transform that it is made of."""

_DEEPEST = 6
_UNSAID = {"clock": "part"}  # What numbers are that a makeup leaves out.


@dataclasses.dataclass(frozen=True)
class _Node:
    """A transform.

    Attributes:
      name: of the function that made it.
      values: numbers, and callables as text, by name.
      usual: the names of values that are the defaults of the function that made it.
      made_of: the transforms within.
      given: for `with_lr` and `with_state`, the constants that it was given for its factory.
    """

    name: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    usual: frozenset[str] = frozenset()
    made_of: tuple["_Node", ...] = ()
    given: Mapping[str, Any] | None = None


def described(tx: Transform) -> str:
    """What a transform is made of, without the numbers that are defaults; "frozen" for `FROZEN`.

    >>> import optax
    >>> described(optax.adamw(1e-3, b1=0.95))
    'chain(scale_by_adam(b1=0.95), add_decayed_weights(weight_decay=0.0001), scale(step_size=-0.001))'
    """
    return _text(_node_of(tx))


def made_by(tx: Transform) -> str:
    """The name of the function that made a transform; "frozen" for `FROZEN`.

    >>> import optax
    >>> made_by(optax.adam(0.1))
    'chain'
    """
    if isinstance(tx, Frozen):
        return "frozen"
    return str(getattr(tx.update, "__qualname__", type(tx.update).__name__)).split(".<locals>")[0]


def makeup(tx: Transform) -> Makeup:
    """All that can be told of a transform, to be kept and compared.

    >>> import optax
    >>> makeup(optax.chain(optax.clip(1.0), optax.sgd(0.1)))[2][0]
    ['clip', {'max_delta': 1.0}, []]
    """
    return _written(_node_of(tx))


def outlines(old: Makeup, new: Makeup) -> tuple[str, str] | None:
    """The names of two transforms that are made of others, as short as tells them apart; None if they are alike.

    >>> outlines(["sgd", {}, [["scale", {}, []]]], ["adam", {}, [["scale", {}, []]]])
    ('sgd(scale)', 'adam(scale)')
    """
    before, now = _outline(old), _outline(new)
    if before == now:
        return None
    short = tuple(made[0] if "given" in made[3:] else _outline(made) for made in (old, new))
    return (before, now) if short[0] == short[1] else (short[0], short[1])


def changed(old: Makeup, new: Makeup) -> list[str]:
    """The numbers that differ between two transforms of the same outline, in words.

    >>> changed(["clip", {"max_delta": 1.0}, []], ["clip", {"max_delta": 2.0}, []])
    ['max_delta of clip was 1.0, is now 2.0']
    """
    before, now = _UNSAID | old[1], _UNSAID | new[1]
    lines = [
        f"{name} of {new[0]} was {before.get(name)}, is now {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return lines + [line for pair in zip(old[2], new[2], strict=True) for line in changed(*pair)]


def _outline(made: Makeup) -> str:
    within = ", ".join(map(_outline, made[2]))
    return f"{made[0]}({within})" if within else str(made[0])


def _written(node: _Node) -> Makeup:
    if node.name == "stacked" and len(node.made_of) == 1:  # Computes the same, and keeps the same state.
        return _written(node.made_of[0])
    # What `with_lr` made says less to a reader than the name of its factory.
    mark = [] if node.given is None else ["given"]
    return [node.name, node.values, [_written(each) for each in node.made_of], *mark]


def _text(node: _Node) -> str:
    if node.given is not None and node.name != "<lambda>":
        return _called(node.name, node.values | _values(node.given))
    shown = {name: value for name, value in node.values.items() if name not in node.usual}
    return _called(node.name, shown, node.made_of)


def _called(name: str, shown: Mapping[str, Any], within: tuple[_Node, ...] = ()) -> str:
    words = [f"{key}={str(value).partition('(')[0]}" for key, value in shown.items() if key[0] != "_"]
    words += map(_text, within)
    return f"{name}({', '.join(words)})" if words else name


def _node_of(tx: Transform) -> _Node:
    return _Node("frozen") if isinstance(tx, Frozen) else _node(tx.update)


def _node(update: Any, depth: int = 0) -> _Node:
    """What an `update` function says of its transform."""
    update = inspect.unwrap(update)
    name = _factory(update)
    if hasattr(update, "makes"):  # Of `with_lr` or `with_state`: what is no schedule is state.
        values = _values(update.schedules)
        values |= {"clock": update.clock} if update.clock != "part" else {}
        return _Node(name, values, made_of=(_node(update.makes().update, depth + 1),), given=update.given)
    values, within = {}, []
    for key, value in _contents(update, set()):
        if (found := _transforms(key, value)) and depth < _DEEPEST:
            within += [_node(each, depth + 1) for each in found]
        else:
            values |= _values({key: value})
    if name == "with_extra_args_support" and within:
        return within[0]
    defaults = _defaults(update, name)
    usual = {key for key, value in values.items() if key in defaults and _value(defaults[key]) == value}
    return _Node(name, values, frozenset(usual), tuple(within))


def _factory(function: Any) -> str:
    """The name of what made a function, or of itself."""
    if isinstance(function, MethodType):
        return type(function.__self__).__name__
    if isinstance(function, functools.partial):
        return _factory(function.func)
    return str(getattr(function, "__qualname__", type(function).__name__)).split(".<locals>")[0]


def _contents(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What a function has at hand, by name: in its closure, its object or its partial, once each.

    Of helpers that were made with it, what they have is its own.
    """
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        yield from function.keywords.items()
        yield from _contents(function.func, seen)
        return
    if isinstance(function, MethodType):
        yield from vars(function.__self__).items() if hasattr(function.__self__, "__dict__") else ()
        return
    for key, cell in zip(
        getattr(getattr(function, "__code__", None), "co_freevars", ()),
        getattr(function, "__closure__", None) or (),
        strict=False,
    ):
        try:
            value = cell.cell_contents
        except ValueError:  # Not yet set: of a function that refers to itself.
            continue
        is_helper = hasattr(value, "__closure__") and _is_local(value, _factory(function))
        if is_helper and getattr(value, "__module__", None) == function.__module__:
            yield from _contents(value, seen)
        elif id(value) not in seen or not _transforms(key, value):
            seen.add(id(value))
            yield key, value


def _is_local(function: Any, factory: str) -> bool:
    return str(function.__qualname__).startswith(f"{factory}.<locals>")


def _transforms(key: str, value: Any) -> list[Any]:
    """The `update` functions of the transforms that a value holds."""
    if isinstance(value, Mapping):
        return [each for name in value for each in _transforms(str(name), value[name])]
    if callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return [] if isinstance(value, type) else [value.update]
    if isinstance(value, tuple | list):
        return [each for one in value for each in _transforms(key, one)]
    return [value] if key.startswith("update") and callable(value) else []


def _defaults(function: Any, name: str) -> dict[str, Any]:
    """The defaults of the function of that name in the module of another one."""
    factory = getattr(sys.modules.get(getattr(function, "__module__", None) or ""), name, None)
    try:
        parameters = inspect.signature(factory).parameters if callable(factory) else {}
    except (TypeError, ValueError):
        return {}
    return {key: each.default for key, each in parameters.items()}


def _values(named: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Of some values those that are numbers or callables."""
    found = {name: _value(value, depth) for name, value in named.items()}
    return {name: value for name, value in found.items() if value is not None}


def _value(value: Any, depth: int = 0) -> Any:
    """A number as JSON has it, a callable as text; None for what is neither."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) or _is_scalar(value):
        number = np.asarray(value).item()
        return number if isinstance(number, int) or (isinstance(number, float) and math.isfinite(number)) else None
    if isinstance(value, tuple | list):
        each = [_value(one, depth) for one in value]
        return None if not each or None in each else f"[{', '.join(map(str, each))}]"
    if not callable(value) or isinstance(value, type):
        return None
    function = inspect.unwrap(value)
    is_made = str(getattr(function, "__module__", "")).startswith("optax") or isinstance(function, functools.partial)
    name = _factory(function) if is_made else getattr(function, "__name__", type(function).__name__)
    within = _values(dict(_contents(function, set())), depth + 1) if depth < _DEEPEST else {}
    return f"{name}({', '.join(f'{key}={each}' for key, each in within.items())})" if within else name


def _is_scalar(value: Any) -> bool:
    """Whether it is one number of NumPy or JAX; keys and what is traced are none."""
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer)
    return is_array and np.ndim(value) == 0 and bool(jnp.issubdtype(value.dtype, jnp.number))
