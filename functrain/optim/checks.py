"""What an optimizer refuses: each check is a function of what was given, and its error says what to write instead."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import OptimizerError, PartitionError
from functrain.optim.declared import accepted
from functrain.optim.learning_rate import rates_in
from functrain.optim.transforms import Frozen, Transform
from functrain.tree.model_state import told_of_random
from functrain.tree.partition import Partition, Split
from functrain.tree.scalars import wrong_scalar
from functrain.tree.selectors import non_float
from functrain.tree.text import around_first_difference, did_you_mean, listed
from functrain.tree.warn import warn

_HINT = "split gradients come from make_train_step(loss_fn, parts, wrt=optim.trained) or parts.split(grads)"


def check_transforms(parts: Partition, transforms: Mapping[str, Transform]) -> None:
    """Raises unless every part has one transform; warns of arrays at several trained paths."""
    if not isinstance(parts, Partition) or not isinstance(transforms, Mapping):
        raise OptimizerError(
            "Optimizer(parts, transforms) takes an ft.partition(...) and a dict of a transform for each part, not"
            f" {type(parts).__name__} and {type(transforms).__name__}"
        )
    if unknown := [part for part in transforms if part not in parts.names]:
        raise OptimizerError(
            f"transforms without a part: {listed(unknown)}; the parts are {listed(parts.names, 30)}"
            f"{did_you_mean(unknown, parts.names)}"
        )
    if missing := [part for part in parts.names if part not in transforms]:
        raise OptimizerError(f"parts without a transform: {listed(missing)}; give each one, or ft.FROZEN")
    for part, tx in transforms.items():
        if not isinstance(tx, Frozen) and not (hasattr(tx, "init") and hasattr(tx, "update")):
            advice = "ft.FROZEN for a part that is not trained" if tx is None or tx == "frozen" else "optax.adam(1e-3)"
            raise OptimizerError(f"part {part!r}: {tx!r} is no optax transform; write e.g. {advice}")
    _tell_of_shared(parts, [part for part, tx in transforms.items() if not isinstance(tx, Frozen)])


def _tell_of_shared(parts: Partition, trained: Sequence[str]) -> None:
    """Warns of arrays at several trained paths; one that is frozen at the others, as a target network is, is meant."""
    of_trained = {path for part in trained for path in parts.paths(part)}
    groups = [each for paths in parts.shared if len(each := [path for path in paths if path in of_trained]) > 1]
    if groups:
        shown = "; ".join(" and ".join(map(repr, group[:4])) for group in groups[:3])
        arrays = "one array" if len(groups) == 1 else f"{len(groups):,} arrays"
        more = f" and {len(groups) - 3:,} more" if len(groups) > 3 else ""
        warn(
            f"{sum(map(len, groups)):,} trained leaves are {arrays} ({shown}{more}), but parameters of their own, which"
            " drift apart from the first step on: to tie them, keep one and use it twice in the model; if they are"
            " meant to differ, copy one"
        )


def check_joins(frozen_until: Mapping[str, int], transforms: Mapping[str, Transform], trained: Sequence[str]) -> None:
    """Raises unless it is trained parts that join later, each at a step, and one is there from the first."""
    if not isinstance(frozen_until, Mapping):
        raise OptimizerError(f"frozen_until={frozen_until!r}: give a step by part, frozen_until={{'encoder': 200}}")
    if unknown := [part for part in frozen_until if part not in transforms]:
        raise OptimizerError(
            f"frozen_until for the unknown {listed(unknown)}; the parts are {listed(transforms, 30)}"
            f"{did_you_mean(unknown, transforms)}"
        )
    for part, step in frozen_until.items():
        if part not in trained:
            raise OptimizerError(
                f"frozen_until for part {part!r}, which is frozen to the end: give it a transform in the place of"
                " ft.FROZEN, or leave it out of frozen_until"
            )
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise OptimizerError(
                f"frozen_until={{{part!r}: {step!r}}}: give a whole number of at least 1, the steps that are made"
                " without the part"
            )
    if trained and not {*trained} - {*frozen_until}:
        raise OptimizerError(
            f"frozen_until has every trained part, {listed(trained)}, and none would learn at first: leave one out"
        )


def check_params(parts: Partition, trained: Sequence[str], split: Split) -> None:
    """Raises unless the trained leaves are floating point, and of the shapes that were partitioned."""
    for part in trained:
        if bad := {path: leaf for path, leaf in split[part].items() if non_float(path, leaf)}:
            if random := told_of_random(parts.state, bad):
                raise OptimizerError(f"part {part!r} is trained, but holds {random}")
            raise OptimizerError(
                f"part {part!r} is trained, but holds {listed(bad)}, which is not floating point: give such leaves"
                ' a part of their own ("static": ft.non_float) and make it ft.FROZEN'
            )
        for path, known in parts.shapes(part).items():
            if jnp.shape(split[part][path]) != known.shape:
                raise OptimizerError(
                    f"{path!r} has shape {jnp.shape(split[part][path])}, but {known.shape} when it was partitioned:"
                    " partition these params, or give those"
                )


def check_one_rate(part: str, state: Any) -> None:
    """Raises for a state with more than one `with_lr`."""
    if len(rates_in(state)) > 1:
        raise OptimizerError(
            f"part {part!r} has {len(rates_in(state))} with_lr, of which lr={{{part!r}: ...}} could mean any: keep one,"
            " or give each a part of its own"
        )


def check_no_schedule(part: str, state: Any) -> None:
    """Raises if a schedule says the rate in a state."""
    if rates_in(state)[0].setting is None:
        raise OptimizerError(
            f"the rate of part {part!r} follows a schedule and can't be set for good: give it at each step,"
            f" step(..., lr={{{part!r}: ...}}), or make the part with a constant rate"
        )


def check_grads(
    grads: Mapping[str, Mapping[str, Any]], parts: Partition, trained: Sequence[str], params: Split
) -> None:
    """Raises unless the gradients are split, of trained parts, and shaped like their parameters."""
    if not isinstance(grads, Mapping):
        raise OptimizerError(
            f"gradients must be split, {{part: {{path: gradient}}}}, not {type(grads).__name__}: {_HINT}"
        )
    if unknown := [part for part in grads if part not in parts.names]:
        raise OptimizerError(
            f"gradients of unknown parts: {listed(unknown)}; the parts are {listed(parts.names, 30)}; {_HINT}"
        )
    if frozen := [part for part in grads if part not in trained]:
        raise OptimizerError(
            f"gradients of frozen parts: {listed(frozen)}; do not compute them:"
            " make_train_step(loss_fn, parts, wrt=optim.trained)"
        )
    for part, flat in grads.items():
        try:
            parts.check_part(part, flat)
        except PartitionError as error:
            raise PartitionError(f"gradients of {error}; {_HINT}") from None
        check_shapes(flat, params[part], f"the gradients of part {part!r}", per_example=True)


def check_shapes(flat: Mapping[str, Any], params: Mapping[str, Any], what: str, *, per_example: bool = False) -> None:
    """Raises unless each leaf is shaped like its parameter, where allowed behind a leading axis of examples."""
    for path, leaf in flat.items():
        given, expected = jnp.shape(leaf), jnp.shape(params[path])
        if given != expected and not (per_example and given[1:] == expected and len(given) > len(expected)):
            raise OptimizerError(f"{what}: {path!r} has shape {given}, its parameter {expected}; they must be the same")


def check_state(opt_state: Mapping[str, Any], structures: Mapping[str, Any]) -> None:
    """Raises unless an optimizer state is of the given tree structures, by part."""
    if not isinstance(opt_state, Mapping):
        raise OptimizerError(
            f"an optimizer state is {{part: state}}, not {type(opt_state).__name__}: give what optim.init(params)"
            " returned, or the opt_state of a TrainState"
        )
    if opt_state.keys() != structures.keys():
        raise OptimizerError(
            f"the optimizer state is of the parts {listed(opt_state)}, the optimizer trains {listed(structures)}:"
            " use optim.init(params) of this optimizer"
        )
    for part, state in opt_state.items():
        if jax.tree.structure(state) != structures[part]:
            given, expected = around_first_difference(jax.tree.structure(state), structures[part])
            raise OptimizerError(
                f"the state of part {part!r} is not one that its transform makes: {given} where {expected} was"
                " expected; use optim.init(params) of this optimizer"
            )


def check_part_state(opt_state: Mapping[str, Any], structures: Mapping[str, Any], part: str) -> None:
    """Raises unless an optimizer state is of the given tree structures, and has this part."""
    check_state(opt_state, structures)
    if part not in structures:
        raise OptimizerError(
            f"part {part!r} has no optimizer state: it is frozen or unknown; the trained parts are"
            f" {listed(structures, 30)}"
        )


def checked_rates(
    lr: Mapping[str, Any] | None, opt_state: Mapping[str, Any], transforms: Mapping[str, Transform]
) -> dict[str, jax.Array]:
    """The rates by part as float32 scalars, each of a trained part that has one to set."""
    trained = [part for part, tx in transforms.items() if not isinstance(tx, Frozen)]
    if lr is not None and not isinstance(lr, Mapping):
        raise OptimizerError(f"lr={lr!r}: give a rate by part, e.g. lr={{{trained[0]!r}: 1e-4}}")
    rates = {}
    for part, rate in (lr or {}).items():
        if part not in transforms:
            raise OptimizerError(
                f"lr for the unknown part {part!r}; the parts are {listed(transforms, 30)}"
                f"{did_you_mean([part], transforms)}"
            )
        if part not in trained:
            raise OptimizerError(f"lr for part {part!r}, which is frozen: give it a transform, or leave it out of lr")
        if not rates_in(opt_state[part]):
            raise OptimizerError(
                f"lr for part {part!r}, whose transform has no rate to set: make it with"
                " ft.with_lr(optax.adam, 1e-3) in the place of optax.adam(1e-3)"
            )
        if wrong := wrong_scalar(rate):
            raise OptimizerError(
                f"lr for part {part!r} is {wrong}: give a finite number of at least 0; a schedule goes into the"
                " transform, ft.with_lr(optax.adam, schedule)"
            )
        rates[part] = jnp.asarray(rate, jnp.float32)
    return rates


def check_extra_args(extra: Mapping[str, Any], rates: Mapping[str, Any], transforms: Mapping[str, Transform]) -> None:
    """Raises for a rate that would reach every part, or would not reach its own."""
    if "learning_rate" in extra:
        raise OptimizerError("learning_rate= would set the rate of every part: write lr={part: rate}")
    if lost := [part for part in rates if not accepted(transforms[part], {"learning_rate": None})]:
        raise OptimizerError(
            f"lr for part {listed(lost)}: the transform around its with_lr takes no extra arguments, so that the"
            " rate would be lost; make it an optax.GradientTransformationExtraArgs that passes them on"
        )
