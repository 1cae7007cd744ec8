"""What a loss function shows when it is traced with shapes: what its losses reach, and what its gradients cost."""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functrain.gradients.loss import Context, accepted_context, make_losses
from functrain.gradients.routes import normalised
from functrain.gradients.train_step import make_gradient
from functrain.tree.flow import Marks, flow
from functrain.tree.partition import Partition
from functrain.tree.paths import PyTree
from functrain.tree.selectors import non_float
from functrain.update.metrics import metrics_of
from functrain.update.phases import Phase


class Inputs(NamedTuple):
    """What a loss function is traced with.

    Attributes:
      parts: the partition of the parameters.
      arrays: the shapes and dtypes of the parameters, by path.
      rest: the leaves that are no arrays, by path.
      batch: arrays or shapes.
      context: what a loss function may declare.
    """

    parts: Partition
    arrays: dict[str, jax.ShapeDtypeStruct]
    rest: dict[str, Any]
    batch: Any
    context: Context

    @classmethod
    def of(cls, parts: Partition, params: PyTree, batch: Any, context: Context) -> "Inputs":
        """The inputs for whole params, of arrays or shapes; without a key any key is given."""
        flat = {path: leaf for leaves in parts.split(params).values() for path, leaf in leaves.items()}
        arrays = {path: leaf for path, leaf in flat.items() if hasattr(leaf, "dtype") or isinstance(leaf, float)}
        shapes = {path: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in arrays.items()}
        rest = {path: leaf for path, leaf in flat.items() if path not in arrays}
        key = jax.eval_shape(lambda: jax.random.key(0)) if context.key is None else context.key
        return cls(parts, shapes, rest, batch, context._replace(key=key))

    def params(self, arrays: Mapping[str, Any]) -> PyTree:
        """The whole params with these arrays."""
        flat = {**self.rest, **arrays}
        split = {part: {path: flat[path] for path in self.parts.paths(part)} for part in self.parts.names}
        return self.parts.merge(split)


class Traced(NamedTuple):
    """What tracing one phase shows.

    Attributes:
      reached: `{loss: paths}`, what it has a gradient for.
      taken: `{part: losses}`, what the part learns from.
      used: the paths that the losses are computed of, with a gradient or without.
      gated: `{part: paths}`, for a part whose every gradient is multiplied by a frozen leaf: these leaves.
    """

    reached: dict[str, frozenset[str]]
    taken: dict[str, tuple[str, ...]]
    used: frozenset[str]
    gated: dict[str, tuple[str, ...]]


def inputs_of(phases: Sequence[Phase], inputs: Inputs) -> list[Inputs]:
    """The inputs of each phase, with the metrics of those before it on the same batch where one asks for them."""
    if not any("before" in accepted_context(phase.loss_fn) for phase in phases):
        return [inputs] * len(phases)
    found: list[Inputs] = []
    before: dict[str, Any] = {}
    for phase in phases:
        before = before if phase.same_batch else {}
        found.append(inputs._replace(context=inputs.context._replace(before=before if phase.same_batch else None)))
        before = {**before, phase.name: _metrics(phase, found[-1])}
    return found


def _metrics(phase: Phase, inputs: Inputs) -> Any:
    """The shapes of a phase's metrics."""
    evaluate = make_losses(phase.loss_fn)

    def metrics(arrays: Any, batch: Any, context: Any) -> Any:
        _, loss = evaluate(inputs.params(arrays), batch, context)
        return metrics_of(loss, loss.total)

    return jax.eval_shape(metrics, inputs.arrays, inputs.batch, inputs.context)


def trace_phase(phase: Phase, inputs: Inputs, trained: Sequence[str]) -> Traced:
    """Traces the losses of a phase and follows every leaf through them; `trained` are the parts of all phases."""
    evaluate = make_losses(phase.loss_fn)
    floats = {path: leaf for path, leaf in inputs.arrays.items() if not non_float(path, leaf)}
    bits = {path: 1 << i for i, path in enumerate(inputs.arrays)}

    def program(arrays: Any, tangents: Any, batch: Any, context: Any) -> Any:
        def losses(floats: Any) -> Any:
            return evaluate(inputs.params({**arrays, **floats}), batch, context)[0]

        values, linear = jax.linearize(losses, {path: arrays[path] for path in floats})
        return values, linear(tangents)

    jaxpr, shapes = jax.make_jaxpr(program, return_shape=True)(inputs.arrays, floats, inputs.batch, inputs.context)

    def marked(gates: Iterable[str]) -> Any:
        """The marks of the losses and of their tangents, by name, with these leaves as gates."""
        of_arrays = {path: Marks(uses=bit, gates=bit if path in gates else 0) for path, bit in bits.items()}
        of_tangents = {path: Marks(tangents=bits[path], free=bits[path]) for path in floats}
        others = jax.tree.map(lambda _: Marks(), (inputs.batch, inputs.context))
        given = jax.tree.leaves((of_arrays, of_tangents, others), is_leaf=lambda node: isinstance(node, Marks))
        return jax.tree.unflatten(jax.tree.structure(shapes), flow(jaxpr.jaxpr, given))

    def paths(sets: Iterable[int]) -> frozenset[str]:
        every = functools.reduce(operator.or_, sets, 0)
        return frozenset(path for path, bit in bits.items() if every & bit)

    def free(gates: Iterable[str]) -> frozenset[str]:
        return paths(mark.free for mark in marked(gates)[1].values())

    values, tangents = marked(())
    frozen = [leaf.path for leaf in inputs.parts.leaves if leaf.part not in trained and leaf.path in floats]
    gradients, ungated = paths(mark.tangents for mark in tangents.values()), free(frozen)
    gated = {}
    for part in phase.trained:
        mine = gradients & set(inputs.parts.paths(part))
        if mine and not mine & ungated:
            gated[part] = tuple(path for path in frozen if not mine & free([path])) or tuple(frozen)
    labels = {name: _label(phase.name, name, len(values)) for name in values}
    every = {part: dict.fromkeys(values, 1.0) for part in phase.trained}
    takes = normalised(phase.route, phase.trained) if phase.route else every
    return Traced(
        reached={labels[name]: paths([mark.tangents]) for name, mark in tangents.items()},
        taken={part: tuple(labels[name] for name in losses) for part, losses in takes.items()},
        used=paths(mark.uses for mark in values.values()),
        gated=gated,
    )


def backward_flops(phase: Phase, inputs: Inputs) -> tuple[float, dict[str, float]]:
    """The FLOPs a cycle of a phase's backward pass, of the sum of its losses, and what freezing each part saves."""

    def flops(parts: Sequence[str]) -> float:
        gradient = make_gradient(phase.loss_fn, inputs.parts, parts)

        def program(arrays: Any, batch: Any, context: Any) -> Any:
            grads, _, total = gradient(inputs.params(arrays), batch, context)
            return grads, total

        cost: Any = jax.jit(program).lower(inputs.arrays, inputs.batch, inputs.context).cost_analysis()
        return float(cost["flops"])

    whole, forward = flops(phase.trained), flops(())
    saved = {part: whole - flops([other for other in phase.trained if other != part]) for part in phase.trained}
    often = phase.repeat / phase.every
    return often * (whole - forward), {part: often * flops for part, flops in saved.items()}


def _label(phase: str, loss: str, count: int) -> str:
    if not phase:
        return loss
    return phase if count == 1 else f"{phase}/{loss}"
