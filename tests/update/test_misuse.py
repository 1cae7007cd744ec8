"""What is commonly written wrong, and what the error says to write."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
