"""What a checkpoint says of the state that is in it."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from functrain.loop.checkpoint.contents import Beside, Contents, versions
from functrain.loop.checkpoint.leaves import WINDOW, leaf_spec, window_containers
from functrain.loop.checkpoint.packs import packs_of
from functrain.update.state import TrainState


def contents_of(state: TrainState, named: Mapping[str, Any], beside: Beside) -> Contents:
    """Describes a state, with its leaves by name.

    Raises:
      CheckpointError: the metrics of a pending window have no names, or a leaf can't be stored.
    """
    specs = {name: leaf_spec(leaf) for name, leaf in named.items()}
    return Contents(
        leaves={name: spec for name, spec in specs.items() if not name.startswith(WINDOW)},
        window=window_containers(state.window),
        window_leaves={name: spec for name, spec in specs.items() if name.startswith(WINDOW)},
        packs=packs_of(named, specs),
        configuration=json.loads(state.configuration),
        beside=beside,
        versions=versions(),
        optimizer_leaves={part: len(jax.tree.leaves(state.opt_state[part])) for part in sorted(state.opt_state)},
    )
