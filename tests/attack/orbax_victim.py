"""The same training in a loop written by hand, with Orbax's CheckpointManager as its documentation uses it."""

import sys
from pathlib import Path

import faults
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import victim


def complete(directory):
    """The steps of the checkpoints that have got their names."""
    return [int(path.name) for path in Path(directory).iterdir() if path.name.isdigit()]


def batches(epoch):
    order = np.random.default_rng(epoch).permutation(len(victim.X))
    return [{"x": victim.X[rows], "y": victim.Y[rows]} for rows in np.split(order, victim.STEPS)]


def main(directory, waits):
    optimizer = optax.adam(0.1)

    @jax.jit
    def update(state, batch):
        grads = jax.grad(victim.loss_fn)(state["params"], batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    params = jax.device_put(victim.start())
    state = {"params": params, "opt_state": optimizer.init(params)}
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        step = manager.latest_step() or 0
        if step:
            state = manager.restore(step, args=ocp.args.StandardRestore(state))
        victim.tell(began=step)
        for epoch in range(step // victim.STEPS, victim.EPOCHS):
            for batch in batches(epoch):
                state = update(state, batch)
                step += 1
            manager.save(step, args=ocp.args.StandardSave(state))
            if waits:
                manager.wait_until_finished()
                victim.tell(saved=step)
        manager.wait_until_finished()
    victim.tell(ended=victim.digest(state), results={}, best=None)


if __name__ == "__main__":
    faults.meet(sys.argv[2])
    main(sys.argv[1], waits=len(sys.argv) > 3)
