"""The audit: which loss reaches which leaf, and what each part costs, before anything is computed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from functrain.auditing.tracing import Inputs, Traced, backward_flops, inputs_of, trace_phase
from functrain.errors import AuditError
from functrain.gradients.loss import Context
from functrain.gradients.routes import Route, Weight
from functrain.optim.optimizer import Optimizer
from functrain.tree.model_state import told_of_statistics
from functrain.tree.partition import Partition
from functrain.tree.paths import PyTree
from functrain.tree.selectors import non_float
from functrain.tree.text import aligned, bytes_in_words, listed
from functrain.update.phases import Alternation, Phase, with_optimizers_of

LEVELS = ("error", "warning", "note")


class Finding(NamedTuple):
    """Something that an audit found.

    Attributes:
      level: "error" for a trained part that no loss reaches, "warning" for a leaf, "note" for what may be meant.
      part: the part that it is about.
      paths: its leaves that it is about.
      text: what was found.
    """

    level: str
    part: str
    paths: tuple[str, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """Which losses reach which leaves, and what each part costs; made by `audit`. `print(it)` is a table.

    Attributes:
      parts: the partition.
      trained: the parts that learn.
      reached: `{loss: paths}`, every leaf that the loss has a gradient for, of frozen parts too; with phases a loss is
        "phase", or "phase/loss" where the phase has several.
      taken: `{part: losses}`, the losses that a part learns from.
      state_bytes: `{part: bytes}` of optimizer state; empty if no optimizer was given.
      backward: `{part: share}`, how much of the FLOPs of the backward pass are saved if the part is frozen. What two
        parts both need is in neither's share.
      findings: errors, warnings and notes.
      joins: `{part: step}`, the parts that are frozen at first, and join at a step.
    """

    parts: Partition
    trained: tuple[str, ...]
    reached: dict[str, frozenset[str]]
    taken: dict[str, tuple[str, ...]]
    state_bytes: dict[str, int]
    backward: dict[str, float]
    findings: tuple[Finding, ...]
    joins: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        rows = [["part", *self.reached, "parameters", "optimizer state", "backward"]]
        for part in self.parts.names:
            paths = self.parts.paths(part)
            cells = []
            for loss, reached in self.reached.items():
                cell = f"{sum(path in reached for path in paths)}/{len(paths)}"
                cells.append(cell if loss in self.taken[part] else f"({cell})")
            shapes = [leaf.shape for leaf in self.parts.leaves if leaf.part == part and leaf.shape is not None]
            state = bytes_in_words(self.state_bytes[part]) if part in self.state_bytes else "-"
            share = f"{self.backward[part]:.0%}" if part in self.trained else "frozen"
            share += f", joins at step {self.joins[part]}" if part in self.joins else ""
            rows.append([part, *cells, f"{sum(map(math.prod, shapes)):,}", state, share])
        table = aligned(rows, [str.ljust, *[str.rjust] * (len(rows[0]) - 1)])
        legend = "leaves reached of leaves; in brackets: the part does not learn from that loss"
        return "\n".join([table, legend, *(f"{finding.level}: {finding.text}" for finding in self.findings)])

    def check(self) -> None:
        """Raises an AuditError that lists the errors, if there are any."""
        if errors := [finding.text for finding in self.findings if finding.level == "error"]:
            raise AuditError("; ".join(errors))


def audit(
    loss_fn: Callable[..., Any] | Alternation,
    parts: Partition,
    params: PyTree,
    batch: Any,
    *,
    optim: Optimizer | None = None,
    key: Any = None,
    model_state: Any = None,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
) -> Audit:
    """Finds which losses reach which leaves, by tracing alone: no FLOP is spent, and nothing need be in memory.

    >>> import jax.numpy as jnp
    >>> from functrain import Loss, partition
    >>> params = {"body": jnp.ones((2, 2)), "main": jnp.ones(2), "aux": jnp.ones(2)}
    >>> def loss_fn(params, batch):
    ...     hidden = batch @ params["body"]
    ...     stopped = jax.lax.stop_gradient(hidden)
    ...     return Loss({"main": jnp.sum(hidden @ params["main"]), "aux": jnp.sum(stopped @ params["aux"])})
    >>> parts = partition(params, {"body": "body", "main": "main", "aux": "aux"})
    >>> print(audit(loss_fn, parts, params, jax.ShapeDtypeStruct((4, 2), jnp.float32)))
    part  aux  main  parameters  optimizer state  backward
    body  0/1   1/1           4                -       60%
    main  0/1   1/1           2                -       20%
    aux   1/1   0/1           2                -       20%
    leaves reached of leaves; in brackets: the part does not learn from that loss

    Args:
      loss_fn: as for `make_update`, phases included.
      parts: the partition of params.
      params: arrays or `jax.ShapeDtypeStruct`s.
      batch: arrays or `jax.ShapeDtypeStruct`s.
      optim: the optimizer: says what is frozen, and how large its state is. Without one every part is trained.
      key: for a loss function that declares it; by default any key.
      model_state: for a loss function that declares it.
      route: as for `make_update`.
      loss_weights: as for `make_update`.

    Raises:
      LossError: as `make_train_step` does.
      PartitionError: params are not of the partition's structure.
      PhaseError: phases that do not fit the optimizer.
    """
    trained = _all_float(parts, params) if optim is None else optim.trained
    if isinstance(loss_fn, Alternation):
        phases = loss_fn.phases
        if optim is not None:
            loss_fn.check(optim)
            optim = with_optimizers_of(loss_fn, optim)
    else:
        phases = (Phase("", loss_fn, trained, route=route, loss_weights=loss_weights),)
    inputs = Inputs.of(parts, params, batch, Context(key, model_state, np.int32(0)))
    each = inputs_of(phases, inputs)
    traced = [trace_phase(phase, given, trained) for phase, given in zip(phases, each, strict=True)]
    reached = {loss: paths for one in traced for loss, paths in one.reached.items()}
    taken = {part: tuple(loss for one in traced for loss in one.taken.get(part, ())) for part in parts.names}
    state_bytes = {}
    if optim is not None:
        states = jax.eval_shape(lambda arrays: optim.init(inputs.params(arrays)), inputs.arrays)
        state_bytes = dict.fromkeys(trained, 0)
        for name, part in optim.owners.items():
            state_bytes[part] += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states[name]))
    flops = [backward_flops(phase, given) for phase, given in zip(phases, each, strict=True)]
    total = sum(whole for whole, _ in flops) or 1.0
    return Audit(
        parts=parts,
        trained=trained,
        reached=reached,
        taken=taken,
        state_bytes=state_bytes,
        backward={part: sum(saved.get(part, 0.0) for _, saved in flops) / total for part in trained},
        findings=tuple(_findings(parts, trained, reached, taken, traced)),
        joins=dict(optim.frozen_until) if optim is not None else {},
    )


def _findings(
    parts: Partition,
    trained: Sequence[str],
    reached: Mapping[str, frozenset[str]],
    taken: Mapping[str, Sequence[str]],
    traced: Sequence[Traced],
) -> list[Finding]:
    found = []
    used = frozenset().union(*(one.used for one in traced))
    for part in trained:
        mine = frozenset().union(*(reached[loss] for loss in taken[part]))
        unreached = tuple(path for path in parts.paths(part) if path not in mine)
        if unreached:
            others = [loss for loss, paths in reached.items() if loss not in taken[part] and paths & set(unreached)]
            if others:
                why = f"only {listed(others)} does, which the part does not learn from; route it there, or freeze it"
            elif used & set(unreached):
                why = "it is used, but cut off by stop_gradient or by an operation that has no gradient; or freeze it"
            else:
                why = "it is not used; use it, or freeze it"
            why = told_of_statistics(parts.state, unreached) or why
            whole = len(unreached) == len(parts.paths(part))
            what = f"the trained part {part!r} ({listed(unreached)})" if whole else f"{listed(unreached)} of {part!r}"
            text = f"no loss that part {part!r} learns from reaches {what}: {why}"
            found.append(Finding("error" if whole else "warning", part, unreached, text))
        elif statistics := told_of_statistics(parts.state, parts.paths(part)):
            found.append(Finding("warning", part, parts.paths(part), statistics))
        for one in traced:
            if gates := one.gated.get(part):
                text = (
                    f"part {part!r} has gradients only through the frozen {listed(gates)}: while that is 0, so are they"
                )
                found.append(Finding("note", part, parts.paths(part), text))
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _all_float(parts: Partition, params: PyTree) -> tuple[str, ...]:
    split = parts.split(params)
    return tuple(part for part in parts.names if not any(non_float(*item) for item in split[part].items()))
