"""States that hold hyperparameters: what they are, how they are found in a part's state, and how they are set."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

RATE = "learning_rate"


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

    @property
    def hyperparameters(self) -> dict[str, jax.Array]:
        """As of `WithStateState`."""
        return {RATE: self.learning_rate}

    @property
    def settings(self) -> dict[str, jax.Array]:
        """As of `WithStateState`."""
        return {} if self.setting is None else {RATE: self.setting}

    @classmethod
    def of(cls, hyperparameters: Mapping[str, Any], settings: Mapping[str, Any], steps: Any, inner: Any) -> Any:
        """Made of the fields of a `WithStateState`."""
        return cls(hyperparameters[RATE], settings.get(RATE), steps, inner)


class WithStateState(NamedTuple):
    """The state of `with_state`: everything but `inner` is scalars.

    Attributes:
      hyperparameters: float32 by name, those last used; before the first step, those that it will use.
      settings: float32 by name, of those that no schedule says, what they are in steps that are not given them.
      steps: int32, the part's own steps, for schedules; None where there are none.
      inner: the state of the transform that the factory made.
    """

    hyperparameters: dict[str, jax.Array]
    settings: dict[str, jax.Array]
    steps: jax.Array | None
    inner: Any

    @classmethod
    def of(cls, hyperparameters: Mapping[str, Any], settings: Mapping[str, Any], steps: Any, inner: Any) -> Any:
        """Made of its fields."""
        return cls(dict(hyperparameters), dict(settings), steps, inner)


Held: TypeAlias = WithLrState | WithStateState


def held_in(state: Any) -> list[Held]:
    """Every state with hyperparameters in a state, outer ones before those within them."""
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_held) if _is_held(node)]
    return found + [inner for outer in found for inner in held_in(outer.inner)]


def hyperparameters_in(state: Any) -> dict[str, jax.Array]:
    """The hyperparameters last used, by name."""
    return {name: value for held in held_in(state) for name, value in held.hyperparameters.items()}


def settings_in(state: Any) -> dict[str, jax.Array]:
    """The hyperparameters that no schedule says, by name."""
    return {name: value for held in held_in(state) for name, value in held.settings.items()}


def with_settings(state: Any, settings: Mapping[str, Any]) -> Any:
    """The state with other hyperparameters from now on, of those that no schedule says."""

    def replaced(node: Any) -> Any:
        if not _is_held(node):
            return node
        new = {name: settings[name] for name in node.settings if name in settings}
        used, set_to = ({name: jnp.full_like(old[name], value) for name, value in new.items()}
                        for old in (node.hyperparameters, node.settings))  # fmt: skip
        inner = jax.tree.map(replaced, node.inner, is_leaf=_is_held)
        return type(node).of(node.hyperparameters | used, node.settings | set_to, node.steps, inner)

    return jax.tree.map(replaced, state, is_leaf=_is_held)


def _is_held(node: Any) -> bool:
    return isinstance(node, Held)
