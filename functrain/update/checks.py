"""What an update refuses of a call; each error says what to write instead."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import UpdateError
from functrain.gradients.loss import required_context
from functrain.tree.arrays import as_array, common_length, is_here, leading_lengths
from functrain.tree.paths import flatten, structure_difference
from functrain.tree.scalars import wrong_scalar
from functrain.tree.text import did_you_mean, listed
from functrain.update.options import Settings
from functrain.update.state import TrainState
from functrain.update.surgery import Surgery


def check_context(functions: Iterable[Callable[..., Any]], surgery: Surgery | None, **given: Any) -> None:
    """Raises unless all that loss functions and the function of gradients can't do without is there."""
    required = {name for function in functions for name in required_context(function)}
    if absent := [name for name in given if name in required and given[name] is None]:
        raise UpdateError(f"the loss function declares {listed(absent)}: update.init(params, {absent[0]}=...)")
    if surgery is not None and surgery.needs_key and given["key"] is None:
        raise UpdateError("the function of gradients= declares key: update.init(params, key=...)")


def check_state(state: TrainState) -> None:
    """Raises for what is no state, or is traced."""
    if not isinstance(state, TrainState):
        raise UpdateError(
            f"an update takes a TrainState, not {type(state).__name__}: state = update.init(params), then"
            " state, metrics = update(state, batch)"
        )
    if isinstance(state.step, jax.core.Tracer):
        raise UpdateError("update() was called under a trace: use update.pure in a jit, scan or vmap of your own")


def check_batch_of_all(batch: Any) -> None:
    """Raises for a batch of this process alone, where the parameters are those of several.

    JAX takes it for the same in all of them: each would go on with other parameters under one name.
    """
    own = [path for path, leaf in flatten(batch).items() if jnp.ndim(leaf) > 0 and is_here(leaf)]
    if own:
        what = f"{listed(own)} of the batch" if any(own) else "the batch"
        raise UpdateError(
            f"{what} lies in this process alone, and the parameters lie over {jax.process_count()}: make one batch of"
            " the slices of all, jax.make_array_from_process_local_data(sharding, slice), with sharding ="
            " jax.NamedSharding(mesh, jax.P('data')), or layout.batch(slice) of an ft.layout, or write"
            " fit(..., sharding=sharding)"
        )


def check_position(state: TrainState, accumulate: int) -> None:
    """Raises for a window with more batches than a window has."""
    if int(state.pending) >= accumulate:
        raise UpdateError(
            f"{int(state.pending)} batches are pending in the state, of a longer window than accumulate={accumulate}:"
            " end it first with update.flush(state), or keep to the accumulate= that it was begun with"
        )


def check_whole(state: TrainState, where: str) -> None:
    """Raises if a window is pending."""
    if state.window is not None:
        raise UpdateError(f"{where} takes in whole windows, but one is pending: end it first, with update.flush(state)")


def check_rates(lr: Mapping[str, Any] | None, trained: Collection[str]) -> None:
    """Raises unless the rates are numbers by part."""
    if lr is None:
        return
    check_by_part(lr, trained)
    for part, rate in lr.items():
        if wrong := wrong_scalar(rate):
            raise UpdateError(f"lr for part {part!r} is {wrong}: give a finite number of at least 0")


def check_by_part(lr: Any, trained: Collection[str]) -> None:
    """Raises unless rates are by part."""
    if not isinstance(lr, Mapping):
        raise UpdateError(f"lr={lr!r}: give a rate by part, of the parts {listed(trained)}")
    if unknown := [part for part in lr if part not in trained]:
        raise UpdateError(
            f"lr={lr!r}: give a rate by part, of the parts {listed(trained)}{did_you_mean(unknown, trained)}"
        )


def checked_settings(
    lr: Mapping[str, Any] | None, hyperparameters: Mapping[str, Any] | None, trained: Collection[str]
) -> Settings | None:
    """What a call is given for its steps, None where that is nothing; raises unless it is by part."""
    if lr is None and hyperparameters is None:
        return None
    check_rates(lr, trained)
    given = {} if hyperparameters is None else hyperparameters
    if not isinstance(given, Mapping) or any(
        part not in trained or not isinstance(named, Mapping) for part, named in given.items()
    ):
        raise UpdateError(
            f"set={hyperparameters!r}: give hyperparameters by part and name, of the parts {listed(trained)}"
        )
    for part, named in given.items():
        for name, value in named.items():
            if wrong := wrong_scalar(value, least=-math.inf):
                raise UpdateError(f"set: {name!r} of part {part!r} is {wrong}: give a finite number")
    return Settings(lr, hyperparameters)


def checked_count(batches: Any, cycle: int, cycle_in_words: str) -> int:
    """The number of batches on a leading axis, which is a multiple of those in a cycle."""
    if isinstance(batches, list) and all(isinstance(batch, Mapping | tuple) for batch in batches):
        raise UpdateError(
            f"scan takes batches stacked on a leading axis, not a list of {len(batches)}:"
            " jax.tree.map(lambda *leaves: np.stack(leaves), *batches)"
        )
    lengths = leading_lengths(batches)
    count = common_length(lengths.values())
    if not count or count % cycle:
        raise UpdateError(
            f"scan needs batches stacked on a leading axis, a multiple of {cycle} of them ({cycle_in_words}), not"
            f" {lengths}"
        )
    return count


def check_cycle(batch: Any, cycle: int, cycle_in_words: str) -> None:
    """Raises unless the batches of exactly one cycle are on a leading axis."""
    lengths = leading_lengths(batch)
    if wrong := {path: length for path, length in lengths.items() if length != (cycle,)}:
        raise UpdateError(
            f"pure takes in {cycle} batches stacked on a leading axis ({cycle_in_words}), not {wrong}; for more of them"
            " use update.scan, or a scan of your own over pure"
        )


def like_old(new: Any, old: Any, what: str, error: type[Exception]) -> Any:
    """The new tree, if it has the structure, shapes and dtypes of the old one: else the update would compile anew."""
    if differs := structure_difference(new, old):
        given = "; it was given none: update.init(params, model_state=...)" if old is None else ""
        raise error(f"{what} must be of the structure that update.init was given: it {differs}{given}")
    types = [
        {path: (jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in flatten(tree).items()} for tree in (new, old)
    ]
    for path, (shape, dtype) in types[0].items():
        if (shape, dtype) != types[1][path]:
            before = "{1}{0}".format(*types[1][path])
            raise error(f"{what} must keep its shapes and dtypes: {path!r} is {dtype}{shape}, and was {before}")
    return jax.tree.map(as_array, new)
