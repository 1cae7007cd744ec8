"""What an optimizer step did to each part."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.tree.arrays import global_norm


def by_part(
    grads: Mapping[str, Any], updates: Mapping[str, Any], params: Mapping[str, Any], rates: Mapping[str, Any]
) -> dict[str, dict[str, jax.Array]]:
    """Norms and rates of each part that made a step, float32 scalars.

    >>> part = {"w": jnp.array([3.0, 4.0])}
    >>> {name: float(value) for name, value in by_part({"a": part}, {"a": part}, {"a": part}, {})["a"].items()}
    {'grad_norm': 5.0, 'update_norm': 5.0, 'param_norm': 5.0, 'update_ratio': 1.0}

    Args:
      grads: split gradients, as the optimizer was given them.
      updates: split updates, as it added them.
      params: split params, before they were added.
      rates: the learning rates of the parts that have a `with_lr`.

    Returns:
      `{part: {"grad_norm", "update_norm", "param_norm", "update_ratio", "learning_rate"}}`. The ratio is that of the
      update to the parameters, 0 where these are 0; the learning rate is there where it can be read.
    """
    telemetry = {}
    for part in grads:
        update_norm, param_norm = global_norm(updates[part]), global_norm(params[part])
        telemetry[part] = {
            "grad_norm": global_norm(grads[part]),
            "update_norm": update_norm,
            "param_norm": param_norm,
            "update_ratio": jnp.where(param_norm == 0, 0, update_norm / jnp.where(param_norm == 0, 1, param_norm)),
        }
        if part in rates:
            telemetry[part]["learning_rate"] = rates[part]
    return telemetry
