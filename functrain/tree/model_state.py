"""Leaves that are state of a model and no parameters: batch statistics and random state of Flax."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.tree.paths import PyTree, is_variable, leaves_of, nodes
from functrain.tree.text import listed

RANDOM, STATISTICS, OF_LINEN = "RngState", "BatchStat", "batch_stats"
_OF_NNX = ("rngs/key", "rngs/count")

NNX_MODEL_STATE = (
    "graphdef, params, rest = nnx.split(model, nnx.Param, ...), and give update.init(params,"
    " model_state=rest); in loss_fn(params, batch, model_state) write model = nnx.merge(graphdef, params, model_state),"
    " and return ft.Loss(value, model_state=nnx.state(model, nnx.Not(nnx.Param)))"
)
_LINEN_MODEL_STATE = (
    "what is under 'batch_stats' is state of Flax Linen, and no parameter: with variables = model.init(...), write"
    ' update.init(variables["params"], model_state=variables["batch_stats"]), and in loss_fn(params, batch,'
    ' model_state) model.apply({"params": params, "batch_stats": model_state}, ...)'
)


def state_of_model(tree: PyTree) -> dict[str, str]:
    """Which leaves of a tree are state of a model, by path, and of what kind.

    >>> state_of_model({"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}})
    {'batch_stats/mean': 'batch_stats'}

    The kinds are the names of the types of NNX Variables, or of the collection of Linen.
    """
    found = {}
    for keys, node in nodes(tree):
        kind = ""
        if is_variable(node):
            kind = next((base.__name__ for base in type(node).__mro__ if base.__name__ in (RANDOM, STATISTICS)), "")
        for path, _ in leaves_of(keys, node):
            if of_path := OF_LINEN if path.startswith(f"{OF_LINEN}/") else kind:
                found[path] = of_path
    return found


def told_of_statistics(kinds: Mapping[str, str], *paths: Iterable[str]) -> str:
    """What to write where batch statistics are among parameters; empty where none of these paths is.

    >>> told_of_statistics({"batch_stats/mean": "batch_stats"}, ["params/w"], ["batch_stats/mean"]).partition(":")[0]
    "what is under 'batch_stats' is state of Flax Linen, and no parameter"
    """
    of = {path: kinds[path] for each in paths for path in each if path in kinds}
    if OF_LINEN in of.values():
        return _LINEN_MODEL_STATE
    if mine := [path for path, kind in of.items() if kind == STATISTICS]:
        return f"an nnx.BatchStat, such as {mine[0]!r}, is state and no parameter: {NNX_MODEL_STATE}"
    return ""


def told_of_random(kinds: Mapping[str, str], leaves: Mapping[str, Any]) -> str:
    """What to write where leaves that have no gradient, by path, are random state; empty where none is.

    >>> told_of_random({}, {"rngs/key": jax.random.key(0), "steps": jnp.zeros((), int)}).partition(":")[0]
    "'rngs/key', which is random state"
    """
    mine = [path for path, leaf in leaves.items() if kinds.get(path) == RANDOM or _is_random(path, leaf)]
    if not mine:
        return ""
    of_nnx = any(kinds.get(path) == RANDOM or path.endswith(_OF_NNX) for path in mine)
    in_general = "update.init(params, key=...) for a loss function that declares key, or model_state=..., or freeze it"
    advice = f"pass it as model_state: {NNX_MODEL_STATE}" if of_nnx else f"pass it to {in_general}"
    return f"{listed(mine)}, which is random state: {advice}"


def _is_random(path: str, leaf: Any) -> bool:
    is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return bool(is_key) or path.endswith(_OF_NNX)
