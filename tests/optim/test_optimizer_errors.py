"""What an optimizer refuses. Every message names what is wrong and says what to write instead."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import PARTS, SCHEDULED, Model, gradients, params
from trees import says

import functrain as ft

TRAINED = {"body": optax.sgd(0.1), "head": optax.sgd(0.1)}


def small(**transforms):
    """An optimizer of PARTS with these transforms, its state, and gradients of all its trained parts."""
    optim = ft.Optimizer(PARTS, {**TRAINED, **transforms})
    return optim, optim.init(params()), gradients(*optim.trained)


def test_a_part_without_a_transform_is_an_error():
    with pytest.raises(
        ft.OptimizerError, match=says("parts without a transform: 'head'", "give each one, or ft.FROZEN")
    ):
        ft.Optimizer(PARTS, {"body": optax.sgd(0.1)})


def test_a_transform_without_a_part_is_an_error():
    with pytest.raises(
        ft.OptimizerError, match=says("transforms without a part: 'tail'", "the parts are 'body', 'head'")
    ):
        ft.Optimizer(PARTS, {**TRAINED, "tail": optax.sgd(0.1)})


@pytest.mark.parametrize("tx", [None, "frozen"])
def test_what_was_to_freeze_a_part_is_an_error_that_says_how(tx):
    with pytest.raises(ft.OptimizerError, match=says("part 'body'", "is no optax transform; write e.g. ft.FROZEN")):
        ft.Optimizer(PARTS, {**TRAINED, "body": tx})


@pytest.mark.parametrize("tx", [0.1, optax.adam], ids=["a number", "a factory"])
def test_what_is_not_a_transform_is_an_error(tx):
    with pytest.raises(
        ft.OptimizerError, match=says("part 'body'", "is no optax transform; write e.g. optax.adam(1e-3)")
    ):
        ft.Optimizer(PARTS, {**TRAINED, "body": tx})


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_not_positive_is_an_error(clip_norm):
    with pytest.raises(
        ft.OptimizerError, match=says(f"clip_norm={clip_norm}: give a positive norm, or None not to clip")
    ):
        ft.Optimizer(PARTS, TRAINED, clip_norm=clip_norm)


def test_gradients_of_an_unknown_part_are_an_error():
    optim, opt_state, grads = small()
    with pytest.raises(
        ft.OptimizerError, match=says("gradients of unknown parts: 'tail'; the parts are 'body', 'head'")
    ):
        optim.step(params(), {**grads, "tail": grads["head"]}, opt_state)


def test_gradients_as_a_whole_tree_are_an_error_that_says_how_to_split_them():
    parts = ft.partition(params(), {"matrix": "body/w", "rest": ...})
    optim = ft.Optimizer(parts, {"matrix": optax.sgd(0.1), "rest": optax.sgd(0.1)})
    message = says(
        "unknown parts: 'body', 'head'", "make_train_step(loss_fn, parts, wrt=optim.trained)", "parts.split(grads)"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(params(), params(), optim.init(params()))


def test_gradients_that_are_no_dict_are_an_error_that_says_how_to_split_them():
    whole = Model(jnp.ones(2), jnp.ones(2))
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.sgd(0.1)})
    with pytest.raises(ft.OptimizerError, match=says("must be split", "not Model", "parts.split(grads)")):
        optim.step(whole, whole, optim.init(whole))


# The parts' names are often those of the modules.
def test_a_whole_tree_whose_keys_are_the_parts_is_an_error_that_names_the_paths():
    optim, opt_state, _ = small()
    with pytest.raises(ft.PartitionError, match=says("part 'body' lacks 'body/b', 'body/w' and has 'w', 'b'")):
        optim.step(params(), params(), opt_state)


def test_gradients_of_a_frozen_part_are_an_error_that_names_wrt():
    optim, opt_state, _ = small(head=ft.FROZEN)
    message = says(
        "gradients of frozen parts: 'head'", "do not compute them", "make_train_step(loss_fn, parts, wrt=optim.trained)"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(params(), gradients("body", "head"), opt_state)


def test_a_missing_and_an_extra_path_in_a_parts_gradients_are_an_error_that_names_both():
    optim, opt_state, grads = small()
    grads["head"]["head/c"] = grads["head"].pop("head/w")
    with pytest.raises(ft.PartitionError, match=says("part 'head' lacks 'head/w' and has 'head/c'")):
        optim.step(params(), grads, opt_state)


def test_gradients_of_another_shape_are_an_error():
    optim, opt_state, grads = small()
    grads["head"]["head/w"] = jnp.ones(5)
    with pytest.raises(
        ft.OptimizerError, match=says("gradients of part 'head': 'head/w' has shape (5,), its parameter (2,)")
    ):
        optim.step(params(), grads, opt_state)


def test_per_example_gradients_that_no_transform_reduces_are_an_error():
    optim, opt_state, grads = small()
    per_example = jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), grads)
    with pytest.raises(ft.OptimizerError, match=says("updates of part 'body'", "has shape (3, 2), its parameter (2,)")):
        optim.step(params(), per_example, opt_state)


def test_params_of_other_shapes_than_were_partitioned_are_an_error():
    other = params() | {"head": {"w": jnp.ones(7), "b": jnp.ones(1)}}
    with pytest.raises(ft.OptimizerError, match=says("'head/w' has shape (7,), but (2,) when it was partitioned")):
        ft.Optimizer(PARTS, TRAINED).init(other)


def test_params_of_another_structure_than_was_partitioned_are_an_error():
    with pytest.raises(ft.PartitionError, match=says("lacks 'head/b', 'head/w'")):
        ft.Optimizer(PARTS, TRAINED).init({"body": params()["body"]})


@pytest.mark.parametrize(
    "leaf", [jnp.arange(2), jax.random.key(0), jnp.tanh, True], ids=["integers", "key", "function", "bool"]
)
def test_a_leaf_that_is_not_floating_point_may_only_be_in_a_frozen_part(leaf):
    whole = {"w": jnp.ones(2), "odd": leaf}
    everything = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.sgd(0.5)})
    told = ["which is not floating point", '("static": ft.non_float)', "ft.FROZEN"]
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        told = ["which is random state", "update.init(params, key=...)", "or freeze it"]
    message = says("part 'all' is trained, but holds 'odd', ", *told)
    with pytest.raises(ft.OptimizerError, match=message):
        everything.init(whole)

    parts = ft.partition(whole, {"static": ft.non_float, "rest": ...})
    optim = ft.Optimizer(parts, {"static": ft.FROZEN, "rest": optax.sgd(0.5)})
    after, _ = optim.step(whole, {"rest": {"w": jnp.ones(2)}}, optim.init(whole))
    assert after["odd"] is leaf
    assert after["w"].tolist() == [0.5, 0.5]


def hiding(tx):
    """A transform around another that passes no extra arguments on."""
    return optax.GradientTransformation(tx.init, lambda updates, state, params=None: tx.update(updates, state, params))


@pytest.mark.parametrize(
    ("part", "head", "phrases"),
    [
        ("tail", optax.sgd(0.1), ["the unknown part 'tail'; the parts are 'body', 'head'"]),
        ("head", ft.FROZEN, ["part 'head', which is frozen: give it a transform, or leave it out of lr"]),
        ("head", optax.adam(0.1), ["part 'head', whose transform has no rate to set", "ft.with_lr(optax.adam, 1e-3)"]),
        (
            "head",
            hiding(ft.with_lr(optax.sgd, 0.1)),
            ["part 'head'", "would be lost", "GradientTransformationExtraArgs"],
        ),
    ],
    ids=["unknown", "frozen", "without with_lr", "hidden"],
)
def test_a_rate_for_a_part_that_cannot_take_it_is_an_error(part, head, phrases):
    optim, opt_state, grads = small(head=head)
    with pytest.raises(ft.OptimizerError, match=says(*phrases)):
        optim.step(params(), grads, opt_state, lr={part: 0.5})


@pytest.mark.parametrize(
    ("part", "head", "phrases"),
    [
        ("tail", optax.sgd(0.1), ["the unknown part 'tail'"]),
        ("head", ft.FROZEN, ["part 'head', which is frozen"]),
        ("head", optax.adam(0.1), ["part 'head', whose transform has no rate to set"]),
        (
            "head",
            SCHEDULED,
            ["the rate of part 'head' follows a schedule", "step(..., lr={'head': ...})", "constant rate"],
        ),
    ],
    ids=["unknown", "frozen", "without with_lr", "schedule"],
)
def test_setting_a_rate_that_cannot_be_set_is_an_error(part, head, phrases):
    optim, opt_state, _ = small(head=head)
    with pytest.raises(ft.OptimizerError, match=says(*phrases)):
        optim.with_learning_rates(opt_state, {part: 0.5})


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(ft.with_lr(optax.sgd, 0.1), ft.with_lr(optax.sgd, 0.1)),
        ft.with_lr(lambda lr: optax.chain(optax.clip(1.0), ft.with_lr(optax.sgd, lr)), 0.1),
    ],
    ids=["side by side", "nested"],
)
def test_two_rates_in_one_part_are_an_error(tx):
    optim = ft.Optimizer(PARTS, {**TRAINED, "head": tx})
    with pytest.raises(ft.OptimizerError, match=says("part 'head' has 2 with_lr", "give each a part of its own")):
        optim.init(params())


@pytest.mark.parametrize("call", ["step", "learning_rates", "with_learning_rates"])
def test_a_state_of_other_parts_is_an_error(call):
    _, opt_state, grads = small()
    optim, _, _ = small(body=ft.FROZEN)
    calls = {
        "step": lambda: optim.step(params(), {"head": grads["head"]}, opt_state),
        "learning_rates": lambda: optim.learning_rates(opt_state),
        "with_learning_rates": lambda: optim.with_learning_rates(opt_state, {}),
    }
    message = says(
        "the optimizer state is of the parts 'body', 'head', the optimizer trains 'head'", "optim.init(params)"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        calls[call]()


def test_a_transform_that_returns_a_state_of_another_structure_is_an_error():
    tx = optax.GradientTransformation(
        lambda params: {"old": jnp.zeros(())}, lambda updates, state, params: (updates, {"new": jnp.zeros(())})
    )
    optim, opt_state, grads = small(head=tx)
    message = says("part 'head'", "lacks 'old' and has 'new'", "restore it like optim.init(params)")
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(params(), grads, opt_state)


def test_a_state_that_starts_with_an_integer_and_goes_on_with_a_fraction_is_an_error():
    tx = optax.GradientTransformation(
        lambda params: {"scale": jnp.zeros((), jnp.int32)}, lambda updates, state, params: (updates, {"scale": 0.5})
    )
    optim, opt_state, grads = small(head=tx)
    message = says("part 'head'", "holds 'scale' as float32, where int32 was before", "jnp.zeros((), jnp.float32)")
    with pytest.raises(ft.OptimizerError, match=message):
        optim.step(params(), grads, opt_state)


def test_every_error_is_a_value_error():
    assert issubclass(ft.OptimizerError, ValueError)


def test_a_state_of_another_transform_is_an_error():
    params = {"w": jnp.ones(2)}
    parts = ft.partition(params, {"all": ...})
    adam, sgd = (ft.Optimizer(parts, {"all": tx}) for tx in (optax.adam(0.1), optax.sgd(0.1)))
    for optim, other in ((adam, sgd), (sgd, adam)):
        with pytest.raises(
            ft.OptimizerError, match=r"the state of part 'all' is not one that its transform makes: .* use"
        ):
            optim.step(params, {"all": {"w": jnp.ones(2)}}, other.init(params))


# One array at several paths.


def warned_of(tree, rules, **frozen):
    """What is said of an optimizer of a tree; the parts that are named are frozen."""
    parts = ft.partition(tree, rules)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ft.Optimizer(parts, {part: optax.sgd(0.1) for part in rules} | frozen)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("array", [jnp.ones(2), np.ones(2)], ids=["jax", "numpy"])
def test_one_array_at_two_trained_paths_is_warned_of(array):
    assert warned_of({"a": array, "b": {"w": array}}, {"a": "a", "rest": ...}) == [
        "2 trained leaves are one array ('a' and 'b/w'), but parameters of their own, which drift apart from the first"
        " step on: to tie them, keep one and use it twice in the model; if they are meant to differ, copy one"
    ]


def test_many_of_them_are_one_warning_with_a_count():
    layers = [{"w": jnp.ones(2), "b": np.ones(3)} for _ in range(4)]
    (told,) = warned_of({"encoder": layers, "decoder": layers, "third": layers[:1]}, {"all": ...})
    first = "'decoder/0/b' and 'encoder/0/b' and 'third/0/b'; 'decoder/0/w' and"
    assert told.startswith(f"18 trained leaves are 8 arrays ({first}")
    assert "'decoder/1/b' and 'encoder/1/b' and 5 more), but" in told


def test_a_target_network_that_starts_as_its_source_is_not_warned_of():
    online = {"w": jnp.ones(2), "b": jnp.ones(2)}
    rules = {"online": "online", "target": "target"}
    assert not warned_of({"online": online, "target": online}, rules, target=ft.FROZEN)
    assert not warned_of({"online": online, "target": online}, rules, target=ft.FROZEN, online=ft.FROZEN)
    (told,) = warned_of(
        {"online": online, "also": online["w"], "target": online}, rules | {"rest": ...}, target=ft.FROZEN
    )
    assert told.startswith("2 trained leaves are one array ('also' and 'online/w'), but")


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, None, "0.1", jnp.ones(2)], ids=str)
def test_a_rate_that_is_no_finite_number_is_an_error_wherever_it_is_given(rate):
    if not isinstance(rate, str):
        with pytest.raises(ft.OptimizerError, match=r"the rate of with_lr is .*: give a finite number of at least 0"):
            ft.with_lr(optax.adam, rate)
    params = {"body": jnp.ones(2)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": ft.with_lr(optax.sgd, 0.1)})
    with pytest.raises(ft.OptimizerError, match=r"lr for part 'all' is .*: give a finite number of at least 0"):
        optim.step(params, {"all": {"body": jnp.ones(2)}}, optim.init(params), lr={"all": rate})
    update = ft.make_update(lambda params, batch: jnp.sum(params["body"] * batch), optim)
    with pytest.raises(ft.UpdateError, match=r"lr for part 'all' is .*: give a finite number of at least 0"):
        update(update.init(params), 1.0, lr={"all": rate})


def test_other_numbers_and_names_that_are_none():
    params = {"body": jnp.ones(2)}
    parts = ft.partition(params, {"all": ...})
    optim = ft.Optimizer(parts, {"all": ft.with_lr(optax.sgd, 0.1)})
    with pytest.raises(ft.OptimizerError, match="clip_norm='1': give a positive norm"):
        ft.Optimizer(parts, optim.transforms, clip_norm="1")

    def loss_fn(params, batch):
        return {"a": jnp.sum(params["body"])}

    for weight in (float("nan"), "0.1"):
        update = ft.make_update(loss_fn, optim, loss_weights={"a": weight})
        with pytest.raises(ft.LossError, match=r"loss_weights: the weight of the loss 'a' is .*: give a finite number"):
            update(update.init(params), 1.0)
    with pytest.raises(ft.UpdateError, match=r"compute_dtype='bf16' is no dtype: write jnp.bfloat16"):
        ft.make_update(loss_fn, optim, compute_dtype="bf16")
    with pytest.raises(ft.UpdateError, match="did you mean 'all'"):
        ft.make_update(loss_fn, optim)(ft.make_update(loss_fn, optim).init(params), 1.0, lr={"al": 0.1})
