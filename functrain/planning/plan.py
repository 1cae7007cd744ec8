"""The plan of a run: what each device holds, computes and sends in a step, before there is any array."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import PlanError
from functrain.mesh.layout import Layout
from functrain.mesh.shares import each_with
from functrain.planning.advice import Advice, advice, bytes_of
from functrain.planning.collectives import Collective
from functrain.planning.flow import REST
from functrain.planning.memory import Held, held, kept
from functrain.planning.program import NOTHING, costs_of, devices_of
from functrain.planning.residuals import bytes_of_residuals
from functrain.planning.table import table
from functrain.tree.paths import PyTree
from functrain.update.anatomy import lowered_calls
from functrain.update.update import Update


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each device holds, computes and sends in a step; made by `plan`. `print(it)` is a table.

    A step is one optimizer step: with `accumulate=k` it takes k batches, and with phases it is a whole cycle.

    Attributes:
      parameters: how many there are, on all devices.
      devices: how many there are.
      batches: that a step takes.
      held: bytes of each device, by what it is, part and kind of memory. Gradients are those of all trained parts.
      activations: bytes of each device that the backward pass needs of the forward pass, of a batch or a microbatch:
        the residuals that JAX keeps, casts of parameters among them.
      temporaries: bytes of what the compiled programs need beside arguments and results, activations among them, as the
        compiler of the platform says: that of CPUs tells little of others. None where it does not say.
      flops: `{part: FLOPs}` of the products of a step, on all devices if none did what another does: forward and
        backward pass and optimizer. Under "" what is of no part, as attention scores are.
      flops_here: `{part: FLOPs}` of each device; that times `devices` is more than `flops` where devices do the same.
      collectives: of a step, the most bytes first.
      unknown: loops whose number of turns is not known; what is in them is counted once.
      budget: bytes that a device has; None where it was not said.
      advice: with a budget, what would save how much, the most first.
    """

    parameters: int
    devices: int
    batches: int
    held: tuple[Held, ...]
    activations: int
    temporaries: int | None
    flops: Mapping[str, int]
    flops_here: Mapping[str, int]
    collectives: tuple[Collective, ...]
    unknown: tuple[str, ...] = ()
    budget: int | None = None
    advice: tuple[Advice, ...] = ()

    def bytes(self, what: str | None = None, part: str | None = None, memory: str = "device") -> int:
        """The bytes that each device holds, of all or of what is asked for; activations are not among them.

        Args:
          what: "parameters", "gradients", "optimizer state", "window", "ema" or "model state"; None for all.
          part: None for all.
          memory: the kind of memory.
        """
        return sum(
            each.nbytes
            for each in self.held
            if each.memory == memory and what in (None, each.what) and part in (None, each.part)
        )

    @property
    def peak(self) -> int:
        """The bytes that a device needs at most: all that it holds, and activations."""
        return self.bytes() + self.activations

    @property
    def fits(self) -> bool | None:
        """Whether that is within the budget; None without one."""
        return None if self.budget is None else self.peak <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        rows: dict[str, Sequence[Any]] = {name: getattr(self, name) for name in ("held", "collectives", "advice")}
        plain = {name: [each._asdict() for each in of_name] for name, of_name in rows.items()}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        maps = {name: dict(fields[name]) for name in ("flops", "flops_here")}
        return {**fields, **plain, **maps, "unknown": [*self.unknown], "peak": self.peak, "fits": self.fits}

    def __str__(self) -> str:
        return table(self)


def plan(
    update: Update,
    layout: Layout | None,
    params: PyTree,
    batch: Any,
    *,
    key: Any = None,
    model_state: Any = None,
    budget: str | int | None = None,
) -> Plan:
    """Plans a run from shapes alone: what each device will hold, compute and send. No array is made.

    The programs of a step are compiled for the devices of the mesh, which may be simulated, and read: their collectives
    are those that XLA's partitioner put there.

    >>> import functrain as ft, jax, jax.numpy as jnp, optax
    >>> params = jax.eval_shape(lambda: {"body": jnp.ones((64, 64)), "head": jnp.ones((64, 1))})
    >>> parts = ft.partition(params, {"body": "body", "head": "head"})
    >>> optim = ft.Optimizer(parts, {"body": optax.adam(1e-3), "head": optax.sgd(0.1)})
    >>> update = ft.make_update(lambda params, x: jnp.mean(jnp.tanh(x @ params["body"]) @ params["head"]), optim)
    >>> plan = ft.plan(update, None, params, jax.ShapeDtypeStruct((32, 64), jnp.float32))
    >>> plan.bytes("optimizer state", "body"), plan.flops["body"], plan.flops["head"]
    (32772, 524288, 12288)
    >>> "total" in str(plan), plan.collectives
    (True, ())

    Args:
      update: the update, from `make_update`.
      layout: from `ft.layout`, the one that the optimizer was made with; None where params have their shardings.
      params: the whole tree, arrays or `jax.ShapeDtypeStruct`s.
      batch: what one call is given, arrays or shapes; on devices as the layout says, or as their shardings do.
      key: as for `update.init`.
      model_state: as for `update.init`.
      budget: what each device has, "80 GB" or a number of bytes: the plan says whether it is enough, and what helps.

    Raises:
      PlanError: the update's optimizer has another layout, or none; or a budget that is none.
    """
    has = None if budget is None else bytes_of(budget)
    _check_layout(update, layout)
    batch = _in_place(update.optim.layout, batch)
    state = update.abstract(params, key=key, model_state=model_state)
    total, window = NOTHING, None
    devices = devices_of(state)
    for call in lowered_calls(update, state, batch):
        total = total + costs_of(call, devices)
        window = call.state.window if window is None else window
    found, activations = kept(update, state, window), bytes_of_residuals(update, state, batch)
    return Plan(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        devices=devices,
        batches=update.cycle,
        held=tuple(held(found)),
        activations=activations,
        temporaries=total.temporaries,
        flops={part: total.flops[part] for part in (*update.optim.parts.names, REST)},
        flops_here={part: total.flops_here[part] for part in (*update.optim.parts.names, REST)},
        collectives=tuple(total.collectives),
        unknown=total.unknown,
        budget=has,
        advice=tuple(advice(found, activations)) if has is not None else (),
    )


def _in_place(layout: Layout | None, batch: Any) -> Any:
    """The shapes of a batch, on the devices that a layout has them on."""
    if layout is None:
        return batch

    def placed(leaf: Any, here: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=here)

    return each_with(placed, layout.batch_shardings, batch)


def _check_layout(update: Update, layout: Layout | None) -> None:
    mine = update.optim.layout
    if layout is not None and mine is not layout:
        raise PlanError(
            f"the update's optimizer was made with {'no' if mine is None else 'another'} layout, and this is what it"
            " would follow: ft.Optimizer(parts, transforms, layout=layout), with the one that is planned"
        )
    if mine is not None and isinstance(mine.mesh, jax.sharding.AbstractMesh):
        raise PlanError(
            "the layout is over an abstract mesh, and a plan compiles for devices: simulate them, with"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={mine.mesh.size} and jax.make_mesh in its place"
        )
