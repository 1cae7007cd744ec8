"""What is commonly written wrong, and what the error says to write."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from trees import says

import functrain as ft

PARAMS = {"body": {"w": jnp.ones(2), "b": jnp.ones(2)}, "head": jnp.ones(2), "tail": jnp.ones(2)}


def parts():
    return ft.partition(PARAMS, {"body": "body", "head": "head", "tail": "tail"})


def optim():
    return ft.Optimizer(parts(), {part: ft.with_lr(optax.sgd, 0.1) for part in parts().names})


def update(loss_fn=lambda params, batch: jnp.sum(jnp.asarray(jax.tree.leaves(params)) * batch["x"])):
    return ft.make_update(loss_fn, optim())


def test_batches_in_a_list_are_to_be_stacked():
    state = update().init(PARAMS)
    with pytest.raises(ft.UpdateError, match=says("on a leading axis, not a list of 2", "np.stack(leaves), *batches)")):
        update().scan(state, [{"x": 1.0}, {"x": 2.0}])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), {"x": 1.0}, {"x": 2.0})
    assert int(update().scan(state, stacked)[0].step) == 2


def test_a_batch_that_is_not_stacked_is_told():
    with pytest.raises(ft.UpdateError, match=says("scan needs batches stacked on a leading axis", "{'x': ()}")):
        update().scan(update().init(PARAMS), {"x": 1.0})


@pytest.mark.parametrize("key", [0, np.int32(3)])
def test_a_number_is_no_key(key):
    noisy = update(lambda params, batch, key: jnp.sum(params["head"]) * batch["x"])
    with pytest.raises(ft.UpdateError, match=says(f"key={key}: give a random key, key=jax.random.key({key})")):
        noisy.init(PARAMS, key=key)


def test_a_part_that_is_misspelt_gets_the_right_name():
    txs = {"body": optax.sgd(0.1), "haed": optax.sgd(0.1), "tail": optax.sgd(0.1)}
    with pytest.raises(ft.OptimizerError, match=says("transforms without a part: 'haed'", "did you mean 'head'?")):
        ft.Optimizer(parts(), txs)
    with pytest.raises(ft.PartitionError, match=says("unknown part 'haed'", "did you mean 'head'?")):
        parts().merge({"haed": {}}, into=PARAMS)
    opt_state = optim().init(PARAMS)
    with pytest.raises(ft.OptimizerError, match=says("unknown part 'bdy'", "did you mean 'body'?")):
        optim().step(PARAMS, parts().split(PARAMS), opt_state, lr={"bdy": 0.1})


@pytest.mark.parametrize(("selector", "meant"), [("body.w", "'body/w'"), (".body.w", "'body/w'"), ("w", "'**/w'")])
def test_a_path_that_is_written_as_an_attribute_gets_its_slashes(selector, meant):
    with pytest.raises(
        ft.PartitionError, match=says(f"no leaf matches {selector!r}", f"did you mean {meant} (1 leaf)?")
    ):
        ft.partition(PARAMS, {"one": selector, "rest": ...})


def test_all_parts_that_no_loss_reaches_are_told_at_once():
    of_tail = update(lambda params, batch: jnp.sum(params["tail"]) * batch["x"])
    told = says("'body' ('body/b', 'body/w') and the trained part 'head' ('head')", "freeze these parts")
    with pytest.raises(ft.AuditError, match=told):
        of_tail(of_tail.init(PARAMS), {"x": 1.0})


def reads_of(update, state):
    """What is commonly done with a state, each as a function of nothing."""
    with_head = ft.Evaluation(lambda params, batch: {"head": batch["x"] * params["head"]}, [{"x": np.ones(2)}])
    return {
        "a parameter": lambda: state.params["head"] + 1,
        "its optimizer": lambda: optim().learning_rates(state.opt_state),
        "its leaves": lambda: jax.tree.leaves(state),
        "a copy": lambda: copy.deepcopy(state),
        "evaluation": lambda: with_head(state.params),
        "adopt": lambda: update.adopt(update, state),
        "a sweep": lambda: ft.lr_sweep(update, state, [{"x": 1.0}] * 2, {"head": (1e-3, 1.0)}),
        "pure": lambda: update.pure(state, {"x": 1.0}),
        "fit": lambda: ft.fit(update, state, [{"x": 1.0}], epochs=1),
    }


def test_whoever_reads_a_state_that_was_consumed_is_told_what_to_go_on_from(tmp_path):
    each = update()
    state = each.init(PARAMS)
    shallow = jax.tree.map(lambda leaf: leaf, state)
    state, _ = each(old := state, {"x": 1.0})
    told = says("this state was consumed by an earlier call", "go on from the state", "state, metrics = update(state,")
    for read in reads_of(each, old).values():
        with pytest.raises(ft.UpdateError, match=told):
            read()
    checkpoints = ft.Checkpoints(tmp_path)
    for used in (old, shallow):
        with pytest.raises(ft.UpdateError, match=told):
            checkpoints.save(used)
    assert not checkpoints.steps()
    assert (int(old.step), int(old.batches), old.key) == (0, 0, None)
    assert repr(old) == "<a TrainState that was consumed; the call returned the one to go on from>"
    assert repr(state).startswith("TrainState(params={'body'")
    for read in reads_of(each, copy.deepcopy(state)).values():
        read()


def test_of_a_state_only_what_was_consumed_can_not_be_read():
    first_of_two = ft.make_update(
        lambda params, batch, model_state: ft.Loss(batch["x"] * jnp.sum(params["head"]), model_state=model_state + 1),
        optim(),
        accumulate=2,
        audit=False,
    )
    state = first_of_two.init(PARAMS, model_state=jnp.zeros(()))
    first_of_two(state, {"x": 1.0})
    assert state.params["head"].tolist() == [1.0, 1.0]
    with pytest.raises(ft.UpdateError, match=says("by an earlier call, which deleted its model_state, and every")):
        _ = state.model_state


def test_checkpoints_are_of_states_in_a_folder(tmp_path):
    checkpoints = ft.Checkpoints(tmp_path / "run")
    for call, of in (("save(state)", checkpoints.save), ("restore(like=update.abstract(", checkpoints.restore)):
        told = says("of a TrainState, not of a dict", f"checkpoints.{call}", "ft.load_params reads the params alone")
        with pytest.raises(ft.CheckpointError, match=told):
            of(PARAMS)
    (tmp_path / "run.zip").touch()
    told = says(f"{tmp_path / 'run.zip'} is a file: give a folder, such as {tmp_path / 'run'}-checkpoints")
    for path in (tmp_path / "run.zip", tmp_path / "run.zip" / "first"):
        with pytest.raises(ft.CheckpointError, match=told):
            ft.Checkpoints(path)
    with pytest.raises(ft.CheckpointError, match=told):
        ft.load_params(tmp_path / "run.zip", like=PARAMS)


def nnx_model():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    return model, *nnx.split(model, nnx.Param, ...)


def test_a_model_of_nnx_that_a_loss_function_closes_over_and_changes_is_told():
    model, graphdef, params, rest = nnx_model()

    def closes_over(params, batch):
        return jnp.mean(nnx.merge(graphdef, params, rest)(batch) ** 2)

    def closes_over_all(params, batch):
        nnx.update(model, params)
        return jnp.mean(model(batch) ** 2)

    told = says(
        " changes what was made outside of it (Flax: Cannot mutate", "write model = nnx.merge(graphdef, params,"
    )
    each = ft.make_update(closes_over, ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)}))
    with pytest.raises(ft.LossError, match=told):
        each(each.init(params), jnp.ones((3, 2)))
    with pytest.raises(ft.LossError, match=told):
        ft.make_train_step(closes_over_all)(params, jnp.ones((3, 2)))


def test_a_model_of_nnx_that_is_merged_as_the_error_says_learns():
    _, graphdef, params, rest = nnx_model()

    def loss_fn(params, batch, model_state):
        model = nnx.merge(graphdef, params, model_state)
        value = jnp.mean(model(batch) ** 2)
        return ft.Loss(value, model_state=nnx.state(model, nnx.Not(nnx.Param)))

    each = ft.make_update(loss_fn, ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)}))
    state = each.init(params, model_state=rest)
    before = jax.tree.map(np.asarray, state.model_state)
    state, _ = each(state, jnp.ones((3, 2)))
    assert not jax.tree.all(jax.tree.map(np.array_equal, before, state.model_state))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))


VARIABLES = Normed().init(jax.random.key(0), jnp.ones((3, 2)), True)
LINEN = says("what is under 'batch_stats' is state of Flax Linen", 'init(variables["params"], model_state=variables["b')


def in_training(variables, batch):
    return jnp.mean(Normed().apply(variables, batch, True, mutable=["batch_stats"])[0] ** 2)


def in_evaluation(variables, batch):
    return jnp.mean(Normed().apply(variables, batch, False) ** 2)


@pytest.mark.parametrize("loss_fn", [in_training, in_evaluation])
@pytest.mark.parametrize("rules", [{"all": ...}, {"stats": "batch_stats", "rest": ...}])
def test_batch_statistics_of_linen_that_are_given_as_params_are_told_to_be_state(loss_fn, rules):
    learns = ft.Optimizer(ft.partition(VARIABLES, rules), {part: optax.sgd(0.1) for part in rules})
    each = ft.make_update(loss_fn, learns)
    is_error = loss_fn is in_training and "stats" in rules
    with pytest.raises(ft.AuditError, match=LINEN) if is_error else pytest.warns(UserWarning, match=LINEN) as found:
        each(each.init(VARIABLES), jnp.ones((3, 2)))
    if not is_error:
        assert [warning.filename for warning in found] == [__file__]
    report = ft.audit(loss_fn, learns.parts, VARIABLES, jnp.ones((3, 2)))
    assert re.search(LINEN, str(report))


def test_batch_statistics_that_are_model_state_are_not_told_of(recwarn):
    def loss_fn(params, batch, model_state):
        variables = {"params": params, "batch_stats": model_state}
        value, new = Normed().apply(variables, batch, True, mutable=["batch_stats"])
        return ft.Loss(jnp.mean(value**2), model_state=new["batch_stats"])

    params = VARIABLES["params"]
    each = ft.make_update(loss_fn, ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)}))
    each(each.init(params, model_state=VARIABLES["batch_stats"]), jnp.ones((3, 2)))
    assert not recwarn


def test_batches_that_are_not_stacked_are_told_beside_the_error_of_the_loss_function():
    def loss_fn(params, batch):
        return jnp.sum(params["head"] * batch["x"][:, 0])

    params = {"head": jnp.ones(())}
    optim = ft.Optimizer(ft.partition(params, {"head": ...}), {"head": optax.sgd(0.1)})
    update = ft.make_update(loss_fn, optim)
    with pytest.raises(IndexError) as raised:
        update.scan(update.init(params), {"x": jnp.ones((32, 4))})
    assert "so that each has the shapes {'x': (4,)}: batches are stacked" in raised.value.__notes__[0]


def test_several_loss_functions_are_an_error_that_names_phases():
    params = {"head": jnp.ones(())}
    optim = ft.Optimizer(ft.partition(params, {"head": ...}), {"head": optax.sgd(0.1)})
    with pytest.raises(ft.LossError, match=r"is no loss function: .* several take turns with ft.alternate"):
        ft.make_update([lambda params, batch: 0.0] * 2, optim)
