"""What is read and set in the state of an optimizer, and how it lies."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from functrain.optim.assignment import Assignment
from functrain.optim.checks import check_no_schedule, check_part_state, check_state, checked_settings
from functrain.optim.held import RATE, hyperparameters_in, with_settings
from functrain.optim.part_transform import PartTransform
from functrain.optim.states import in_place_of, like_before
from functrain.tree.paths import PyTree


class StateAccess(Assignment):
    """What an `Optimizer` does with its state beside a step."""

    def optax_state(self, opt_state: Mapping[str, Any], part: str) -> Any:
        """The state of a part as optax has it, of the model's own tree, for `optax.tree.get` and the like.

        >>> import jax.numpy as jnp, optax
        >>> from functrain import Optimizer, partition
        >>> params = {"body": {"w": jnp.zeros(2)}, "head": jnp.zeros(2)}
        >>> optim = Optimizer(partition(params, {"all": ...}), {"all": optax.sgd(0.1, momentum=0.9)})
        >>> opt_state = optim.init(params)
        >>> list(opt_state["all"][0].trace), list(optim.optax_state(opt_state, "all")[0].trace["body"])
        (['body/w', 'head'], ['w'])

        Raises:
          OptimizerError: an unknown or frozen part, or a state that is not of this optimizer.
        """
        check_part_state(opt_state, self._structures, part)
        return self._transforms[part].form.to_own(opt_state[part])

    def with_optax_state(self, opt_state: Mapping[str, Any], part: str, state: Any) -> dict[str, Any]:
        """The same optimizer state with a part's state as optax has it, of the dtypes of the one before.

        Raises:
          OptimizerError: an unknown or frozen part, or a state of another structure or shapes.
        """
        check_part_state(opt_state, self._structures, part)
        what, old = f"the state given for part {part!r}", opt_state[part]
        return {**opt_state, part: in_place_of(old, like_before(state, old, self._transforms[part].form, what), what)}

    def learning_rates(self, opt_state: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The rates last used, or set since, of the parts whose rate is state: `{part: float32 scalar}`."""
        return {part: found[RATE] for part, found in self.hyperparameters(opt_state).items() if RATE in found}

    def hyperparameters(self, opt_state: Mapping[str, Any]) -> dict[str, dict[str, jax.Array]]:
        """What is state of `with_state` and `with_lr`, as last used or set since: `{part: {name: float32 scalar}}`."""
        check_state(opt_state, self._structures)
        found = {name: hyperparameters_in(opt_state[name]) for name in self.owners}
        return {name: named for name, named in found.items() if named}

    def with_learning_rates(self, opt_state: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
        """The same state with other learning rates from now on.

        Args:
          opt_state: from `init` or the last step.
          rates: `{part: scalar}`.

        Raises:
          OptimizerError: an unknown or frozen part, one without `with_lr`, or one whose rate a schedule says.
        """
        return self._with(opt_state, rates, None)

    def with_hyperparameters(
        self, opt_state: Mapping[str, Any], hyperparameters: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The same state with other hyperparameters from now on.

        >>> import jax.numpy as jnp, optax
        >>> from functrain import Optimizer, partition, with_state
        >>> params = {"w": jnp.zeros(2)}
        >>> transforms = {"all": with_state(optax.adam, learning_rate=0.5, b1=0.75)}
        >>> optim = Optimizer(partition(params, {"all": ...}), transforms)
        >>> opt_state = optim.with_hyperparameters(optim.init(params), {"all": {"b1": 0.5}})
        >>> {name: float(value) for name, value in optim.hyperparameters(opt_state)["all"].items()}
        {'b1': 0.5, 'learning_rate': 0.5}

        Args:
          opt_state: from `init` or the last step.
          hyperparameters: `{part: {name: scalar}}`.

        Raises:
          OptimizerError: an unknown or frozen part, a hyperparameter that is no state of it, or one that a schedule
            says.
        """
        return self._with(opt_state, None, hyperparameters)

    def _with(
        self, opt_state: Mapping[str, Any], rates: Mapping[str, Any] | None, settings: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        check_state(opt_state, self._structures)
        new_state = dict(opt_state)
        for part, named in checked_settings(rates, settings, opt_state, self.all_transforms).items():
            check_no_schedule(part, opt_state[part], named)
            new_state[part] = with_settings(opt_state[part], named)
        return new_state

    def shardings(self, params_shardings: PyTree) -> dict[str, Any]:
        """The shardings of the optimizer state, from those of the parameters; for `jax.jit(..., out_shardings=)`.

        Args:
          params_shardings: a tree like params, of shardings: `jax.tree.map(lambda p: p.sharding, params)`.

        Returns:
          A tree like the state: a parameter's sharding for state that is shaped like it, or what the layout says of it;
          replicated for the rest.
        """
        places = self.places or self.parts.split(params_shardings)
        return {name: of_part.shardings(places[of_part.part]) for name, of_part in self._transforms.items()}

    @functools.cached_property
    def _transforms(self) -> dict[str, PartTransform]:
        """The transforms of the trained parts, by the name of their state."""
        return {
            name: PartTransform(self.parts, part, self.all_transforms[name], self.places and self.places[part])
            for name, part in self.owners.items()
        }

    @property
    def _structures(self) -> dict[str, Any]:
        """The tree structures of the states of the trained parts."""
        return {name: of_part.form.crossing for name, of_part in self._transforms.items()}
