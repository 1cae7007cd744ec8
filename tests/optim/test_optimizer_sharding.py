"""An optimizer over eight devices, as 4 x 2."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizers import PARTS, params

import functrain as ft


def sharded(axis_type=AxisType.Auto):
    """Parameters on a mesh, and the mesh."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    whole = {"body": {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}, "head": jnp.ones((4, 4))}
    specs = {"body": {"w": P("x", "y"), "b": P("y")}, "head": P("x")}
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), whole, specs), mesh


def sharded_optimizer(whole, tx):
    return ft.Optimizer(
        ft.partition(whole, {"body": "body", "head": "head"}), {"body": tx, "head": optax.sgd(0.1, 0.9)}
    )


def shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def placement(tree):
    return jax.tree.map(lambda leaf: (leaf.sharding, leaf.committed), tree)


MATRIX_OPTIMIZERS = {
    "adam": ft.with_lr(optax.adam, 0.1),
    "adafactor": ft.with_lr(optax.adafactor, 0.1, min_dim_size_to_factor=4),
    "muon": ft.with_lr(optax.contrib.muon, 0.1),
}


def test_moments_are_laid_out_as_their_parameters_and_scalars_are_replicated_over_the_mesh():
    whole, mesh = sharded()
    opt_state = sharded_optimizer(whole, ft.with_lr(optax.adam, 0.1)).init(whole)
    adam, replicated = opt_state["body"].inner[0], NamedSharding(mesh, P())
    for moments in (adam.mu, adam.nu):
        assert shardings(moments) == {"body/w": whole["body"]["w"].sharding, "body/b": whole["body"]["b"].sharding}
    assert {adam.count.sharding, opt_state["body"].learning_rate.sharding, opt_state["body"].setting.sharding} == {
        replicated
    }
    assert shardings(opt_state["head"][0].trace) == {"head": whole["head"].sharding}
    assert all(leaf.committed for leaf in jax.tree.leaves(opt_state))


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_the_shardings_of_a_state_are_known_without_it(name):
    whole, _ = sharded()
    optim = sharded_optimizer(whole, MATRIX_OPTIMIZERS[name])
    assert optim.shardings(shardings(whole)) == shardings(optim.init(whole))


# Without `out_shardings` XLA lays out as it likes what is neither a scalar nor shaped like its parameter: the factored
# moments of adafactor.
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adam", "plain jit"),
        ("muon", "plain jit"),
        ("adam", "out_shardings"),
        ("adafactor", "out_shardings"),
        ("muon", "out_shardings"),
    ],
)
def test_a_compiled_step_leaves_everything_where_it_was_and_compiles_once(name, how):
    whole, _ = sharded()
    optim = sharded_optimizer(whole, MATRIX_OPTIMIZERS[name])
    opt_state, grads = optim.init(whole), optim.parts.split(whole)
    before = placement((whole, opt_state))
    out = {"out_shardings": (shardings(whole), optim.shardings(shardings(whole)))} if how == "out_shardings" else {}
    step = jax.jit(optim.step, **out)
    for _ in range(3):
        whole, opt_state = step(whole, grads, opt_state)
        assert placement((whole, opt_state)) == before
    assert step._cache_size() == 1


def test_a_mesh_of_explicit_axes_serves_as_well():
    whole, mesh = sharded(AxisType.Explicit)
    with jax.set_mesh(mesh):
        whole["head"] = jax.device_put(whole["head"], P("x", None))  # How such a mesh writes it.
        optim = sharded_optimizer(whole, ft.with_lr(optax.adam, 0.1))
        opt_state, grads = optim.init(whole), optim.parts.split(whole)
        before = placement((whole, opt_state))
        step = jax.jit(optim.step)
        for _ in range(3):
            whole, opt_state = step(whole, grads, opt_state)
            assert placement((whole, opt_state)) == before
        assert step._cache_size() == 1


@pytest.mark.parametrize("committed", [True, False])
def test_state_is_on_its_parameters_device_and_committed_only_as_they_are(committed):
    whole = jax.device_put(params(), jax.devices()[5]) if committed else params()
    optim = ft.Optimizer(PARTS, {"body": ft.with_lr(optax.adam, 0.1), "head": ft.FROZEN})
    opt_state, grads = optim.init(whole), {"body": PARTS.split(whole)["body"]}
    before = placement((whole, opt_state))
    assert {leaf.committed for leaf in jax.tree.leaves(opt_state)} == {committed}
    assert {leaf.sharding for leaf in jax.tree.leaves(opt_state)} == {whole["body"]["w"].sharding}
    step = jax.jit(optim.step)
    for _ in range(3):
        whole, opt_state = step(whole, grads, opt_state)
        # The output of a jit is committed where an argument is.
        assert placement((whole, opt_state)) == before
    assert step._cache_size() == 1


def test_a_parameter_that_is_not_yet_on_the_mesh_does_not_draw_the_state_off_it():
    on_mesh, mesh = sharded()
    whole = {"a": jnp.ones(3), "b": on_mesh["head"]}  # The first is uncommitted: jit puts it on the mesh.
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": ft.with_lr(optax.adam, 0.1)})
    opt_state = optim.init(whole)
    assert opt_state["all"].learning_rate.sharding.device_set == set(mesh.devices.flat)
    jax.jit(optim.step)(whole, {"all": whole}, opt_state)
