"""State of a model of Flax NNX that is given as parameters, and what is said of it."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trees import says

import functrain as ft


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, rngs=None):
        return jnp.sum(self.drop(self.norm(self.linear(x)), rngs=rngs) ** 2)


GRAPHDEF, PARAMS = nnx.split(Model(nnx.Rngs(0)))
X = jax.random.normal(jax.random.key(0), (4, 2))
TO_WRITE = says("graphdef, params, rest = nnx.split(model, nnx.Param, ...)", "update.init(params, model_state=rest)")
RULES = {"random": nnx.RngState, "stats": nnx.BatchStat, "rest": ...}
TRAINS = {"random": ft.FROZEN, "stats": ft.FROZEN, "rest": optax.sgd(0.0)}


def merged(params, training=True):
    model = nnx.merge(GRAPHDEF, params)
    model.train() if training else model.eval()
    return model


def in_training(params, batch):
    return merged(params)(batch)


def in_evaluation(params, batch):
    return merged(params, training=False)(batch)


def with_a_key(params, batch, key):
    return merged(params)(batch, rngs=nnx.Rngs(key))


def told(loss_fn, transforms=TRAINS, calls=3, **options):
    """What is warned of over some calls, each at a line of this file."""
    update = ft.make_update(loss_fn, ft.Optimizer(ft.partition(PARAMS, RULES), transforms), **options)
    state = update.init(PARAMS, key=jax.random.key(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            state, _ = update(state, X)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


def test_random_state_in_a_trained_part_is_told_to_be_model_state():
    message = says("holds 'drop/rngs/count', 'drop/rngs/key', which is random state: pass it as model_state")
    parts = ft.partition(PARAMS, {"all": ...})
    for raises in (
        lambda: ft.Optimizer(parts, {"all": optax.sgd(0.1)}).init(PARAMS),
        lambda: ft.make_train_step(in_training, parts)(PARAMS, X),
        lambda: ft.make_train_step(in_training)(PARAMS, X),
        lambda: ft.make_train_step(in_training)(nnx.to_pure_dict(PARAMS), X),
    ):
        with pytest.raises((ft.OptimizerError, ft.LossError), match=message.replace("holds", "holds?")) as error:
            raises()
        assert re.search(TO_WRITE, str(error.value))
        assert "FROZEN" not in str(error.value)


def test_a_key_among_parameters_of_another_library_is_told_to_be_given_to_init():
    params = {"w": jnp.ones(2), "noise": jax.random.key(0)}
    message = says("holds 'noise', which is random state: pass it to update.init(params, key=...)")
    with pytest.raises(ft.OptimizerError, match=message):
        ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)}).init(params)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"microbatches": 2}, {"after": lambda *both: both[:2]}])
def test_frozen_state_that_training_would_move_is_warned_of_once(options):
    random, statistics = told(in_training, **options)
    assert random.startswith("'drop/rngs/count', 'drop/rngs/key' is random state in a frozen part")
    assert "one dropout mask for ever: pass it as model_state" in random
    assert statistics.startswith("'norm/mean', 'norm/var' is in a frozen part and never moves")
    assert all(re.search(TO_WRITE, each) for each in (random, statistics))


def test_random_state_in_the_place_of_which_a_key_is_given_is_not_warned_of():
    (statistics,) = told(with_a_key)
    assert statistics.startswith("'norm/mean', 'norm/var' is in a frozen part")


def test_frozen_state_of_a_model_in_evaluation_mode_is_not_warned_of():
    assert told(in_evaluation) == []


def test_statistics_are_looked_for_in_every_phase():
    def phases(*losses):
        both = zip(("one", "two"), losses, ("rest", "other"), strict=True)
        return ft.alternate(*(ft.Phase(*each) for each in both))

    rules = {"random": nnx.RngState, "stats": nnx.BatchStat, "rest": "linear", "other": ...}
    transforms = TRAINS | {"other": optax.sgd(0.0)}
    for losses, count in (((with_a_key, in_evaluation), 0), ((with_a_key, with_a_key), 1)):
        optim = ft.Optimizer(ft.partition(PARAMS, rules), transforms)
        update = ft.make_update(phases(*losses), optim)
        state = update.init(PARAMS, key=jax.random.key(0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                state, _ = update(state, X)
        assert len(caught) == count


@pytest.mark.filterwarnings("ignore:'drop/rngs/count'")
@pytest.mark.parametrize("loss_fn", [in_training, in_evaluation])
def test_statistics_in_a_trained_part_are_told_to_be_model_state(loss_fn):
    rules, transforms = {"random": nnx.RngState, "rest": ...}, {"random": ft.FROZEN, "rest": optax.sgd(0.1)}
    optim = ft.Optimizer(ft.partition(PARAMS, rules), transforms)
    update = ft.make_update(loss_fn, optim)
    message = says("an nnx.BatchStat, such as 'norm/mean', is state and no parameter: graphdef, params, rest = nnx")
    with pytest.warns(UserWarning, match=message) as found:
        update(update.init(PARAMS), X)
    assert found[0].filename == __file__
    assert re.search(message, str(ft.audit(loss_fn, optim.parts, PARAMS, X)))


def test_what_the_messages_say_to_write_draws_other_masks_moves_the_statistics_and_is_not_warned_of(recwarn):
    graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, batch, model_state):
        model = nnx.merge(graphdef, params, model_state)
        return ft.Loss(model(batch), model_state=nnx.state(model, nnx.Not(nnx.Param)))

    update = ft.make_update(loss_fn, ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.0)}))
    state = update.init(params, model_state=rest)
    before, losses = np.asarray(ft.flatten(rest)["norm/mean"]), set()
    for _ in range(4):
        state, metrics = update(state, X)
        losses.add(float(metrics["loss"]))
    assert len(losses) > 1
    assert not np.array_equal(ft.flatten(state.model_state)["norm/mean"], before)
    assert not recwarn


def test_model_state_of_which_init_was_given_none_is_told_to_be_given_to_it():
    def loss_fn(params, batch):
        return ft.Loss(in_evaluation(params, batch), model_state={"mean": jnp.zeros(3)})

    update = ft.make_update(loss_fn, ft.Optimizer(ft.partition(PARAMS, RULES), TRAINS))
    message = says("it has 'mean', which is not expected; it was given none: update.init(params, model_state=...)")
    with pytest.raises(ft.LossError, match=message):
        update(update.init(PARAMS), X)
