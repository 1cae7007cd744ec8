"""The models that the benchmarks train: parameters, a loss, a batch, and the rules of their parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Model(NamedTuple):
    """What a benchmark needs to train a model."""

    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: Any
    rules: dict[str, Any]


def mlp(width: int = 256) -> Model:
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (64, width, width, 10)
    params = {
        f"linear{i}": {"kernel": jax.random.normal(key, (n, m)) * n**-0.5, "bias": jnp.zeros(m)}
        for i, (key, n, m) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }

    def loss(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        for i in range(3):
            x = x @ params[f"linear{i}"]["kernel"] + params[f"linear{i}"]["bias"]
            x = jax.nn.relu(x) if i < 2 else x
        return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()

    batch = (jax.random.normal(keys[0], (64, 64)), jax.random.randint(keys[1], (64,), 0, 10))
    return Model(params, loss, batch, {"head": "linear2", "body": ...})


def transformer(width: int, layers: int, *, tokens: int, batch_size: int, vocabulary: int) -> Model:
    """A decoder of 12 leaves a layer and 6 others: with 10 layers 126."""

    def normal(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(i), shape) * shape[0] ** -0.5

    def linear(i: int, n: int, m: int) -> dict[str, jax.Array]:
        return {"kernel": normal(i, n, m), "bias": jnp.zeros(m)}

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    params = {
        "embed": normal(0, vocabulary, width),
        "positions": normal(1, tokens, width),
        "layers": {
            f"{i:02}": {
                "norm1": norm(),
                "qkv": linear(4 * i + 2, width, 3 * width),
                "out": linear(4 * i + 3, width, width),
                "norm2": norm(),
                "up": linear(4 * i + 4, width, 4 * width),
                "down": linear(4 * i + 5, 4 * width, width),
            }
            for i in range(layers)
        },
        "norm": norm(),
        "head": linear(2, width, vocabulary),
    }

    def apply(linear: Any, x: jax.Array) -> jax.Array:
        return x @ linear["kernel"] + linear["bias"]

    def normalised(norm: Any, x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]

    def loss(params: Any, batch: Any) -> jax.Array:
        x = params["embed"][batch] + params["positions"]
        mask = jnp.tril(jnp.ones((tokens, tokens), bool))
        for i in range(layers):
            layer = params["layers"][f"{i:02}"]
            q, k, v = jnp.split(apply(layer["qkv"], normalised(layer["norm1"], x)), 3, -1)
            weights = jax.nn.softmax(jnp.where(mask, q @ k.swapaxes(1, 2) * width**-0.5, -1e9))
            x = x + apply(layer["out"], weights @ v)
            x = x + apply(layer["down"], jax.nn.gelu(apply(layer["up"], normalised(layer["norm2"], x))))
        logits = apply(params["head"], normalised(params["norm"], x))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    batch = jax.random.randint(jax.random.key(3), (batch_size, tokens), 0, vocabulary)
    rules = {"embeddings": ["embed", "positions", "head"], "matrices": "**/kernel", "vectors": ...}
    return Model(params, loss, batch, rules)


def trivial() -> Model:
    """300 leaves in 5 parts, hardly any arithmetic: what is left is the cost of a call."""
    params = {f"stack{i}": {f"w{j:02}": jnp.ones(4) for j in range(60)} for i in range(5)}

    def loss(params: Any, batch: Any) -> jax.Array:
        return sum(jnp.sum((leaf - batch) ** 2) for leaf in jax.tree.leaves(params))

    return Model(params, loss, jnp.float32(2.0), {f"part{i}": f"stack{i}" for i in range(5)})


def vectors(count: int, length: int) -> Model:
    """Hardly any arithmetic, and one product of rows, which can be cut over devices."""
    params = {f"w{i:03}": jnp.ones(length) for i in range(count)}

    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((batch @ sum(params.values())) ** 2)

    return Model(params, loss, jnp.ones((length, length)), {"all": ...})


MODELS: dict[str, Callable[[], Model]] = {
    "MLP": mlp,
    "transformer, 126 tiny leaves": lambda: transformer(8, 10, tokens=8, batch_size=4, vocabulary=32),
    "transformer, 64 wide": lambda: transformer(64, 10, tokens=32, batch_size=8, vocabulary=128),
    "transformer, 12M": lambda: transformer(384, 6, tokens=16, batch_size=4, vocabulary=1500),
    "300 leaves, trivial": trivial,
}
