"""Makes the compiled update: train step, partition, optimizer and accumulation as one state and one call."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from functrain.gradients.per_example import PerExample, check_per_example
from functrain.gradients.routes import Route, Weight
from functrain.optim.optimizer import Optimizer
from functrain.tree.selectors import Selector
from functrain.update.ema import averages_of
from functrain.update.options import Options
from functrain.update.phases import Alternation, scheduled, with_optimizers_of
from functrain.update.precision import DynamicScale, caster, narrow_dtype
from functrain.update.step import After
from functrain.update.steps import Steps, of_arrays
from functrain.update.surgery import Surgery
from functrain.update.update import Update


def make_update(
    loss_fn: Callable[..., Any] | Alternation,
    optim: Optimizer,
    *,
    accumulate: int = 1,
    microbatches: int = 1,
    reduce: Literal["batch", "window"] = "batch",
    remainder: Literal["flush", "drop", "carry"] = "flush",
    nonfinite: Literal["ignore", "skip"] = "ignore",
    after: After | None = None,
    compute_dtype: Any = None,
    cast_batch: "bool | Selector" = True,
    loss_scale: DynamicScale | None = None,
    ema: float | Mapping[Any, float] | None = None,
    route: Route | None = None,
    loss_weights: Mapping[str, Weight] | None = None,
    gradients: Callable[..., Any] | None = None,
    per_example: PerExample | None = None,
    audit: bool = True,
) -> Update:
    """Makes the compiled update of a loss function and an optimizer.

    >>> from functrain import Optimizer, partition, with_lr
    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(2)}
    >>> optim = Optimizer(partition(params, {"all": ...}), {"all": with_lr(optax.sgd, 0.5)})
    >>> update = make_update(lambda params, batch: jnp.sum(params["w"] * batch), optim, accumulate=2)
    >>> state = update.init(params)
    >>> state, metrics = update(state, jnp.array([1.0, 2.0]))
    >>> state, metrics = update(state, jnp.array([3.0, 2.0]))
    >>> state.params["w"].tolist(), float(metrics["loss"]), int(state.step)
    ([0.0, 0.0], 4.0, 1)

    Args:
      loss_fn: as for `make_train_step`, or phases with a loss function each: `alternate(...)`. Its key is
        `fold_in(fold_in(key, batches), index of the phase)`, with the microbatch's index folded in where there are
        several; its `step` is the number of finished windows.
      optim: the optimizer. The gradients of `optim.trained` are computed and no others, nor of a part that is frozen
        until a step before that. Its transforms are given those of optax's extra arguments that they declare: `value`,
        the loss that their part learns from, `value_fn`, the same as a function of their part's leaves (not with
        `accumulate`), `grad` and `grad_fn`; and `step`, the number of finished windows. What is no array in a frozen
        part, such as the functions in a module of Equinox, is no part of the state, and is put back for `loss_fn` and
        `after`.
      accumulate: batches in a window, which makes one optimizer step from their gradients, weighted by `Loss.weight`.
      microbatches: slices of a batch that are computed one after the other, for memory; the batch's leading axis must
        be a multiple of it. The result is that of the whole batch, where the loss is a mean over `Loss.weight`; what
        compares the examples of a batch with each other (a contrastive loss, batch statistics) has another. `fit` warns
        of a loss that is no such mean, unless it draws random numbers.
      reduce: when the gradients of the data shards of a layout are added up: for each "batch", or once a "window" or a
        batch of `microbatches`, which sends so many times fewer bytes. Then each shard is a microbatch of its own, with
        its number folded into the key of `loss_fn`; a loss that compares examples sees those of a shard, and one that
        returns a new `model_state` is an error. Each device holds a whole sum of the gradients, where FSDP or `zero`
        would have it hold a slice.
      remainder: what `flush` does with a window cut short: "flush" steps with the mean of what is there, "drop" forgets
        it, "carry" leaves it pending.
      nonfinite: "ignore" adds nothing to the compiled program; who reads the loss finds out. "skip" leaves out an
        update with a non-finite gradient, params, optimizer state and `after`, and the model state of the batch that
        had it.
      after: `fn(params, model_state, step) -> (params, model_state)`, compiled in after each optimizer step, which
        `step` counts from 1: projections, or a target network, `ft.ema("target", of="online", decay=0.995)`.
      compute_dtype: the dtype of the floating-point params and batches that the loss is given, or `{part: dtype}` of
        the params, of which batches take the one of 16 bits; masters and gradients keep theirs. It is warned of where
        the losses have matrix products or convolutions, and none of 16 bits.
      cast_batch: which leaves of the batch `compute_dtype` casts: True for all that are floating point but "weight",
        False for none, or a selector, such as "image" where targets are floating point too.
      loss_scale: a `DynamicScale`, for float16; it implies `nonfinite="skip"`.
      ema: exponential moving averages of the parameters, kept in the state: a decay for all that is trained, or
        `{part or selector: decay}`. They are those of `optax.ema`, in float32 or wider, of the parameters after each
        step of their part and after `after`; a skipped step is none. `update.ema(state)` is the params with them.
      route: which losses each part learns from, as for `make_train_step`; the "loss" in the metrics is then the plain
        sum of all.
      loss_weights: the weights of named losses in the sum, as for `make_train_step`; each is logged unweighted.
      gradients: `fn(grads)`, pure, from the gradients of a whole window, `{part: {path: gradient}}` of its phase's
        parts, to those that the optimizer is given: surgery, noise, a `pmean`. It may declare, and is then given by
        keyword, `key`, one of its own for each step, `step`, the finished ones, `params`, the whole ones, `metrics`,
        and `per_loss`, `{loss: split gradients}`, unweighted, each from a backward pass of its own.
      per_example: what is done to the gradients of each example before the mean of a batch is taken, `fn(grads)` of
        split ones, or `{part: fn}`, each of a part's `{path: gradient}`. Each example is a batch of one, with a key of
        its own. There are as many at once as a batch has examples; `microbatches` has fewer.
      audit: check before the first step, without a FLOP, that the losses reach the trained parts: raise for a part of
        which they reach no leaf, warn of single leaves. See `ft.audit`.

    Raises:
      UpdateError: an option that is none of these, such as an `ema` that takes no leaf, or one twice.
      LossError: `loss_fn` requires an argument that functrain does not know.
      PartitionError: `compute_dtype` names an unknown part.
      PhaseError: a phase with unknown or frozen parts, a trained part without a phase, or with `accumulate` a phase
        that takes the batch of another.
    """
    whole, optim = of_arrays(optim)
    schedule = scheduled(loss_fn, optim, accumulate, route=route, loss_weights=loss_weights)
    optim = with_optimizers_of(schedule, optim)
    options = Options(
        optim=optim,
        whole=whole,
        accumulate=accumulate,
        microbatches=microbatches,
        reduce=reduce,
        remainder=remainder,
        nonfinite=nonfinite,
        loss_scale=loss_scale,
        averages=averages_of(optim, ema),
        narrow=narrow_dtype(compute_dtype, cast_batch),
        surgery=None if gradients is None else Surgery(gradients),
        per_example=per_example,
    )
    check_per_example(per_example, optim.trained)
    steps = Steps(
        options=options,
        cast=caster(optim.parts, compute_dtype),
        cast_batch=cast_batch,
        after=after,
        audit=audit,
    )
    return Update(schedule, tuple(steps.of_stage(schedule.phases, begin) for begin in optim.stages), options)
