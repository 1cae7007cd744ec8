"""A small tree and a partition of it."""

import jax.numpy as jnp

import functrain as ft

PARAMS = {"conv": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}
PARTS = ft.partition(PARAMS, {"conv": "conv", "bias": "**/bias", "rest": ...})


def arrays():
    return {
        "conv": {"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)},
        "head": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.zeros(2)},
    }
