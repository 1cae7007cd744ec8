"""Where a number that is not finite comes from: a program walked operation by operation, with its numbers."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from functrain.auditing.numbers import told, told_of
from functrain.tree.flow import of_scan
from functrain.tree.operations import evaluated
from functrain.tree.places import Level, Place, place_of

# What calls another program with its own operands, and is walked into.
_CALLS = {
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "jit",
    "pjit", "remat", "remat2",
}  # fmt: skip


class Origin(NamedTuple):
    """The first operation of which a value that is not finite comes.

    Attributes:
      number: how many origins were found before it.
      primitive: the operation.
      place: the line of the program that it derives from.
      source: the input, or constant, that was not finite before any operation; empty where the operation made it.
      text: the numbers that went in and came out.
      turn: of the innermost loop that it is in, from 0; None outside of loops.
    """

    number: int
    primitive: str
    place: Place
    source: str
    text: str
    turn: int | None


class Known(NamedTuple):
    """A value, and where it is not finite, why.

    Attributes:
      value: an array.
      is_nan: whether it has a NaN.
      is_inf: whether it has an infinity.
      origin: of these.
      source: what it is called, if nothing computed it.
    """

    value: Any
    is_nan: bool = False
    is_inf: bool = False
    origin: Origin | None = None
    source: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether some of it is not finite."""
        return self.is_nan or self.is_inf


def walk(program: ClosedJaxpr, values: Sequence[Any], names: Sequence[str]) -> list[Known]:
    """Computes a program operation by operation, and finds where what is not finite in its outputs comes from.

    >>> program = jax.make_jaxpr(lambda x, y: (x + 1.0, jnp.log(x - y)))(2.0, 2.0)
    >>> sound, bad = walk(program, [2.0, 2.0], ["x", "y"])
    >>> sound.origin is None, bad.origin.primitive, bad.origin.text
    (True, 'log', 'log(0.0) is -inf')

    NaN and infinity are followed forward from where an operation makes them of finite numbers. What an input had
    before, as a mask has -inf, is an origin too, unless an operation makes NaN of these infinities.

    Args:
      program: as `jax.make_jaxpr` traces it.
      values: its inputs, flat.
      names: what they are called.

    Returns:
      A `Known` for each output.
    """
    walker = _Walker()
    given = _knowns(values, names)
    consts = _knowns(program.consts, itertools.repeat("a constant"))
    return walker.through(program.jaxpr, consts, given, (Level.of(program.jaxpr),))


class _Walker:
    """Walks through programs and counts the origins."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def through(
        self, jaxpr: Jaxpr, consts: Sequence[Known], given: Sequence[Known], levels: tuple[Level, ...]
    ) -> list[Known]:
        """The outputs of a jaxpr."""
        known: dict[Any, Known] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))

        def read(atom: Any) -> Known:
            return _knowns([atom.val], ["a constant"])[0] if isinstance(atom, Literal) else known[atom]

        for eqn, dead in zip(jaxpr.eqns, _last_uses(jaxpr), strict=True):
            operands = [read(atom) for atom in eqn.invars]
            known.update(zip(eqn.outvars, self._computed(eqn, operands, levels), strict=True))
            for var in dead:
                known.pop(var, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _computed(self, eqn: Any, given: list[Known], levels: tuple[Level, ...]) -> list[Known]:
        """The outputs of an operation; of one that has programs of its own, by walking them."""
        name, here = eqn.primitive.name, (*levels[:-1], levels[-1].at(eqn))
        if name in _CALLS and (inner := _inner(eqn)) is not None:
            consts = _knowns(inner.consts, itertools.repeat("a constant"))
            return self.through(inner.jaxpr, consts, given, (*here, Level.of(inner.jaxpr)))
        if name == "cond":
            branches = eqn.params["branches"]
            branch = branches[int(np.clip(given[0].value, 0, len(branches) - 1))]
            consts = _knowns(branch.consts, itertools.repeat("a constant"))
            return self.through(branch.jaxpr, consts, given[1:], (*here, Level.of(branch.jaxpr)))
        outputs = evaluated(eqn, [known.value for known in given])
        found = _knowns(outputs)
        if any(each.is_bad for each in found):
            if name == "scan":
                return self._scanned(eqn, given, found, here)
            if name == "while":
                return self._looped(eqn, given, found, here)
        return [self._with_origin(each, eqn, given, here) for each in found]

    # Origins.

    def _with_origin(self, out: Known, eqn: Any, given: list[Known], levels: tuple[Level, ...]) -> Known:
        return out._replace(origin=self._origin(out, eqn, given, levels)) if out.is_bad else out

    def _origin(self, out: Known, eqn: Any, given: list[Known], levels: tuple[Level, ...]) -> Origin:
        """Where what is not finite in an output of an operation comes from."""
        bad = _that_reach_it(eqn, given)
        alike = [each for each in bad if each.is_nan] if out.is_nan else bad
        origins = [each.origin for each in alike or bad if each.origin is not None]
        if made := [origin for origin in origins if not origin.source]:
            return min(made)
        if alike and origins:
            return min(origins)
        source = alike[0].source if alike else ""
        return Origin(
            number=next(self._count),
            primitive=eqn.primitive.name,
            place=place_of(levels),
            source=source,
            text=told(source, alike[0].value)
            if source
            else told_of(eqn.primitive.name, [each.value for each in given], out.value),
            turn=next((level.turn for level in levels[::-1] if level.turn is not None), None),
        )

    # Loops.

    def _scanned(self, eqn: Any, given: list[Known], found: list[Known], levels: tuple[Level, ...]) -> list[Known]:
        """The outputs of a scan that are not all finite, by its turns."""
        fixed, carries = of_scan(eqn.params)
        consts, carry, stacks = given[:fixed], given[fixed : fixed + carries], given[fixed + carries :]
        turns: Iterable[int] = range(eqn.params["length"])
        body = _Body(self, eqn.params["jaxpr"], eqn, levels)
        origins: list[list[Origin]] = [[] for _ in found]
        for turn in reversed(range(eqn.params["length"])) if eqn.params["reverse"] else turns:
            slices = [_sliced(stack, turn) for stack in stacks]
            outputs = body.turn(turn, [*consts, *carry, *slices])
            carry = outputs[:carries]
            for of_all, output in zip(origins[carries:], outputs[carries:], strict=True):
                of_all.extend([output.origin] if output.origin else [])
        for of_all, output in zip(origins, carry, strict=False):
            of_all.extend([output.origin] if output.origin else [])
        return [
            out._replace(origin=_first(of_all)) if of_all and out.is_bad else self._with_origin(out, eqn, given, levels)
            for out, of_all in zip(found, origins, strict=True)
        ]

    def _looped(self, eqn: Any, given: list[Known], found: list[Known], levels: tuple[Level, ...]) -> list[Known]:
        """The outputs of a while that are not all finite, by its turns."""
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        goes_on = jax.jit(jaxpr_as_fun(eqn.params["cond_jaxpr"]))
        asked = [each.value for each in given[:of_cond]]
        consts, carry = given[of_cond : of_cond + of_body], given[of_cond + of_body :]
        body = _Body(self, eqn.params["body_jaxpr"], eqn, levels)
        turn = 0
        while goes_on(*asked, *(each.value for each in carry))[0]:
            carry = body.turn(turn, [*consts, *carry])
            turn += 1
        return [
            out._replace(origin=last.origin)
            if last.origin and out.is_bad
            else self._with_origin(out, eqn, given, levels)
            for out, last in zip(found, carry, strict=True)
        ]


class _Body:
    """The body of a loop: compiled, and walked in the turns that change what is not finite."""

    def __init__(self, walker: _Walker, program: ClosedJaxpr, eqn: Any, levels: tuple[Level, ...]) -> None:
        self._walker, self._program, self._eqn, self._levels = walker, program, eqn, levels
        self._run: Callable[..., list[Any]] = jax.jit(jaxpr_as_fun(program))
        self._before: tuple[Any, list[Origin | None]] | None = None

    def turn(self, turn: int, given: list[Known]) -> list[Known]:
        """The outputs of a turn."""
        outputs = _knowns(self._run(*(each.value for each in given)))
        if not any(each.is_bad for each in outputs):
            self._before = None
            return outputs
        looks = [(each.is_nan, each.is_inf) for each in (*given, *outputs)]
        if self._before is None or self._before[0] != looks:
            levels = (*self._levels, Level.of(self._program.jaxpr, turn=turn))
            consts = _knowns(self._program.consts, itertools.repeat("a constant"))
            walked = self._walker.through(self._program.jaxpr, consts, given, levels)
            self._before = looks, [each.origin for each in walked]
        return [
            each._replace(origin=origin) if each.is_bad else each
            for each, origin in zip(outputs, self._before[1], strict=True)
        ]


def _that_reach_it(eqn: Any, given: list[Known]) -> list[Known]:
    """The operands that are not finite; of a selection those that it selects where they are not."""
    if eqn.primitive.name != "select_n":
        return [each for each in given if each.is_bad]
    which, *cases = given
    is_bad = [each.is_bad and jnp.any((which.value == i) & ~jnp.isfinite(each.value)) for i, each in enumerate(cases)]
    return [each for each, is_selected in zip(cases, is_bad, strict=True) if is_selected]


def _first(origins: Sequence[Origin]) -> Origin:
    return min([origin for origin in origins if not origin.source] or origins)


def _sliced(stack: Known, turn: int) -> Known:
    return _knowns([stack.value[turn]])[0]._replace(origin=stack.origin, source=stack.source)


# What an operation computes.


def _inner(eqn: Any) -> ClosedJaxpr | None:
    """The program that an operation calls with its own operands, if it has one."""
    programs = [
        value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, [])
        for value in eqn.params.values()
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
    fits = [each for each in programs if len(each.jaxpr.invars) == len(eqn.invars)]
    return fits[0] if len(fits) == 1 and not (fits[0].jaxpr.constvars and not fits[0].consts) else None


def _last_uses(jaxpr: Jaxpr) -> list[list[Any]]:
    """For each operation the variables that nothing after it looks at."""
    seen: set[Any] = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    dead: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        mine = {atom for atom in (*eqn.invars, *eqn.outvars) if not isinstance(atom, Literal)}
        dead.append([*(mine - seen)])
        seen |= mine
    return dead[::-1]


# What of a value is not finite.


def _knowns(values: Sequence[Any], sources: Iterable[str] = itertools.repeat("")) -> list[Known]:
    """The values, with what of each is not finite; one small array of it is fetched."""
    # JAX takes none together of which some have explicit axes.
    by_mesh: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        if _is_inexact(value):
            by_mesh.setdefault(jax.typeof(value).sharding.mesh, []).append(i)
    looks: dict[int, Any] = {}
    for mesh, alike in by_mesh.items():
        with jax.sharding.use_abstract_mesh(mesh):
            looks |= dict(zip(alike, _looks([values[i] for i in alike]).tolist(), strict=True))
    return [
        Known(value, *looks.get(i, (False, False)))._replace(source=source)
        for i, (value, source) in enumerate(zip(values, sources, strict=False))
    ]


def _looks(values: list[Any]) -> np.ndarray:
    """For each value whether it has a NaN, and whether it has an infinity, bool (values, 2)."""
    return np.asarray(_each_looks(values))


@jax.jit
def _each_looks(values: list[Any]) -> jax.Array:
    return jnp.stack([jnp.stack([jnp.any(jnp.isnan(each)), jnp.any(jnp.isinf(each))]) for each in values])


def _is_inexact(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.inexact))
