"""What an optimizer refuses: each check is a function of what was given, and its error says what to write instead."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import OptimizerError, PartitionError
from functrain.optim.declared import accepted
from functrain.optim.held import RATE, held_in, hyperparameters_in, settings_in
from functrain.optim.transforms import Frozen, Transform, state_name
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


def check_others(
    others: Mapping[str, Mapping[str, Transform]], transforms: Mapping[str, Transform], trained: Sequence[str]
) -> None:
    """Raises unless the other transforms are of trained parts, and their states have names of their own."""
    if not isinstance(others, Mapping) or not all(isinstance(of_parts, Mapping) for of_parts in others.values()):
        raise OptimizerError(
            f"others={others!r}: give transforms by name and part, {{'aux': {{'shared': optax.sgd(0.1)}}}}"
        )
    for name, of_parts in others.items():
        for part, tx in of_parts.items():
            if part not in trained:
                raise OptimizerError(
                    f"others has a transform of {part!r} in {name!r}, which is frozen or no part: give it to a trained"
                    f" part, of {listed(trained, 30)}{did_you_mean([part], trained)}"
                )
            if isinstance(tx, Frozen) or not (hasattr(tx, "init") and hasattr(tx, "update")):
                raise OptimizerError(
                    f"part {part!r} in {name!r}: {tx!r} is no optax transform; write e.g. optax.adam(1e-3)"
                )
            if state_name(part, name) in transforms:
                raise OptimizerError(
                    f"the state of {part!r} in {name!r} would have the name of the part {state_name(part, name)!r}:"
                    " rename one of them"
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


def check_one_of_each(part: str, state: Any) -> None:
    """Raises for a state with two hyperparameters of one name."""
    names = [name for held in held_in(state) for name in held.hyperparameters]
    if (count := names.count(RATE)) > 1:
        raise OptimizerError(
            f"part {part!r} has {count} with_lr, of which lr={{{part!r}: ...}} could mean any: keep one, or give each a"
            " part of its own"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptimizerError(
            f"part {part!r} has {listed(twice)} twice, in two with_state, of which set={{{part!r}: ...}} could mean"
            " either: keep one a constant, or give each a part of its own"
        )


def check_no_schedule(part: str, state: Any, names: Iterable[str]) -> None:
    """Raises if a schedule says one of the hyperparameters in a state."""
    for name in names:
        if name in settings_in(state):
            continue
        if name == RATE:
            raise OptimizerError(
                f"the rate of part {part!r} follows a schedule and can't be set for good: give it at each step,"
                f" step(..., lr={{{part!r}: ...}}), or make the part with a constant rate"
            )
        raise OptimizerError(
            f"{name!r} of part {part!r} follows a schedule and can't be set for good: give it at each step,"
            f" step(..., set={{{part!r}: {{{name!r}: ...}}}}), or make the part with a constant"
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


def check_using(using: str | None, others: Mapping[str, Any]) -> None:
    """Raises for the name of other transforms that an optimizer does not have."""
    if using is not None and using not in others:
        raise OptimizerError(
            f"using={using!r}: the optimizer has no other transforms of that name, of {listed(others) or 'none'}"
            f"{did_you_mean([using], others)}; make it with others={{{using!r}: {{part: transform}}}}"
        )


def check_part_state(opt_state: Mapping[str, Any], structures: Mapping[str, Any], part: str) -> None:
    """Raises unless an optimizer state is of the given tree structures, and has this part."""
    check_state(opt_state, structures)
    if part not in structures:
        raise OptimizerError(
            f"part {part!r} has no optimizer state: it is frozen or unknown; the trained parts are"
            f" {listed(structures, 30)}"
        )


def checked_settings(
    lr: Mapping[str, Any] | None,
    settings: Mapping[str, Mapping[str, Any]] | None,
    opt_state: Mapping[str, Any],
    transforms: Mapping[str, Transform],
) -> dict[str, dict[str, jax.Array]]:
    """Hyperparameters by part and name as float32 scalars, each of a trained part that has one to set.

    Args:
      lr: learning rates by part.
      settings: hyperparameters by part and name, of which a rate may be one.
      opt_state: the optimizer state.
      transforms: of all parts.
    """
    trained = [part for part, tx in transforms.items() if not isinstance(tx, Frozen)]
    if lr is not None and not isinstance(lr, Mapping):
        raise OptimizerError(f"lr={lr!r}: give a rate by part, e.g. lr={{{trained[0]!r}: 1e-4}}")
    if settings is not None and not (
        isinstance(settings, Mapping) and all(isinstance(each, Mapping) for each in settings.values())
    ):
        raise OptimizerError(
            f"set={settings!r}: give hyperparameters by part and name, e.g. set={{{trained[0]!r}: {{'b1': 0.8}}}}"
        )
    found: dict[str, dict[str, jax.Array]] = {}
    for part, rate in (lr or {}).items():
        _check_held("lr", part, RATE, opt_state, transforms)
        found[part] = {RATE: _checked_scalar(rate, part, RATE, "lr")}
    for part, named in (settings or {}).items():
        for name, value in named.items():
            _check_held("set", part, name, opt_state, transforms)
            if name in found.setdefault(part, {}):
                raise OptimizerError(f"part {part!r} has its rate in lr= and in set=: leave one out")
            found[part][name] = _checked_scalar(value, part, name, "set")
    return found


def _check_held(
    given: str, part: str, name: str, opt_state: Mapping[str, Any], transforms: Mapping[str, Transform]
) -> None:
    """Raises unless a part is trained and has a hyperparameter of that name as state."""
    if part not in transforms:
        raise OptimizerError(
            f"{given} for the unknown part {part!r}; the parts are {listed(transforms, 30)}"
            f"{did_you_mean([part], transforms)}"
        )
    if isinstance(transforms[part], Frozen):
        raise OptimizerError(
            f"{given} for part {part!r}, which is frozen: give it a transform, or leave it out of {given}"
        )
    known = hyperparameters_in(opt_state[part])
    if name in known:
        return
    if given == "lr":
        raise OptimizerError(
            f"lr for part {part!r}, whose transform has no rate to set: make it with"
            " ft.with_lr(optax.adam, 1e-3) in the place of optax.adam(1e-3)"
        )
    has = f"what is state of it is {listed(known, 30)}" if known else "nothing of it is state"
    raise OptimizerError(
        f"set for part {part!r}: it has no {name!r} to set; {has}{did_you_mean([name], known)}; make it with"
        f" ft.with_state(optax.adamw, {name}=...)"
    )


def _checked_scalar(value: Any, part: str, name: str, given: str) -> jax.Array:
    if wrong := wrong_scalar(value, least=0.0 if name == RATE else -math.inf):
        where = "ft.with_lr(optax.adam, schedule)" if given == "lr" else f"ft.with_state(optax.adamw, {name}=schedule)"
        of = f"part {part!r}" if given == "lr" else f"{name!r} of part {part!r}"
        number = "a finite number of at least 0" if name == RATE else "a finite number"
        raise OptimizerError(f"{given} for {of} is {wrong}: give {number}; a schedule goes into the transform, {where}")
    return jnp.asarray(value, jnp.float32)


def check_extra_args(
    extra: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], transforms: Mapping[str, Transform]
) -> None:
    """Raises for a hyperparameter that would reach every part, or would not reach its own."""
    if RATE in extra:
        raise OptimizerError("learning_rate= would set the rate of every part: write lr={part: rate}")
    for part, named in settings.items():
        if lost := [name for name in named if not accepted(transforms[part], {name: None})]:
            given, held = ("lr", "with_lr") if lost == [RATE] else ("set", "with_state")
            raise OptimizerError(
                f"{given} for part {part!r}: the transform around its {held} takes no extra arguments, so that"
                f" {'the rate' if given == 'lr' else listed(lost)} would be lost; make it an"
                " optax.GradientTransformationExtraArgs that passes them on"
            )
