"""`Optimizer(..., frozen_until=)`: which parts an optimizer trains at which step, and what it refuses."""

import jax.numpy as jnp
import optax
import pytest
from optimizers import PARTS, bits, gradients, params

import functrain as ft

TRANSFORMS = {"body": ft.with_lr(optax.adam, 0.1), "head": optax.sgd(0.1)}


def optimizer(transforms=TRANSFORMS, **frozen_until):
    return ft.Optimizer(PARTS, transforms, frozen_until=frozen_until)


def test_a_part_is_trained_from_the_step_on_at_which_it_joins():
    optim = optimizer(body=3)
    assert [optim.trained_at(step) for step in (0, 2, 3, 9)] == [("head",)] * 2 + [("body", "head")] * 2
    assert optim.trained == ("body", "head")


def test_without_it_all_is_trained_from_the_first_step():
    assert ft.Optimizer(PARTS, TRANSFORMS).trained_at(0) == ("body", "head")


def test_it_is_printed():
    optim = optimizer(body=3)
    assert "body        2           6   24 B  frozen until step 3, then adam\n" in str(optim)
    assert repr(optim).startswith("Optimizer(body: frozen until step 3, then adam, head: ")


def test_in_a_loop_of_ones_own_it_says_what_to_differentiate():
    """The part that has not joined has no gradient, and stays as it is to the bit: its state too."""

    def loss_fn(params, batch):
        return jnp.sum((params["body"]["w"] @ params["head"]["w"] + params["body"]["b"]) ** 2) * batch

    optim, whole = optimizer(body=1), params()
    opt_state = optim.init(whole)
    for step in range(2):
        grads, _ = ft.make_train_step(loss_fn, PARTS, wrt=optim.trained_at(step))(whole, 1.0)
        assert [*grads] == [["head"], ["body", "head"]][step]
        before = bits((whole["body"], opt_state["body"]))
        whole, opt_state = optim.step(whole, grads, opt_state, step=step)
        assert (bits((whole["body"], opt_state["body"])) == before) == (step == 0)
    assert int(optax.tree.get(optim.optax_state(opt_state, "body"), "count")) == 1


def test_gradients_of_a_part_may_be_given_before_it_joins():
    """The optimizer knows no step of its own: in a loop of one's own, who computes a gradient wants it applied."""
    optim = optimizer(body=5)
    whole, _ = optim.step(params(), gradients("body", "head"), optim.init(params()))
    assert bits(whole["body"]) != bits(params()["body"])


@pytest.mark.parametrize(
    ("transforms", "frozen_until", "message"),
    [
        (
            TRANSFORMS,
            {"boddy": 3},
            "frozen_until for the unknown 'boddy'; the parts are 'body', 'head'; did you mean 'body'?",
        ),
        (
            {**TRANSFORMS, "body": ft.FROZEN},
            {"body": 3},
            "frozen_until for part 'body', which is frozen to the end: give it a transform in the place of ft.FROZEN,"
            " or leave it out of frozen_until",
        ),
        *(
            (
                TRANSFORMS,
                {"body": step},
                f"frozen_until={{'body': {step!r}}}: give a whole number of at least 1, the steps that are made without"
                " the part",
            )
            for step in (0, -1, 2.0, True)
        ),
        (
            TRANSFORMS,
            {"body": 3, "head": 5},
            "frozen_until has every trained part, 'body', 'head', and none would learn at first: leave one out",
        ),
        (TRANSFORMS, 200, "frozen_until=200: give a step by part, frozen_until={'encoder': 200}"),
    ],
)
def test_what_it_refuses(transforms, frozen_until, message):
    with pytest.raises(ft.OptimizerError) as raised:
        ft.Optimizer(PARTS, transforms, frozen_until=frozen_until)
    assert str(raised.value) == message
