"""What is said while a program is traced."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import says

import functrain as ft

PARAMS = {"conv1": {"kernel": jnp.ones(2)}, "head": jnp.ones(2)}
BATCH = {"image": np.ones((4, 2), np.float32)}


def loss_of(params, batch):
    return jnp.mean((batch["image"] @ params["conv1"]["kernel"]) ** 2) + jnp.sum(params["head"] ** 2)


def update_of(loss_fn=loss_of, **options):
    parts = ft.partition(PARAMS, {"conv1": "conv1", "head": "head"})
    return ft.make_update(loss_fn, ft.Optimizer(parts, {"conv1": optax.adam(0.1), "head": optax.sgd(0.1)}), **options)


# Numbers that Python asks for.


def if_of(value):
    return lambda params, batch, **context: loss_of(params, batch) if value(params, batch) > 0 else 0.0


def of_step(params, batch, step):
    return loss_of(params, batch) * [1.0, 2.0][step]


def of_a_float(params, batch):
    return loss_of(params, batch) * float(batch["image"][0, 0])


def of_a_length(params, batch, step):
    return loss_of(params, batch) * jnp.sum(jnp.arange(step))


def of_a_mask(params, batch):
    return loss_of(params, {"image": batch["image"][batch["image"][:, 0] > 0]})


def of_numpy(params, batch):
    return loss_of(params, {"image": np.asarray(batch["image"])})


WHERE = "in the place of a Python `if`, `while`, `and` or `assert` write jnp.where(condition, this, that)"


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [
        (if_of(lambda params, batch: jnp.sum(params["conv1"]["kernel"])), ["params 'conv1/kernel'", WHERE]),
        (if_of(lambda params, batch: jnp.sum(params["head"])), ["on params 'head'", WHERE]),
        (
            if_of(lambda params, batch: jnp.sum(batch["image"])),
            ["on the batch's 'image' (JAX: Attempted boolean", WHERE],
        ),
        (if_of(loss_of), ["params 'conv1/kernel', params 'head', the batch's 'image' (JAX", WHERE]),
        (of_step, ["on the step", "write jnp.stack(them)[index]"]),
        (
            of_a_float,
            [
                "the batch's 'image'",
                "The problem arose with the `float` function.",
                "leave x an array, x.astype(float)",
            ],
        ),
        (of_a_length, ["on the step", "jnp.arange", "take a length from a shape"]),
        (of_a_mask, ["write jnp.where(mask, x, 0)"]),
        (of_numpy, ["in the place of np write jnp"]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_number_that_python_asks_for_is_told_with_the_line_the_leaf_and_what_to_write(loss_fn, told, accumulate):
    update = update_of(loss_fn, accumulate=accumulate, audit=False)
    with pytest.raises(
        ft.LossError,
        match=says("test_tracing.py:", "', asks for a number that is not known while the step is compiled", *told),
    ) as raised:
        update(update.init(PARAMS), BATCH)
    assert isinstance(raised.value.__cause__, TypeError | IndexError)  # JAX's own, with all that it says.


def test_in_fit_it_is_the_same():
    update = update_of(if_of(lambda params, batch: jnp.sum(params["head"])))
    with pytest.raises(ft.LossError, match=says("on params 'head'", WHERE)):
        ft.fit(update, update.init(PARAMS), [BATCH], epochs=1)


# Batches of another shape.


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [each for each in caught if "compiled anew" in str(each.message)]


def run_over(update, batches):
    state = update.init(PARAMS)
    for batch in batches:
        state, _ = update(state, batch)


SHORT, WIDE = {"image": BATCH["image"][:3]}, {"image": BATCH["image"], "weight": np.float32(1)}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_of_another_shape_is_told_once_with_both_shapes(accumulate):
    batches = [BATCH] * 3 + [SHORT] * 3 + [{"image": BATCH["image"][:2]}] * 3 + [WIDE]
    (told,) = warned(lambda: run_over(update_of(accumulate=accumulate), batches))
    assert "'image': float32[4, 2], and now float32[3, 2]" in str(told.message)
    assert "ft.from_arrays(..., last='pad') fills up" in str(told.message)
    assert told.filename == __file__


def test_a_leaf_that_is_new_is_told():
    (told,) = warned(lambda: run_over(update_of(), [BATCH, WIDE]))
    assert "'weight': missing, and now float32[]" in str(told.message)


def test_batches_of_one_shape_are_never_told_of():
    def calls():
        update = update_of(accumulate=2)
        update.compile(update.init(PARAMS), BATCH)
        run_over(update, [BATCH, jax.tree.map(jnp.asarray, BATCH)] * 2)
        state, _ = update.scan(update.init(PARAMS), {"image": np.ones((2, 4, 2), np.float32)})
        state, _ = update(state, BATCH)
        state, _ = update.flush(state)
        update.measured(*update(state, BATCH)[:1], BATCH, lr=None)

    assert not warned(calls)


@pytest.mark.parametrize(("last", "count"), [("keep", 1), ("pad", 0), ("drop", 0)])
def test_fit_tells_of_a_short_last_batch_where_it_was_called(last, count):
    update = update_of(lambda params, batch: ft.Loss(loss_of(params, batch), weight=jnp.sum(batch.get("weight", 1.0))))
    data = ft.from_arrays({"image": np.ones((7, 2), np.float32)}, batch_size=4, last=last)
    told = warned(lambda: ft.fit(update, update.init(PARAMS), data, epochs=2))
    assert [each.filename for each in told] == [__file__] * count
