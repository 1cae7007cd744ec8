"""Hyperparameters that are state: they can be read, set, and given at a step, without recompiling."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from functrain.errors import OptimizerError
from functrain.optim.declared import accepted
from functrain.optim.held import RATE, Held, WithLrState, WithStateState
from functrain.tree.paths import same_structure
from functrain.tree.scalars import wrong_scalar
from functrain.tree.text import did_you_mean, listed

Clock: TypeAlias = Literal["part", "run"]


def with_lr(
    factory: Callable[..., optax.GradientTransformation],
    lr: float | jax.Array | optax.Schedule,
    *,
    clock: Clock = "part",
    **rest: Any,
) -> optax.GradientTransformationExtraArgs:
    """Makes an optax transform whose learning rate is state, not a constant: it can be read, set, and given at a step.

    >>> tx = with_lr(optax.sgd, 0.5, momentum=0.9)
    >>> params = {"w": jnp.float32(1.0)}
    >>> updates, state = tx.update({"w": jnp.float32(2.0)}, tx.init(params), params, learning_rate=0.25)
    >>> float(updates["w"]), float(state.learning_rate), float(state.setting)
    (-0.5, 0.25, 0.5)

    Only the rate is state; every other argument stays a Python constant, so that 16-bit parameters keep their 16-bit
    moments and Adam's b2 is not rounded to 1 (which is what `optax.inject_hyperparams` does).

    Args:
      factory: makes the transform from a rate and the other arguments: `optax.adamw`, or a function of one's own.
      lr: the rate, or a schedule of a step count. Held as float32.
      clock: whose steps a schedule counts. "part" counts those of the part alone, so that one which is unfrozen on the
        way has its warm-up then. "run" counts all that the run has finished, `state.step`, those of other parts,
        phases and optimizers too, and skipped ones: nothing begins anew. `make_update` gives them; a loop of one's own
        does with `optim.step(..., step=step)`.
      **rest: the factory's other arguments.

    Raises:
      OptimizerError: `factory` is a transform, the rate a string, or `clock` none of these, or "run" for a constant
        rate; and from an update, a schedule of the run that is not given its step.

    Returns:
      A transform that takes optax's extra argument `learning_rate`, the rate of that step alone, before any schedule,
      and with `clock="run"` the argument `step`.
    """
    if not callable(factory) or isinstance(lr, str):
        raise OptimizerError(
            f"with_lr({factory!r}, {lr!r}): give the function that makes the transform and a rate, optax.adam and 1e-3,"
            " not optax.adam(1e-3)"
        )
    _check_clock("with_lr", clock)
    if clock == "run" and not callable(lr):
        raise OptimizerError(f"with_lr(..., {lr!r}, clock='run'): a constant rate has no clock: leave clock= out")
    if not callable(lr) and (wrong := wrong_scalar(lr)):
        raise OptimizerError(f"the rate of with_lr is {wrong}: give a finite number of at least 0, or a schedule")
    by_name = RATE in inspect.signature(factory).parameters
    _check_arguments("with_lr", factory, rest)

    def make(learning_rate: Any) -> optax.GradientTransformation:
        return factory(learning_rate=learning_rate, **rest) if by_name else factory(learning_rate, **rest)

    return _Holding(make, {RATE: lr}, WithLrState, clock).transform(factory, rest, "with_lr")


def with_state(
    factory: Callable[..., optax.GradientTransformation], *, clock: Clock = "part", **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes an optax transform whose hyperparameters are state: each can be read, set, and given at a step.

    >>> tx = with_state(optax.adamw, learning_rate=optax.linear_schedule(0.1, 0.0, 10), b1=0.8, b2=0.999, mask=None)
    >>> state = tx.init({"w": jnp.bfloat16(1.0)})
    >>> {name: round(float(value), 4) for name, value in state.hyperparameters.items()}
    {'learning_rate': 0.1, 'b1': 0.8, 'b2': 0.999}

    They are held, and computed with, as float32, whatever the dtype of the parameters; the transform's own state keeps
    its dtypes. One that is given another value never recompiles. What is not given stays the factory's default.

    Args:
      factory: makes the transform from these arguments: `optax.adamw`, or a function of one's own.
      clock: whose steps schedules count, as for `with_lr`.
      **arguments: the factory's. A float, a scalar array of floats, or a schedule (a function from a step count to such
        a number) is state. All else stays a constant: integers, booleans, strings, None, other functions such as masks.
        To keep a float constant, write `functools.partial(optax.adamw, eps=1e-6)` for the factory.

    Raises:
      OptimizerError: `factory` is a transform, none of the arguments is state, `clock` is neither "part" nor "run", or
        is "run" and there is no schedule; and from an update, a schedule of the run that is not given its step.

    Returns:
      A transform that takes its hyperparameters as optax's extra arguments, of that step alone, before any schedule,
      and with `clock="run"` the argument `step`.
    """
    if not callable(factory):
        raise OptimizerError(
            f"with_state({factory!r}): give the function that makes the transform, and its arguments by name:"
            " ft.with_state(optax.adamw, learning_rate=1e-3, b1=0.9)"
        )
    _check_clock("with_state", clock)
    _check_arguments("with_state", factory, arguments)
    values = {name: value for name, value in arguments.items() if _is_float(value) or _is_schedule(value)}
    for name, value in values.items():
        if not callable(value) and (wrong := wrong_scalar(value, least=-math.inf)):
            raise OptimizerError(f"with_state(..., {name}=...): it is {wrong}: give a finite number, or a schedule")
    rest = {name: value for name, value in arguments.items() if name not in values}
    if not values:
        raise OptimizerError(
            f"with_state(...): of its arguments, {listed(arguments) or 'none'}, none is state: give floats or schedules"
            " by name, learning_rate=1.0 and not 1"
        )
    if clock == "run" and not any(map(callable, values.values())):
        raise OptimizerError(f"with_state(..., clock='run'): {listed(values)} has no schedule: leave clock= out")
    make = functools.partial(factory, **rest)
    return _Holding(make, values, WithStateState, clock).transform(factory, rest, "with_state")


def _check_clock(where: str, clock: Any) -> None:
    if clock not in get_args(Clock):
        raise OptimizerError(f"{where}(..., clock={clock!r}): write 'part' or 'run'")


def _check_arguments(where: str, factory: Callable[..., Any], names: Iterable[str]) -> None:
    """Raises for an argument that the factory does not take."""
    parameters = inspect.signature(factory).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if not takes_any and (unknown := [name for name in names if name not in parameters]):
        raise OptimizerError(
            f"{where}({getattr(factory, '__name__', factory)}, ...): it takes no {listed(unknown)}; its arguments are"
            f" {listed(parameters, 30)}{did_you_mean(unknown, parameters)}"
        )


def _is_float(value: Any) -> bool:
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array) and jnp.shape(value) == ()
    return isinstance(value, float) or (is_array and bool(jnp.issubdtype(value.dtype, jnp.floating)))


def _is_schedule(value: Any) -> bool:
    """Whether a function gives a number for a step count, which masks and the like do not."""
    if not callable(value):
        return False
    try:
        found = value(jnp.zeros((), jnp.int32))
    except Exception:  # A function of anyone's, which is not meant for a step count.
        return False
    is_whole = isinstance(found, int) and not isinstance(found, bool)
    return is_whole or _is_float(found) or (isinstance(found, jax.Array) and jnp.issubdtype(found.dtype, jnp.integer))


@dataclasses.dataclass(frozen=True, eq=False)
class _Holding:
    """A transform that is made anew, for each step, of the hyperparameters of that step.

    Attributes:
      make: makes it of hyperparameters by name.
      values: numbers, or schedules.
      kind: of its state.
      clock: as for `with_lr`.
    """

    make: Callable[..., optax.GradientTransformation]
    values: Mapping[str, Any]
    kind: type[Held]
    clock: Clock

    @property
    def schedules(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if callable(value)}

    def init(self, params: Any) -> Any:
        schedules = self.schedules
        steps = jnp.zeros((), jnp.int32) if schedules else None
        used = {
            name: jnp.asarray(value(steps) if name in schedules else value, jnp.float32)
            for name, value in self.values.items()
        }
        settings = {name: jnp.array(value) for name, value in used.items() if name not in schedules}
        return self.kind.of(used, settings, steps, self.make(**used).init(params))

    def step(self, updates: Any, state: Any, params: Any, at: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        """An update, with schedules at a step count, of the hyperparameters that the extra arguments have."""
        given = {name: value for name, value in extra.items() if name in self.values and value is not None}
        settings, schedules = state.settings, self.schedules
        used = {
            name: jnp.asarray(
                given[name] if name in given else schedules[name](at) if name in schedules else settings[name],
                jnp.float32,
            )
            for name in self.values
        }
        made: Any = self.make(**used)
        others = {name: value for name, value in extra.items() if name not in self.values}
        scaled, inner = made.update(updates, state.inner, params, **accepted(made, others))
        # Hyperparameters are float32, an update of optax has its gradient's dtype. Lookahead's updates are more than
        # its gradients.
        like = updates if same_structure(scaled, updates) else params
        scaled = jax.tree.map(lambda update, leaf: update.astype(jnp.result_type(leaf)), scaled, like)
        steps = None if state.steps is None else optax.safe_increment(state.steps)
        return scaled, self.kind.of(used, settings, steps, _in_dtypes_of(state.inner, inner))

    def transform(
        self, factory: Callable[..., Any], rest: Mapping[str, Any], where: str
    ) -> optax.GradientTransformationExtraArgs:
        """The transform, made by a factory with the rest of its arguments."""
        named = factory.func if isinstance(factory, functools.partial) else factory
        name = getattr(named, "__name__", where)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            return self.step(updates, state, params, state.steps, extra)

        def by_the_run(
            updates: Any, state: Any, params: Any = None, *, step: Any = None, **extra: Any
        ) -> tuple[Any, Any]:
            if step is None and not self.schedules.keys() <= extra.keys():
                raise OptimizerError(
                    f"{where}({name}, ..., clock='run') was not told the step of the run: optim.step(..., step=step),"
                    " the number of finished steps, which transforms around it hand on; or write clock='part'"
                )
            return self.step(updates, state, params, step, extra if step is None else {**extra, "step": step})

        chosen: Any = by_the_run if self.clock == "run" else update
        # For `declared` and `described`, which look into functions.
        chosen.makes = functools.partial(self.make, **dict.fromkeys(self.values, 1.0))
        chosen.schedules, chosen.clock = self.schedules, self.clock
        chosen.given, chosen.__qualname__ = {**getattr(factory, "keywords", {}), **rest}, name
        return optax.GradientTransformationExtraArgs(self.init, chosen)


def _in_dtypes_of(before: Any, after: Any) -> Any:
    """The state with each floating-point leaf in its dtype before, in the place of that of the hyperparameters."""
    if not same_structure(after, before):
        return after

    def kept(new: Any, old: Any) -> Any:
        both = all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in (new, old))
        return jnp.asarray(new, jnp.result_type(old)) if both else new

    return jax.tree.map(kept, after, before)
