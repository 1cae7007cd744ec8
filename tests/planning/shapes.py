"""Models of shapes alone, whose FLOPs, bytes and collectives are known in closed form."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import functrain as ft

ROWS, WIDTH, LAYERS = 64, 32, 4


def shape(*lengths, spec=None, mesh=None, dtype=jnp.float32):
    place = None if mesh is None else NamedSharding(mesh, spec or P())
    return jax.ShapeDtypeStruct(lengths, dtype, sharding=place)


def mesh_of(*lengths, names=("data", "model")):
    return jax.make_mesh(lengths, names[: len(lengths)], axis_types=(AxisType.Auto,) * len(lengths))


def mlp_params(mesh=None, spec=None, width=WIDTH):
    """A body of square kernels, and a head."""
    body = {f"layer_{number}": shape(width, width, spec=spec, mesh=mesh) for number in range(LAYERS)}
    return {"body": body, "head": shape(width, 1, mesh=mesh)}


def mlp_loss(params, batch):
    for kernel in params["body"].values():
        batch = jnp.tanh(batch @ kernel)
    return jnp.mean((batch @ params["head"]) ** 2)


def optimizer(params, tx=None, **options):
    parts = ft.partition(params, {"body": "body", "head": ...})
    return ft.Optimizer(parts, {"body": tx or optax.adam(1e-3), "head": optax.sgd(0.1)}, **options)


def planned(params, loss_fn, batch, *, tx=None, budget=None, key=None, **options):
    return ft.plan(
        ft.make_update(loss_fn, optimizer(params, tx), **options), None, params, batch, budget=budget, key=key
    )


def sent(plan, kind=None, part=None):
    """How many collectives, and their bytes a device."""
    found = [each for each in plan.collectives if kind in (None, each.kind) and part in (None, each.part)]
    return sum(each.times for each in found), sum(each.nbytes for each in found)
