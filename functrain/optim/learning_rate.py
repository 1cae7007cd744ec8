"""A learning rate that is state: it can be read, set, and given at a step, without recompiling."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from functrain.errors import OptimizerError
from functrain.optim.declared import accepted
from functrain.tree.paths import same_structure
from functrain.tree.scalars import wrong_scalar

Clock: TypeAlias = Literal["part", "run"]


class WithLrState(NamedTuple):
    """The state of `with_lr`: everything but `inner` is a scalar.

    Attributes:
      learning_rate: float32, the rate last used; before the first step, the rate that it will use.
      setting: float32, the rate of steps that are not given one; None where a schedule says it.
      steps: int32, the part's own steps, for a schedule; None where there is none.
      inner: the state of the transform that the factory made.
    """

    learning_rate: jax.Array
    setting: jax.Array | None
    steps: jax.Array | None
    inner: Any


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
    _check(factory, lr, clock)
    parameters = inspect.signature(factory).parameters
    by_name = "learning_rate" in parameters

    def make(rate: Any) -> optax.GradientTransformation:
        return factory(learning_rate=rate, **rest) if by_name else factory(rate, **rest)

    def init(params: Any) -> WithLrState:
        if callable(lr):
            steps = jnp.zeros((), jnp.int32)
            rate = jnp.asarray(lr(steps), jnp.float32)
            return WithLrState(rate, None, steps, make(rate).init(params))
        rate = jnp.asarray(lr, jnp.float32)
        return WithLrState(rate, jnp.array(rate), None, make(rate).init(params))

    def update(
        updates: Any, state: WithLrState, params: Any = None, *, learning_rate: Any = None, **extra: Any
    ) -> tuple[Any, WithLrState]:
        if learning_rate is None:
            learning_rate = lr(state.steps) if callable(lr) else state.setting
        rate = jnp.asarray(learning_rate, jnp.float32)
        made: Any = make(rate)
        scaled, inner = made.update(updates, state.inner, params, **accepted(made, extra))
        # The rate is float32, an update of optax has its gradient's dtype. Lookahead's updates are more than its
        # gradients.
        like = updates if same_structure(scaled, updates) else params
        scaled = jax.tree.map(lambda update, leaf: update.astype(jnp.result_type(leaf)), scaled, like)
        steps = None if state.steps is None else optax.safe_increment(state.steps)
        return scaled, WithLrState(rate, state.setting, steps, inner)

    named = factory.func if isinstance(factory, functools.partial) else factory
    name = getattr(named, "__name__", "with_lr")
    chosen: Any = _by_the_run(update, lr, name) if clock == "run" else update
    # For `declared` and `described`, which look into functions.
    chosen.makes, chosen.rate, chosen.clock = functools.partial(make, 1.0), lr, clock
    chosen.given, chosen.__qualname__ = getattr(factory, "keywords", {}) | rest, name
    return optax.GradientTransformationExtraArgs(init, chosen)


def _check(factory: Any, lr: Any, clock: Any) -> None:
    if not callable(factory) or isinstance(lr, str):
        raise OptimizerError(
            f"with_lr({factory!r}, {lr!r}): give the function that makes the transform and a rate, optax.adam and 1e-3,"
            " not optax.adam(1e-3)"
        )
    if clock not in get_args(Clock):
        raise OptimizerError(f"with_lr(..., clock={clock!r}): write 'part' or 'run'")
    if clock == "run" and not callable(lr):
        raise OptimizerError(f"with_lr(..., {lr!r}, clock='run'): a constant rate has no clock: leave clock= out")
    if not callable(lr) and (wrong := wrong_scalar(lr)):
        raise OptimizerError(f"the rate of with_lr is {wrong}: give a finite number of at least 0, or a schedule")


def _by_the_run(update: Callable[..., Any], schedule: Any, name: str) -> Callable[..., Any]:
    """The `update` of `with_lr` with the rate that a schedule has for the step of the run."""

    def updated(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Any = None, step: Any = None, **extra: Any
    ) -> tuple[Any, WithLrState]:
        if learning_rate is None and step is None:
            raise OptimizerError(
                f"with_lr({name}, ..., clock='run') was not told the step of the run: optim.step(..., step=step), the"
                " number of finished steps, which transforms around it hand on; or write clock='part'"
            )
        rate = schedule(step) if learning_rate is None else learning_rate
        given = extra if step is None else {**extra, "step": step}
        scaled: tuple[Any, WithLrState] = update(updates, state, params, learning_rate=rate, **given)
        return scaled

    return updated


def rates_in(state: Any) -> list[WithLrState]:
    """Every `with_lr` state in a state, outer ones before those within them."""
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_rate) if _is_rate(node)]
    return found + [inner for outer in found for inner in rates_in(outer.inner)]


def with_rate(state: Any, rate: jax.Array) -> Any:
    """The state with another constant rate in its `with_lr` state."""

    def replaced(node: Any) -> Any:
        if not _is_rate(node):
            return node
        new = [jnp.full_like(old, rate) for old in (node.learning_rate, node.setting)]
        return node._replace(learning_rate=new[0], setting=new[1])

    return jax.tree.map(replaced, state, is_leaf=_is_rate)


def _is_rate(node: Any) -> bool:
    return isinstance(node, WithLrState)
