"""What the victims train: three leaves, in two batches an epoch; and how they tell what became of them."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

EPOCHS, STEPS = 3, 2  # Steps an epoch.
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 3)).astype(np.float32), RNG.normal(size=8).astype(np.float32)
VALID = {"x": X[:3], "y": -Y[:3]}  # The better the training, the worse: the best epoch is the first.


def start():
    return {"body": np.full((3, 4), 0.5, np.float32), "head": {"w": np.full(4, 0.1, np.float32), "b": np.float32(0)}}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"])
    return jnp.mean((hidden @ params["head"]["w"] + params["head"]["b"] - batch["y"]) ** 2)


def digest(*trees):
    leaves = jax.tree.leaves(trees)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def tell(**facts):
    """One line, which whoever started the process reads."""
    print(json.dumps(facts), flush=True)
