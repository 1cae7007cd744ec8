"""A transform is given the model's own tree, as under `optax.multi_transform`; what crosses a call is flat."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import core, linen, nnx, traverse_util
from optimizers import bits
from trees import TREES, Model, Pair, identical, says

import functrain as ft

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


class Linears(nnx.Module):
    def __init__(self, rngs):
        self.conv1, self.conv10 = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)


def plain():
    return {
        name: {"kernel": jnp.full(shape, 0.5), "bias": jnp.ones(shape[1])}
        for name, shape in (("conv1", (3, 4)), ("conv10", (4, 2)))
    }


def linen_params():
    return linen.Sequential([linen.Dense(4), linen.Dense(2)]).init(jax.random.key(0), X)["params"]


# By framework: a tree, and the path of its first layer.
MODELS = {
    "dict": (plain, "conv1"),
    "NNX": (lambda: nnx.state(Linears(nnx.Rngs(0)), nnx.Param), "conv1"),
    "Linen": (linen_params, "layers_0"),
    "Equinox": (lambda: eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array), "layers/0"),
    "Haiku": (lambda: hk.transform(lambda x: hk.nets.MLP([4, 2])(x)).init(jax.random.key(0), X), "mlp/~/linear_0"),
}  # fmt: skip
KERNELS = {"kernel", "w", "weight"}


def last(keys):
    """The name of a leaf, whatever kind of key a framework has."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
    return next(name for name in reversed(names) if name not in ("value", None))


def by_flatten_dict(tree):
    """The mask of most Flax code: kernels decay, and nothing else."""
    if isinstance(tree, nnx.State):
        return nnx.from_flat_state([(path, path[-1] in KERNELS) for path, _ in nnx.to_flat_state(tree)])
    if isinstance(tree, eqx.Module):  # It is no dict: its own idiom.
        return jax.tree.map(
            lambda node: (
                eqx.tree_at(lambda node: (node.weight, node.bias), node, (True, False))
                if isinstance(node, eqx.nn.Linear)
                else node
            ),
            tree,
            is_leaf=lambda node: isinstance(node, eqx.nn.Linear),
        )
    return traverse_util.unflatten_dict({path: path[-1] in KERNELS for path in traverse_util.flatten_dict(tree)})


def by_path(tree):
    return jax.tree_util.tree_map_with_path(lambda keys, _: last(keys) in KERNELS, tree)


def prefix(tree):
    """Whole layers: the first decays, the second does not."""
    if isinstance(tree, eqx.Module):
        return eqx.tree_at(lambda tree: tree.layers, tree, (True, False))
    children = [True, False]
    return jax.tree.map(lambda _: children.pop(0), tree, is_leaf=lambda node: node is not tree)


def idioms(whole):
    return {
        "flatten_dict": by_flatten_dict,
        "tree_map_with_path": by_path,
        "a tree": by_path(whole),
        "a prefix": prefix(whole),
    }


def run(optim, whole, grads, steps=3, **extra):
    opt_state = optim.init(whole)
    split = optim.parts.split(grads)
    for _ in range(steps):
        whole, opt_state = optim.step(whole, {part: split[part] for part in optim.trained}, opt_state, **extra)
    return whole


def run_optax(optim, whole, grads, steps=3, **extra):
    """The same by `optax.multi_transform`."""
    transforms = {part: optax.set_to_zero() if tx is ft.FROZEN else tx for part, tx in optim.transforms.items()}
    # An Equinox module of labels is callable, which optax would do.
    multi = optax.multi_transform(transforms, lambda _: optim.parts.labels())
    state = multi.init(whole)
    for _ in range(steps):
        updates, state = multi.update(grads, state, whole, **extra)
        whole = optax.apply_updates(whole, updates)
    return whole


def random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=jnp.shape(leaf)), jnp.float32), tree)


# What a transform is given.


def spy(seen):
    """A transform that keeps the trees that it is given."""

    def init(params):
        seen.append(params)
        return ()

    def update(updates, state, params):
        seen.extend((updates, params))
        return updates, state

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("name", TREES)
def test_a_transform_is_given_what_multi_transform_gives_it(name):
    whole = TREES[name]()
    flat = ft.flatten(whole)
    # Every other leaf that can be trained is in the part.
    mine = [path for path, leaf in flat.items() if not ft.non_float(path, leaf)][::2]
    rules = {"mine": lambda path, leaf: path in mine, "others": ...}
    parts = ft.partition(whole, rules if len(mine) < len(flat) else {"mine": ...})
    ours, theirs = [], []
    optim = ft.Optimizer(parts, dict(zip(parts.names, [spy(ours), ft.FROZEN], strict=False)))
    opt_state = optim.init(whole)
    ours.clear()
    optim.update({"mine": parts.split(whole)["mine"]}, opt_state, whole)

    masked = optax.masked(spy(theirs), jax.tree.map(lambda part: part == "mine", parts.labels()))
    masked.update(whole, optax.MaskedState(()), whole)
    for given, expected in zip(ours, theirs, strict=True):
        assert jax.tree.structure(given) == jax.tree.structure(expected)
        assert [float(leaf) if jnp.ndim(leaf) == 0 else leaf.tolist() for leaf in jax.tree.leaves(given)] == [
            float(leaf) if jnp.ndim(leaf) == 0 else leaf.tolist() for leaf in jax.tree.leaves(expected)
        ]


@pytest.mark.parametrize("idiom", ["flatten_dict", "tree_map_with_path", "a tree", "a prefix"])
@pytest.mark.parametrize("name", MODELS)
def test_a_mask_decays_the_leaves_that_it_decays_in_optax(name, idiom):
    make, first = MODELS[name]
    whole = make()
    parts = ft.partition(whole, {"first": first, "rest": ...})
    tx = optax.adamw(0.1, weight_decay=0.5, mask=idioms(whole)[idiom])
    optim = ft.Optimizer(parts, {"first": tx, "rest": tx})
    grads = random_like(whole)
    assert bits(ft.flatten(run(optim, whole, grads))) == bits(ft.flatten(run_optax(optim, whole, grads)))

    # With gradients of zero only what decays moves: by name, not by what optax does.
    zeros = jax.tree.map(jnp.zeros_like, whole)
    before, after = ft.flatten(whole), ft.flatten(run(optim, whole, zeros))
    decayed = {path for path in before if (before[path] != after[path]).any()}
    inside = first + "/"
    expected = (
        {path for path in before if path.startswith(inside)}
        if idiom == "a prefix"
        else {path for path in before if path.rsplit("/", 1)[-1] in KERNELS}
    )
    assert decayed == {path for path in expected if (before[path] != 0).any()}


@pytest.mark.parametrize("name", MODELS)
def test_a_selector_masks_as_a_function_of_paths_does(name):
    make, first = MODELS[name]
    whole = make()
    parts = ft.partition(whole, {"first": first, "rest": ...})
    kernel = next(path for path in ft.flatten(whole) if path.rsplit("/", 1)[-1] in KERNELS).rsplit("/", 1)[-1]
    biases = [f"**/{path.rsplit('/', 1)[-1]}" for path in ft.flatten(whole) if not path.endswith(kernel)]
    grads = random_like(whole)
    expected = None
    for mask in (by_path, ft.mask(f"**/{kernel}"), ft.mask(biases, invert=True)):
        tx = optax.adamw(0.1, weight_decay=0.5, mask=mask)
        after = bits(ft.flatten(run(ft.Optimizer(parts, {"first": tx, "rest": tx}), whole, grads)))
        expected = expected or after
        assert after == expected


def test_a_mask_leaves_masked_nodes_as_they_are():
    parts = ft.partition(plain(), {"first": "conv1", "rest": ...})
    masked = ft.mask("**/kernel")(parts.masked(plain(), "first"))
    nothing = optax.MaskedNode()
    assert masked == {"conv1": {"kernel": True, "bias": False}, "conv10": {"kernel": nothing, "bias": nothing}}


def test_a_mask_that_takes_no_leaf_of_its_part_is_an_error_that_names_the_part_and_what_comes_nearest():
    whole = plain()
    parts = ft.partition(whole, {"first": "conv1", "rest": ...})
    tx = optax.adamw(0.1, mask=ft.mask(["**/kernel", "conv10"]))
    optim = ft.Optimizer(parts, {"first": tx, "rest": ft.FROZEN})
    message = says("the transform of part 'first': mask: no leaf matches 'conv10'; did you mean 'conv1' (2 leaves)?")
    with pytest.raises(ft.PartitionError, match=message):
        optim.init(whole)


def test_a_mask_with_a_state_of_its_own_crosses_calls_flat():
    whole = plain()
    for mask in (by_flatten_dict, {"conv1": {"kernel": True, "bias": False}, "conv10": False}):
        optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": optax.masked(optax.sgd(0.1, 0.9), mask)})
        trace = optim.init(whole)["all"].inner_state[0].trace
        assert set(trace) == {"conv1/kernel", "conv10/kernel"} if callable(mask) else {"conv1/kernel"}
        assert bits(run(optim, whole, whole)) == bits(run_optax(optim, whole, whole))


MUON_DIMENSIONS = {
    "conv1": {"kernel": optax.contrib.MuonDimensionNumbers(0, 1), "bias": None},
    "conv10": {"kernel": None, "bias": None},
}


def loss_fn(params):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params["conv1"]))


OF_LEAVES = {
    "lars": optax.lars(0.1, weight_decay=0.5, weight_decay_mask=by_flatten_dict, trust_ratio_mask=by_path(plain())),
    "muon": optax.contrib.muon(0.1, muon_weight_dimension_numbers=MUON_DIMENSIONS),
    "muon by a function": optax.contrib.muon(0.1, muon_weight_dimension_numbers=lambda params: MUON_DIMENSIONS),
    "labels": optax.multi_transform({True: optax.adam(0.1), False: optax.sgd(0.1)}, by_path),
    "sophia": optax.contrib.sophia(0.1),
}


@pytest.mark.parametrize("name", OF_LEAVES)
def test_a_transform_that_knows_the_models_leaves_steps_as_in_optax(name):
    whole = plain()
    parts = ft.partition(whole, {"first": "conv1", "rest": ...})
    optim = ft.Optimizer(parts, {"first": OF_LEAVES[name], "rest": ft.FROZEN})
    extra = {"obj_fn": loss_fn} if name == "sophia" else {}
    after = run(optim, whole, random_like(whole), **extra)
    assert bits(after) == bits(run_optax(optim, whole, random_like(whole), **extra))
    assert (after["conv1"]["kernel"] != whole["conv1"]["kernel"]).any()


def test_lookahead_is_given_the_gradients_of_its_fast_parameters():
    tx = optax.lookahead(optax.adam(0.1), sync_period=2, slow_step_size=0.5)
    whole, grads = optax.LookaheadParams(plain(), plain()), random_like(plain())
    parts = ft.partition(whole, {"all": ...})
    optim = ft.Optimizer(parts, {"all": tx})
    train_step = ft.make_train_step(
        lambda params, grads: sum(map(jnp.vdot, jax.tree.leaves(params.fast), jax.tree.leaves(grads))), parts
    )
    opt_state, expected, state = optim.init(whole), whole, tx.init(whole)
    assert set(opt_state["all"].fast_state[0].mu) == {f"fast/{path}" for path in ft.flatten(plain())}
    for _ in range(3):
        whole, opt_state = optim.step(whole, train_step(whole, grads)[0], opt_state)
        updates, state = tx.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    assert bits(whole) == bits(expected)


def test_functions_and_trees_of_the_whole_params_are_of_the_parts_leaves_to_a_transform():
    seen = {}

    def update(updates, state, params, **extra):
        seen.update(extra, returned=extra["grad_fn"](params, 2.0), value=extra["value_fn"](params))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    whole = plain()
    parts = ft.partition(whole, {"first": "conv1", "rest": ...})
    optim = ft.Optimizer(parts, {"first": tx, "rest": ft.FROZEN})
    split = parts.split(whole)
    optim.update(
        {"first": split["first"]},
        optim.init(whole),
        whole,
        value_fn=loss_fn,
        grad_fn=lambda params, factor: jax.tree.map(lambda leaf: factor * leaf, params),
        tags=whole,
        grad={"first": split["first"]},
        number=3,
    )
    masked = parts.masked(whole, "first")
    assert identical(seen["tags"], masked)
    assert identical(seen["grad"], masked)
    assert bits(seen["returned"]) == bits(jax.tree.map(lambda leaf: 2.0 * leaf, masked))
    assert (float(seen["value"]), seen["number"]) == (float(loss_fn(whole)), 3)


def test_updates_of_another_structure_are_an_error():
    tx = optax.GradientTransformation(lambda params: (), lambda updates, state, params: ([], state))
    whole = plain()
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": tx})
    message = says(
        "part 'all': its transform returned updates of another structure", "return a tree like the gradients"
    )
    with pytest.raises(ft.OptimizerError, match=message):
        run(optim, whole, whole)


# What crosses a call, and optax's own state.


def crossing(tx, whole):
    """The state of a part of all leaves as it crosses a call, once it is known to be that of optax too."""
    optim = ft.Optimizer(ft.partition(whole, {"all": ...}), {"all": tx})
    opt_state = optim.init(whole)
    own, expected = optim.optax_state(opt_state, "all"), tx.init(whole)
    assert jax.tree.structure(own) == jax.tree.structure(expected)
    assert bits(jax.tree.leaves(own)) == bits(jax.tree.leaves(expected))
    return opt_state["all"]


def like_params(make):
    """A transform with such a state, which it does not use."""
    return optax.GradientTransformation(make, lambda updates, state, params=None: (updates, state))


def zeros_by_hand(params):
    """What tree_map_params can't follow, as it needs leaves."""
    return jnp.zeros((), jax.tree.leaves(params)[0].dtype), jax.tree.map(jnp.zeros_like, params)


@pytest.mark.parametrize(
    "whole",
    [
        {"a": [jnp.ones(2), jnp.ones(3)]},
        [jnp.ones(2), jnp.ones(3)],
        (jnp.ones(2), jnp.ones(3)),
        ((jnp.ones(2), jnp.ones(3)), ()),
        Pair(jnp.ones(2), [jnp.ones(3)]),
        Model({"w": jnp.ones(2)}, jnp.ones(3)),
        jnp.ones(2),
        core.freeze({"a": {"b": jnp.ones(2)}}),
    ],
    ids=["dict", "list", "tuple", "nested tuples", "NamedTuple", "dataclass", "bare array", "FrozenDict"],
)
@pytest.mark.parametrize(
    "init", [jax.tree_util.Partial(jax.tree.map, jnp.zeros_like), zeros_by_hand], ids=["map", "leaves"]
)
def test_every_tree_like_the_models_is_flat_in_the_state_that_crosses_a_call(whole, init):
    flat = ft.flatten(whole)
    tx = optax.chain(like_params(init), optax.adam(0.1), ft.with_lr(optax.sgd, 0.1, momentum=0.9))
    state = crossing(tx, whole)
    trees = [state[1][0].mu, state[1][0].nu, state[2].inner[0].trace]
    trees.append(state[0] if init is not zeros_by_hand else state[0][1])
    assert [tree.keys() if type(tree) is dict else tree for tree in trees] == [flat.keys()] * 4
    assert state[1][0].count.shape == ()


def test_state_that_has_more_than_one_leaf_for_a_parameter_keeps_them_under_its_path():
    state = crossing(optax.sm3(0.1), plain())
    assert [len(state[0].mu[path]) for path in ("conv1/bias", "conv1/kernel")] == [1, 2]


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_leaves_are_what_they_were_with_flat_trees(name):
    make, first = MODELS[name]
    whole = make()
    parts = ft.partition(whole, {"first": first, "rest": ...})
    for tx in (
        optax.adam(0.1),
        optax.lbfgs(),
        optax.adafactor(0.1),
        optax.sm3(0.1),
        optax.contrib.schedule_free_sgd(0.1),
    ):
        optim = ft.Optimizer(parts, {"first": tx, "rest": tx})
        opt_state = optim.init(whole)
        for part, state in opt_state.items():
            assert ft.flatten(state).keys() == ft.flatten(optim.optax_state(opt_state, part)).keys()
            assert ft.flatten(state).keys() == ft.flatten(tx.init(parts.split(whole)[part])).keys()


def test_optaxs_own_state_is_what_optax_has_under_multi_transform_and_is_taken_back():
    whole, tx = plain(), optax.adam(optax.linear_schedule(0.1, 0.0, 5))
    parts = ft.partition(whole, {"first": "conv1", "rest": ...})
    optim = ft.Optimizer(parts, {"first": tx, "rest": tx})
    split, opt_state = parts.split(random_like(whole)), optim.init(whole)
    _, opt_state = optim.step(whole, split, opt_state)
    multi = optax.multi_transform(optim.transforms, parts.labels())
    _, theirs = multi.update(random_like(whole), multi.init(whole), whole)
    own = optim.optax_state(opt_state, "first")
    assert jax.tree.structure(own) == jax.tree.structure(theirs.inner_states["first"].inner_state)
    assert bits(own) == bits(theirs.inner_states["first"].inner_state)
    assert bits(optax.tree.get(own, "mu")["conv1"]) == bits(optax.tree.get(theirs.inner_states["first"], "mu")["conv1"])

    taken = optim.with_optax_state(opt_state, "first", optax.tree.set(own, count=3))
    assert [int(count) for _, count in optax.tree.get_all_with_path(taken["first"], "count")] == [3, 3]
    assert jax.tree.map(lambda leaf: leaf.dtype, taken) == jax.tree.map(lambda leaf: leaf.dtype, opt_state)
    assert identical(taken["rest"], opt_state["rest"])


def test_schedule_free_evaluates_at_its_own_parameters():
    whole = plain()
    parts = ft.partition(whole, {"first": "conv1", "rest": ...})
    optim = ft.Optimizer(parts, {"first": optax.contrib.schedule_free_sgd(0.1), "rest": ft.FROZEN})
    opt_state = optim.init(whole)
    after, opt_state = optim.step(whole, {"first": parts.split(whole)["first"]}, opt_state)
    own = optim.optax_state(opt_state, "first")
    at = ft.flatten(optax.contrib.schedule_free_eval_params(own, parts.masked(after, "first")))
    z, y = own.z["conv1"]["kernel"], after["conv1"]["kernel"]
    np.testing.assert_allclose(at["conv1/kernel"], (y - (1 - 0.9) * z) / 0.9, rtol=1e-6)  # Its b1 is 0.9.
    assert jax.tree.structure(parts.merge({"first": at}, into=after)) == jax.tree.structure(whole)


def test_a_state_of_another_structure_or_shape_is_not_taken_back():
    optim = ft.Optimizer(ft.partition(plain(), {"all": ...}), {"all": optax.sgd(0.1, 0.9)})
    opt_state = optim.init(plain())
    with pytest.raises(ft.OptimizerError, match=says("the state given for part 'all' is not of the structure")):
        optim.with_optax_state(opt_state, "all", opt_state["all"])
    wrong = jax.tree.map(lambda leaf: jnp.ones(7), optim.optax_state(opt_state, "all"))
    message = says("the state given for part 'all' holds a leaf of shape (7,) where one of (4,) was")
    with pytest.raises(ft.OptimizerError, match=message):
        optim.with_optax_state(opt_state, "all", wrong)


@pytest.mark.parametrize("part", ["frozen", "tail"])
def test_a_part_that_has_no_state_is_named(part):
    parts = ft.partition(plain(), {"frozen": "conv1", "rest": ...})
    optim = ft.Optimizer(parts, {"frozen": ft.FROZEN, "rest": optax.sgd(0.1)})
    message = says(f"part {part!r} has no optimizer state", "the trained parts are 'rest'")
    with pytest.raises(ft.OptimizerError, match=message):
        optim.optax_state(optim.init(plain()), part)


@pytest.mark.parametrize(
    "tx", [optax.adam(0.1), optax.lbfgs(), optax.masked(optax.sgd(0.1, 0.9), by_path), optax.contrib.muon(0.1)],
    ids=["adam", "lbfgs", "masked", "muon"],
)  # fmt: skip
def test_tree_map_params_of_optax_maps_over_what_is_like_the_params_in_the_state_of_an_optimizer(tx):
    whole = plain()
    parts = ft.partition(whole, {"first": "conv1", "rest": ...})
    optim = ft.Optimizer(parts, {"first": tx, "rest": ft.FROZEN})
    mapped = optax.tree_utils.tree_map_params(
        optim, lambda leaf: "param", optim.init(whole), transform_non_params=lambda leaf: "other"
    )
    paths = set(parts.paths("first"))
    for name, leaf in ft.flatten(mapped["first"]).items():
        assert leaf == ("param" if any(name.endswith("/" + path) for path in paths) else "other"), name
