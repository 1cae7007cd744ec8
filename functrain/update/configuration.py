"""What an update is made of, as text: kept in its states, for a checkpoint to be checked against."""

import json

from functrain.optim.clipping import clip_written
from functrain.optim.describe import made_by, makeup
from functrain.update.options import Options
from functrain.update.phases import Alternation


def written(schedule: Alternation, options: Options) -> str:
    """The parts, their optimizers, and the options that a run should go on with, as JSON."""
    optim, phases = options.optim, schedule.phases
    return json.dumps({
        "parts": {part: optim.parts.paths(part) for part in optim.parts.names},
        "optimizers": {part: made_by(tx) for part, tx in optim.transforms.items()},
        "makeup": {part: makeup(tx) for part, tx in optim.transforms.items()},
        "clip": clip_written(optim.clip_norm, optim.clip_by, optim.trained),
        "frozen_until": optim.frozen_until,
        "accumulate": options.accumulate,
        "ema": options.averages.decays if options.averages else {},
        "phases": [[phase.name, *phase.trained, phase.repeat, phase.same_batch] for phase in phases if phase.name],
    })  # fmt: skip
