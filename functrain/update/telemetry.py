"""What an optimizer step did to each part."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.optim.clipping import each_norm
from functrain.tree.partition import Split


def by_part(
    grads: Mapping[str, Any],
    updates: Mapping[str, Any],
    params: Mapping[str, Any],
    hyperparameters: Mapping[str, Mapping[str, Any]],
    norms_of: Callable[[Mapping[Any, Split]], Mapping[Any, jax.Array]] = each_norm,
) -> dict[str, dict[str, jax.Array]]:
    """Norms and rates of each part that made a step, float32 scalars.

    >>> part = {"w": jnp.array([3.0, 4.0])}
    >>> {name: float(value) for name, value in by_part({"a": part}, {"a": part}, {"a": part}, {})["a"].items()}
    {'grad_norm': 5.0, 'update_norm': 5.0, 'param_norm': 5.0, 'update_ratio': 1.0}

    Args:
      grads: split gradients, as the optimizer was given them.
      updates: split updates, as it added them.
      params: split params, before they were added.
      hyperparameters: those of the parts of which they are state.
      norms_of: from split trees by any name to their norms.

    Returns:
      `{part: {"grad_norm", "update_norm", "param_norm", "update_ratio"}}`, and hyperparameters by name, such as
      "learning_rate". The ratio is that of the update to the parameters, 0 where these are 0.
    """
    telemetry = {}
    of_what = {"grad": grads, "update": updates, "param": params}
    norms = norms_of({(what, part): {part: split[part]} for what, split in of_what.items() for part in grads})
    for part in grads:
        update_norm, param_norm = norms["update", part], norms["param", part]
        telemetry[part] = {
            "grad_norm": norms["grad", part],
            "update_norm": update_norm,
            "param_norm": param_norm,
            "update_ratio": jnp.where(param_norm == 0, 0, update_norm / jnp.where(param_norm == 0, 1, param_norm)),
        }
        telemetry[part] |= hyperparameters.get(part, {})
    return telemetry
