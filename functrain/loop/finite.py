"""NaN and infinity end a run, before they are saved as good."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from functrain.errors import NonFiniteError
from functrain.loop.run import Run
from functrain.tree.arrays import is_finite
from functrain.tree.text import listed


def check_logged(run: Run, row: Mapping[str, Any], last_sound: Callable[[], str]) -> None:
    """Raises for a loss that is not finite, unless such updates are left out.

    Raises:
      NonFiniteError: names the losses, the parts whose parameters are not finite either, and the last sound checkpoint.
    """
    losses = [name for name, value in row.items() if "loss" in name.split("/") and not np.isfinite(value)]
    if losses and not run.update.options.skips:
        bad = _parts(run)
        where = f", nor are the parameters of part {listed(bad)}" if bad else ""
        raise _error(run, f"{listed(losses)} is not finite{where}", last_sound())


def check_saved(run: Run, last_sound: Callable[[], str]) -> None:
    """Raises for a state that must not be saved.

    Raises:
      NonFiniteError: a parameter, or a gradient of a pending window, is not finite.
    """
    if bad := _parts(run):
        what = f"the parameters or the pending gradients of part {listed(bad)} are not finite"
        raise _error(run, what, last_sound())


def _parts(run: Run) -> list[str]:
    """The parts whose parameters or pending gradients are not finite."""
    split = run.update.optim.parts.split(run.state.params)
    leaves = {part: [*split[part].values()] for part in run.update.optim.trained}
    if run.state.window is not None and not run.update.options.skips:
        for part, sums in run.state.window.grads.items():
            leaves[part] += sums.values()
    finite = jax.device_get(_are_finite(leaves))
    return [part for part, is_good in finite.items() if not is_good]


@jax.jit
def _are_finite(leaves: dict[str, list[Any]]) -> dict[str, Any]:
    return {part: is_finite(each) for part, each in leaves.items()}


def _error(run: Run, what: str, last_sound: str) -> NonFiniteError:
    return NonFiniteError(
        f"step {run.step}: {what}; the last sound checkpoint is {last_sound}; restore it and lower the rate, or leave"
        ' such updates out: make_update(..., nonfinite="skip")'
    )
