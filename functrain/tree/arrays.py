"""Small questions and arithmetic on the arrays of a tree: dtypes, shardings, norms, shapes."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.tree.paths import PyTree, flatten


def as_array(leaf: Any, dtype: Any = None) -> jax.Array:
    """A jax array of a definite dtype, by default its own; numpy's memory is copied, as donation hands it to XLA.

    >>> as_array(2.0).weak_type, as_array(2.0, jnp.bfloat16).dtype
    (False, dtype(bfloat16))
    """
    array = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf, copy=True)
    is_weak = getattr(array, "weak_type", False)  # Arrays of random keys have no such attribute.
    if array.dtype == (dtype or array.dtype) and not is_weak:
        return array
    return jax.lax.convert_element_type(array, dtype or array.dtype)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, the shape of one, or a number, of which one can be made.

    >>> is_array(jnp.ones(2)), is_array(1.0), is_array(True), is_array(jnp.tanh)
    (True, True, False, False)
    """
    if isinstance(leaf, bool | str | type):
        return False
    return isinstance(leaf, int | float | complex) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def is_here(leaf: Any) -> bool:
    """Whether it lies in this process alone."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def wide(leaf: Any) -> jax.Array:
    """The leaf in float32, or as it is where its dtype is wider."""
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def conjugate(tree: PyTree) -> PyTree:
    """The tree with its complex leaves conjugated.

    >>> conjugate({"w": 1.0, "z": 1.0 + 2.0j})["z"].item()
    (1-2j)
    """
    return jax.tree.map(lambda leaf: jnp.conj(leaf) if jnp.iscomplexobj(leaf) else leaf, tree)


def global_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all leaves together, computed in float32 or wider."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(jnp.abs(wide(leaf)))) for leaf in jax.tree.leaves(tree)))


def is_finite(tree: PyTree) -> jax.Array:
    """Whether every number of a tree is finite, a bool scalar.

    >>> bool(is_finite({"a": jnp.ones(2), "b": jnp.array(jnp.nan)}))
    False
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def committed_sharding(leaf: Any) -> Any:
    """The sharding that a leaf was put to by its user; None where JAX may move it."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def replicated_like(sharding: Any) -> Any:
    """The sharding of what all devices hold alike, on the mesh of a sharding."""
    return jax.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.NamedSharding) else sharding


def replicated_over(params: PyTree) -> Any:
    """The sharding of what all devices hold alike, if params are laid out over several devices, else None."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    over_several = (each for each in shardings if isinstance(each, jax.NamedSharding) and each.mesh.size > 1)
    return next(map(replicated_like, over_several), None)


def placed(leaf: Any, sharding: Any) -> jax.Array:
    """An array where a sharding says, which may be over several processes, each of which has all of it."""
    if sharding.is_fully_addressable:
        here: jax.Array = jax.device_put(leaf, sharding)
        return here
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        data = placed(jax.random.key_data(leaf), sharding)
        key: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return key
    whole = np.asarray(leaf)  # `device_put` compares it among the processes, which takes seconds.
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index or ()])


def shortest(sharding: Any) -> Any:
    """The same sharding without what its spec ends with in vain: for P() and P(None) JAX would compile two programs."""
    if not isinstance(sharding, jax.NamedSharding) or not sharding.spec or sharding.spec[-1] is not None:
        return sharding
    spec = [*sharding.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return sharding.update(spec=jax.P(*spec))


def leading_lengths(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The length of each leaf's leading axis by path, as a shape; `()` for a scalar.

    >>> leading_lengths({"image": jnp.ones((4, 8, 8)), "step": 1})
    {'image': (4,), 'step': ()}
    """
    return {path: jnp.shape(leaf)[:1] for path, leaf in flatten(tree).items()}


def common_length(lengths: Iterable[tuple[int, ...]]) -> int | None:
    """The one length of all leading axes; None where they have none in common."""
    distinct = {*lengths}
    return next(iter(distinct))[0] if len(distinct) == 1 and distinct != {()} else None
