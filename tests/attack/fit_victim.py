"""A run of `fit`, as its user writes it."""

import sys
from pathlib import Path

import faults
import optax
import victim

import functrain as ft
from functrain.loop.checkpoint import manifest


def complete(directory):
    """The steps of the checkpoints whose files are all there, as their manifests have them."""
    for path in Path(directory).glob("*.manifest.json"):
        checkpoint = path.with_name(path.name.removesuffix(".manifest.json"))
        if ".corrupt" not in path.name and manifest.damage(checkpoint) is None:
            yield int(checkpoint.name.partition("~")[0])


class Tells(ft.Hook):
    def __init__(self, checkpoints, waits):
        self.checkpoints, self.waits = checkpoints, waits

    def run_started(self, run):
        victim.tell(began=run.step)

    def checkpoint_saved(self, run):
        if self.waits:
            self.checkpoints.wait()
            victim.tell(saved=run.step)


def main(directory, waits):
    params = victim.start()
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    update = ft.make_update(victim.loss_fn, optim)
    data = ft.from_arrays({"x": victim.X, "y": victim.Y}, batch_size=4, seed=0)
    valid = ft.Evaluation(lambda params, batch: {"loss": victim.loss_fn(params, batch)}, [victim.VALID])
    checkpoints = ft.Checkpoints(directory, keep_last=1, keep_best="valid/loss")
    result = ft.fit(
        update, update.init(params), data, epochs=victim.EPOCHS, evaluation=valid, checkpoints=checkpoints,
        log=ft.Every(updates=1), hooks=[Tells(checkpoints, waits)], progress=False,
    )  # fmt: skip
    best = checkpoints.best()
    victim.tell(
        ended=victim.digest(result.state.params, result.state.opt_state),
        results={name: float(value) for name, value in result.results.items()},
        best=best and best.name.partition("~")[0],
    )


if __name__ == "__main__":
    faults.meet(sys.argv[2])
    main(sys.argv[1], waits=len(sys.argv) > 3)
