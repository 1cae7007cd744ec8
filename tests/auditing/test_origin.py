"""Where what is not finite comes from: the first operation of which it does, and its line."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functrain.auditing.origin import walk

LINES = Path(__file__).read_text().splitlines()
ONES = jnp.ones((3, 2))
ZERO = ONES.at[1, 0].set(0.0)


def found(function, *values):
    """For each output the operation, marked line and text of its origin; None for one that is finite."""
    program = jax.make_jaxpr(function)(*values)
    walked = walk(program, jax.tree.leaves(values), [*"abc"][: len(jax.tree.leaves(values))])
    expected = jax.tree.leaves(jax.jit(function)(*values))
    assert [each.is_bad for each in walked] == [not np.isfinite(each).all() for each in expected]
    return [
        each.origin and (each.origin.primitive, LINES[each.origin.place.line - 1].partition("# ")[2], each.origin.text)
        for each in walked
    ]


def gradients(loss):
    return jax.value_and_grad(loss)


# What is called from several places is traced once: its line, or that of the call where it is JAX's own.


@jax.jit
def own(x):
    return jnp.log(x)  # in own


@jax.custom_vjp
def with_own_gradient(x):
    return jnp.sum(x)


with_own_gradient.defvjp(
    lambda x: (jnp.sum(x), x),
    lambda x, ct: (ct / x,),
)


def jitted(x):
    a = own(x + 1)
    return own(x).sum() + a.sum()


def of_jax(x):
    a = jnp.divide(x, ONES)
    b = jax.nn.softmax(jnp.where(x > 5, x, -jnp.inf))  # softmax
    return a.sum() + b.sum()


def scanned(x):
    def body(carry, row):
        return carry * row.sum(), 1 / row[0]  # in a scan

    return jax.lax.scan(body, 1.0, x)[1].sum()


def looped(x):
    return jax.lax.fori_loop(0, 5, lambda _, x: x * x * 1e20, x).sum()  # in a loop


def whiled(x):
    return jax.lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + 1, s[1] / (s[0] - 4)), (0, x))[
        1
    ].sum()  # in a while


def branched(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.log(x), lambda x: x * jnp.nan, x).sum()  # in a branch


def remembered(x):
    return jax.checkpoint(lambda x: jnp.sum(jnp.sqrt(x)))(x)  # in a checkpoint


def rooted(x):
    return jnp.sum(jnp.sqrt(x))  # in a derivative


def hidden(x):
    return jnp.where(x > 0, jnp.log(x), 0.0).sum()  # behind where


def gathered(x):
    return jnp.take(x, jnp.array([1, 7])).sum()  # out of bounds


def custom(x):
    return with_own_gradient(x)  # has a gradient of its own


OUT_OF_BOUNDS = "gather of float32[6] of 1 to 1, int32[2,1] of 1 to 7 is nan at [1] of float32[2]"


@pytest.mark.parametrize(
    ("loss", "x", "value", "gradient"),
    [
        (jitted, ZERO, ("log", "in own", "log(0.0) is -inf at [1, 0] of float32[3,2]"), ...),
        (of_jax, ZERO, ("sub", "softmax", ...), ...),
        (scanned, ZERO, ("div", "in a scan", "div(1.0, 0.0) is inf"), ...),
        (looped, ONES, ("mul", "in a loop", ...), ...),
        (branched, ZERO, ("log", "in a branch", "log(0.0) is -inf at [1, 0] of float32[3,2]"), ...),
        (gathered, ONES, ("gather", "out of bounds", OUT_OF_BOUNDS), ...),
        (remembered, ZERO, None, ("div", "in a checkpoint", ...)),
        (rooted, ZERO, None, ("div", "in a derivative", "div(0.5, 0.0) is inf at [1, 0] of float32[3,2]")),
        (hidden, ZERO, None, ("div", "behind where", "div(0.0, 0.0) is nan at [1, 0] of float32[3,2]")),
        (custom, ZERO, None, ("div", "has a gradient of its own", "div(1.0, 0.0) is inf at [1, 0] of float32[3,2]")),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)  # fmt: skip
def test_the_operation_and_its_line_are_found(loss, x, value, gradient):
    for expected, origin in zip((value, gradient), found(gradients(loss), x), strict=True):
        if expected is not ...:
            assert (origin is None) == (expected is None)
            assert all(mine in (..., other) for mine, other in zip(expected or (), origin or (), strict=True))


def test_the_turn_of_a_loop_is_told():
    program = jax.make_jaxpr(scanned)(ZERO)
    (known,) = walk(program, [ZERO], ["x"])
    assert known.origin.turn == 1
    program = jax.make_jaxpr(whiled)(ONES)
    (known,) = walk(program, [ONES], ["x"])
    assert known.origin.turn == 4
    assert known.origin.text.endswith(", 0.0) is inf at [0, 0] of float32[3,2]")


def test_what_was_not_finite_before_is_told_by_its_name_and_where_it_enters():
    batch = ONES.at[2, 1].set(jnp.nan)
    (origin,) = found(lambda w, x: jnp.sum(w * x), ONES, batch)  # enters
    assert origin == ("mul", "enters", "b is nan at [2, 1] of float32[3,2]")
    (origin,) = found(lambda x: jnp.sum(x * jnp.inf), ONES)  # constant
    assert origin == ("mul", "constant", "a constant is inf")


def test_a_mask_of_infinities_is_not_taken_for_the_reason():
    mask = jnp.array([0.0, -jnp.inf])

    def loss(mask, x):
        weights = jax.nn.softmax(x + mask)
        return jnp.sum(weights) + jnp.sum(jnp.log(x))  # reason

    assert found(loss, mask, ONES) == [None]
    assert found(loss, mask, ZERO) == [("log", "reason", "log(0.0) is -inf at [1, 0] of float32[3,2]")]


def test_an_overflow_that_becomes_nan_is_the_overflow():
    def loss(x):
        square = jnp.square(x)  # overflow
        return jnp.sum(square - square)

    assert found(loss, jnp.full(2, 300, jnp.float16)) == [
        ("square", "overflow", "square(300.0) is inf at [0] of float16[2]")
    ]


def test_what_is_selected_is_the_reason_and_what_is_not_is_none():
    bad = jnp.array([jnp.nan, 1.0])
    (origin,) = found(lambda x: jnp.sum(jnp.where(x > 5, jnp.inf, x)), bad)
    assert origin[2] == "a is nan at [0] of float32[2]"
