"""Two parts, gradients of them, and the bytes of what a step makes of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functrain as ft


def params():
    return {
        "body": {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])},
        "head": {"w": jnp.array([2.0, -1.0]), "b": jnp.array([0.25])},
    }


PARTS = ft.partition(params(), {"body": "body", "head": "head"})


def gradients(*names, seed=1):
    """Random split gradients of these parts."""
    rng = np.random.default_rng(seed)
    split = PARTS.split(jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params()))
    return {part: split[part] for part in names}


def bits(tree):
    """The tree with the bytes of every leaf: equal only where equal in every bit."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


class Model(NamedTuple):
    body: Any
    head: Any


SCHEDULED = ft.with_lr(optax.adamw, lambda step: 0.1 / (1 + step), weight_decay=0.1)
