"""One optax transform per part."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from functrain.adopt import Adoption, adopted
from functrain.errors import OptimizerError, PartitionError
from functrain.learning_rate import rates_in, with_rate
from functrain.optimizer_state import in_one_dtype, like_before, placed, state_shardings
from functrain.tree.arrays import as_array, global_norm
from functrain.tree.partition import Partition, Split, table
from functrain.tree.paths import PyTree, flatten, unflatten
from functrain.tree.selectors import non_float
from functrain.tree.text import around_first_difference, listed


class Frozen:
    """The type of `FROZEN`."""

    def __repr__(self) -> str:
        return "FROZEN"


FROZEN: Final = Frozen()
"""In the place of a transform: a part that is never updated, and costs no gradient and no state."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Optimizer:
    """One optax transform per part of a partition.

    >>> from functrain import partition, with_lr
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    >>> parts = partition(params, {"head": "head", "body": ...})
    >>> optim = Optimizer(parts, {"head": with_lr(optax.sgd, 0.5), "body": FROZEN})
    >>> opt_state = optim.init(params)
    >>> params, opt_state = optim.step(params, {"head": {"head": jnp.ones(2)}}, opt_state)
    >>> params["head"].tolist(), params["body"].tolist()
    ([0.5, 0.5], [1.0, 1.0])

    A transform is given flat trees, `{path: leaf}`: so are its masks and callables. `print(optim)` is a table.

    Args:
      parts: the partition.
      transforms: for every part an optax transform, or `FROZEN`.
      clip_norm: the largest global norm, a positive float, that the gradients given to one `step` or `update` may have,
        all parts together; larger ones are scaled down. To clip a part alone, chain `optax.clip_by_global_norm` with
        its transform.

    Raises:
      OptimizerError: a part without a transform, or a transform without a part.
    """

    parts: Partition
    transforms: Mapping[str, optax.GradientTransformation | Frozen]
    clip_norm: float | None = dataclasses.field(default=None, kw_only=True)
    _structures: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Partition) or not isinstance(self.transforms, Mapping):
            raise OptimizerError(
                "Optimizer(parts, transforms) takes an ft.partition(...) and a dict of a transform for each part, not"
                f" {type(self.parts).__name__} and {type(self.transforms).__name__}"
            )
        object.__setattr__(self, "transforms", dict(self.transforms))
        names = self.parts.names
        if missing := [part for part in names if part not in self.transforms]:
            raise OptimizerError(f"parts without a transform: {listed(missing)}; give each one, or ft.FROZEN")
        if unknown := [part for part in self.transforms if part not in names]:
            raise OptimizerError(f"transforms without a part: {listed(unknown)}; the parts are {listed(names, 30)}")
        for part, tx in self.transforms.items():
            if not isinstance(tx, Frozen) and not (hasattr(tx, "init") and hasattr(tx, "update")):
                raise OptimizerError(f"part {part!r}: {tx!r} is no optax transform; write e.g. optax.adam(1e-3)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise OptimizerError(f"clip_norm={self.clip_norm}: give a positive norm, or None not to clip")

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that have a transform; what to give to `make_train_step(..., wrt=optim.trained)`."""
        return tuple(part for part in self.parts.names if not isinstance(self.transforms[part], Frozen))

    def init(self, params: PyTree) -> dict[str, Any]:
        """The optimizer state of every trained part: `{part: state of its transform}`.

        Called outside of `jit`, moments are laid out as their parameters, and scalars are replicated over their mesh.

        Raises:
          PartitionError: params are not of the partition's structure.
          OptimizerError: a shape is not the partition's, a trained leaf is not floating point, or a part has two
            `with_lr`.
        """
        split = self.parts.split(params)
        self._check_params(split)
        opt_state = {}
        for part in self.trained:
            opt_state[part] = placed(jax.tree.map(as_array, self._tx(part).init(split[part])), split[part])
            if len(rates_in(opt_state[part])) > 1:
                raise OptimizerError(
                    f"part {part!r} has {len(rates_in(opt_state[part]))} with_lr, of which lr={{{part!r}: ...}} could"
                    " mean any: keep one, or give each a part of its own"
                )
        return opt_state

    def update(
        self,
        grads: Mapping[str, Mapping[str, Any]],
        opt_state: Mapping[str, Any],
        params: PyTree,
        *,
        lr: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[Split, dict[str, Any]]:
        """The updates that `step` adds to the parameters, in optax's own form.

        Args:
          grads: split gradients of any trained parts, `{part: {path: gradient}}`. A part that is not there is left as
            it is: parameters, decay, moments, counts, schedule.
          opt_state: from `init` or the last step.
          params: the whole tree.
          lr: learning rates of this step alone, by part; parts that make no step now may be named too.
          **extra: optax's extra arguments (`value=`); given to every transform that takes them.

        Returns:
          `{part: {path: update}}` of the given parts, and the whole new state, of unchanged structure and dtypes.

        Raises:
          OptimizerError: gradients or `lr` of an unknown or frozen part; wrong shapes; `lr` for a part without
            `with_lr`; a state that is not of this optimizer, or that a transform returns in another structure.
          PartitionError: a part's gradients have not its paths, or params not the partition's structure.
        """
        if "learning_rate" in extra:
            raise OptimizerError("learning_rate= would set the rate of every part: write lr={part: rate}")
        split = self.parts.split(params)
        self._check_grads(grads, split)
        self._check_state(opt_state)
        rates = self._checked_rates(lr, opt_state)
        self._check_extra_args(rates)
        if self.clip_norm is not None:
            grads = _clipped(grads, self.clip_norm)
        updates: Split = {}
        new_state = dict(opt_state)
        for part, flat in grads.items():
            given = {**extra, "learning_rate": rates[part]} if part in rates else extra
            updates[part], state = self._tx(part).update(*in_one_dtype(flat, opt_state[part], split[part]), **given)
            new_state[part] = like_before(state, opt_state[part], part)
            _check_shapes(updates[part], split[part], f"the updates of part {part!r}")
        return updates, new_state

    def step(
        self,
        params: PyTree,
        grads: Mapping[str, Mapping[str, Any]],
        opt_state: Mapping[str, Any],
        *,
        lr: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Updates the parameters of the parts whose gradients are given. Arguments and errors as for `update`.

        Returns:
          The whole new params, each leaf of its old dtype, and the new state. A `jit` of one's own over several devices
          may lay out state anew that is not shaped like its parameter; `out_shardings=optim.shardings(...)` keeps it.
        """
        updates, opt_state = self.update(grads, opt_state, params, lr=lr, **extra)
        return self.apply_updates(params, updates), opt_state

    def apply_updates(self, params: PyTree, updates: Mapping[str, Mapping[str, Any]]) -> PyTree:
        """The whole params with the updates of some parts added, each leaf of its old dtype."""
        split = self.parts.split(params)
        new = {part: optax.apply_updates(split[part], dict(updates[part])) for part in updates}
        return self.parts.merge(new, into=params)

    def learning_rates(self, opt_state: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The rates last used, or set since, of the parts that have a `with_lr`: `{part: float32 scalar}`."""
        self._check_state(opt_state)
        found = {part: rates_in(opt_state[part]) for part in self.trained}
        return {part: states[0].learning_rate for part, states in found.items() if states}

    def with_learning_rates(self, opt_state: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
        """The same state with other learning rates from now on.

        Args:
          opt_state: from `init` or the last step.
          rates: `{part: scalar}`.

        Raises:
          OptimizerError: an unknown or frozen part, one without `with_lr`, or one whose rate a schedule says.
        """
        self._check_state(opt_state)
        new_state = dict(opt_state)
        for part, rate in self._checked_rates(rates, opt_state).items():
            if rates_in(opt_state[part])[0].setting is None:
                raise OptimizerError(
                    f"the rate of part {part!r} follows a schedule and can't be set for good: give it at each step,"
                    f" step(..., lr={{{part!r}: ...}}), or make the part with a constant rate"
                )
            new_state[part] = with_rate(opt_state[part], rate)
        return new_state

    def shardings(self, params_shardings: PyTree) -> dict[str, Any]:
        """The shardings of the optimizer state, from those of the parameters; for `jax.jit(..., out_shardings=)`.

        Args:
          params_shardings: a tree like params, of shardings: `jax.tree.map(lambda p: p.sharding, params)`.

        Returns:
          A tree like the state: a parameter's sharding for state that is shaped like it; replicated for the rest.
        """
        split = self.parts.split(params_shardings)
        found = {}
        for part in self.trained:
            shapes = self._shapes(part)
            found[part] = state_shardings(jax.eval_shape(self._tx(part).init, shapes), shapes, split[part])
        return found

    def adopt(
        self, other: "Optimizer", other_state: Mapping[str, Any], params: PyTree
    ) -> tuple[dict[str, Any], Adoption]:
        """A state for this optimizer with what fits of another one's: a backbone unfrozen, a part split, SGD for Adam.

        >>> from functrain import partition
        >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
        >>> parts = partition(params, {"head": "head", "body": "body"})
        >>> frozen = Optimizer(parts, {"head": optax.adam(1e-3), "body": FROZEN})
        >>> optim = Optimizer(parts, {"head": optax.adam(1e-3), "body": optax.adam(1e-4)})
        >>> opt_state, report = optim.adopt(frozen, frozen.init(params), params)
        >>> print(report)
        head: carried over from 'head': count (1 leaf), mu (1 leaf), nu (1 leaf)
        body: started anew: count (1 leaf), mu (1 leaf), nu (1 leaf)

        Moments follow their parameter's path, wherever the transform has a field of the same name; counts follow if
        a part comes from a single one; a learning rate is this optimizer's own.

        Args:
          other: the optimizer that the state is of.
          other_state: its state; what is carried over is not copied.
          params: the whole tree.

        Raises:
          OptimizerError: a state that is not of the other optimizer.
          PartitionError: params are not of the partition's structure.
        """
        other._check_state(other_state)
        fresh = self.init(params)
        states, report = adopted(
            {part: flatten(state) for part, state in fresh.items()},
            {part: flatten(state) for part, state in other_state.items()},
            {part: self.parts.paths(part) for part in self.parts.names},
            {part: other.parts.paths(part) for part in other.parts.names},
        )
        opt_state = {part: unflatten(flat, like=fresh[part]) for part, flat in states.items()}
        split = self.parts.split(params)
        return {part: placed(state, split[part]) for part, state in opt_state.items()}, report

    @property
    def described(self) -> dict[str, str]:
        """What made the transform of each part, as far as it can be told; "frozen" for a frozen one."""
        return {part: _described(self.transforms[part]) for part in self.parts.names}

    def __str__(self) -> str:
        return table(self.parts, "optimizer", list(self.described.values()))

    def __repr__(self) -> str:
        described = ", ".join(f"{part}: {name}" for part, name in self.described.items())
        return f"Optimizer({described})"

    def _tx(self, part: str) -> optax.GradientTransformationExtraArgs:
        tx = self.transforms[part]
        assert not isinstance(tx, Frozen)
        # optax.MultiSteps takes extra arguments, but is not of the type that says so.
        return (
            optax.GradientTransformationExtraArgs(tx.init, tx.update)
            if _takes_extra_args(tx)
            else (optax.with_extra_args_support(tx))
        )

    def _shapes(self, part: str) -> dict[str, jax.ShapeDtypeStruct]:
        mine = (leaf for leaf in self.parts.leaves if leaf.part == part)
        return {leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in mine}

    def _check_params(self, split: Split) -> None:
        known = {leaf.path: leaf.shape for leaf in self.parts.leaves}
        for part in self.trained:
            if bad := [path for path, leaf in split[part].items() if non_float(path, leaf)]:
                raise OptimizerError(
                    f"part {part!r} is trained, but holds {listed(bad)}, which is not floating point: give such leaves"
                    ' a part of their own ("static": ft.non_float) and make it ft.FROZEN'
                )
            for path, leaf in split[part].items():
                if jnp.shape(leaf) != known[path]:
                    raise OptimizerError(
                        f"{path!r} has shape {jnp.shape(leaf)}, but {known[path]} when it was partitioned: partition"
                        " these params, or give those"
                    )

    def _check_grads(self, grads: Mapping[str, Mapping[str, Any]], split: Split) -> None:
        hint = "split gradients come from make_train_step(loss_fn, parts, wrt=optim.trained) or parts.split(grads)"
        if not isinstance(grads, Mapping):
            raise OptimizerError(
                f"gradients must be split, {{part: {{path: gradient}}}}, not {type(grads).__name__}: {hint}"
            )
        if unknown := [part for part in grads if part not in self.parts.names]:
            raise OptimizerError(
                f"gradients of unknown parts: {listed(unknown)}; the parts are {listed(self.parts.names, 30)}; {hint}"
            )
        if frozen := [part for part in grads if part not in self.trained]:
            raise OptimizerError(
                f"gradients of frozen parts: {listed(frozen)}; do not compute them:"
                " make_train_step(loss_fn, parts, wrt=optim.trained)"
            )
        for part, flat in grads.items():
            try:
                self.parts.check_part(part, flat)
            except PartitionError as error:
                raise PartitionError(f"gradients of {error}; {hint}") from None
            _check_shapes(flat, split[part], f"the gradients of part {part!r}", per_example=True)

    def _check_state(self, opt_state: Mapping[str, Any]) -> None:
        if not isinstance(opt_state, Mapping):
            raise OptimizerError(
                f"an optimizer state is {{part: state}}, not {type(opt_state).__name__}: give what optim.init(params)"
                " returned, or the opt_state of a TrainState"
            )
        if set(opt_state) != set(self.trained):
            raise OptimizerError(
                f"the optimizer state is of the parts {listed(opt_state)}, the optimizer trains {listed(self.trained)}:"
                " use optim.init(params) of this optimizer"
            )
        for part, state in opt_state.items():
            if part not in self._structures:
                self._structures[part] = jax.tree.structure(jax.eval_shape(self._tx(part).init, self._shapes(part)))
            if jax.tree.structure(state) != self._structures[part]:
                given, expected = around_first_difference(jax.tree.structure(state), self._structures[part])
                raise OptimizerError(
                    f"the state of part {part!r} is not one that its transform makes: {given} where {expected} was"
                    " expected; use optim.init(params) of this optimizer"
                )

    def _checked_rates(self, lr: Mapping[str, Any] | None, opt_state: Mapping[str, Any]) -> dict[str, jax.Array]:
        if lr is not None and not isinstance(lr, Mapping):
            raise OptimizerError(f"lr={lr!r}: give a rate by part, e.g. lr={{{self.trained[0]!r}: 1e-4}}")
        rates = {}
        for part, rate in (lr or {}).items():
            if part not in self.parts.names:
                raise OptimizerError(f"lr for the unknown part {part!r}; the parts are {listed(self.parts.names, 30)}")
            if part not in self.trained:
                raise OptimizerError(
                    f"lr for part {part!r}, which is frozen: give it a transform, or leave it out of lr"
                )
            if not rates_in(opt_state[part]):
                raise OptimizerError(
                    f"lr for part {part!r}, whose transform has no rate to set: make it with"
                    " ft.with_lr(optax.adam, 1e-3) in the place of optax.adam(1e-3)"
                )
            if callable(rate) or rate is None or isinstance(rate, str) or jnp.shape(rate) != ():
                is_array = hasattr(rate, "shape")
                what = f"an array of shape {jnp.shape(rate)}" if is_array else f"of type {type(rate).__name__}"
                raise OptimizerError(
                    f"lr for part {part!r} is {what}: give a scalar; a schedule goes into the transform,"
                    " ft.with_lr(optax.adam, schedule)"
                )
            rates[part] = jnp.asarray(rate, jnp.float32)
        return rates

    def _check_extra_args(self, rates: Mapping[str, Any]) -> None:
        if lost := [part for part in rates if not _takes_extra_args(self.transforms[part])]:
            raise OptimizerError(
                f"lr for part {listed(lost)}: the transform around its with_lr takes no extra arguments, so that the"
                " rate would be lost; make it an optax.GradientTransformationExtraArgs that passes them on"
            )


def _check_shapes(flat: Mapping[str, Any], params: Mapping[str, Any], what: str, *, per_example: bool = False) -> None:
    """Raises unless each leaf is shaped like its parameter, where allowed behind a leading axis of examples."""
    for path, leaf in flat.items():
        given, expected = jnp.shape(leaf), jnp.shape(params[path])
        if given != expected and not (per_example and given[1:] == expected and len(given) > len(expected)):
            raise OptimizerError(f"{what}: {path!r} has shape {given}, its parameter {expected}; they must be the same")


def _clipped(grads: Mapping[str, Mapping[str, Any]], clip_norm: float) -> Split:
    """The gradients, scaled down together to a global norm of at most `clip_norm`, computed in float32 or wider."""
    scale = jnp.minimum(1.0, clip_norm / global_norm(grads))
    return {
        part: {path: (grad * scale).astype(jnp.result_type(grad)) for path, grad in flat.items()}
        for part, flat in grads.items()
    }


def _takes_extra_args(tx: Any) -> bool:
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(tx.update).parameters.values())
    return takes_any or isinstance(tx, optax.GradientTransformationExtraArgs)


def _described(tx: optax.GradientTransformation | Frozen) -> str:
    """What made a transform: its factory for `with_lr`, for others as much as the name of its update function tells."""
    return "frozen" if isinstance(tx, Frozen) else tx.update.__qualname__.split(".<locals>")[0]
