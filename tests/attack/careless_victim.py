"""A loop that keeps one checkpoint in one file, writes over it, and starts anew where it can't read it."""

import pickle
import sys
from pathlib import Path

import faults
import victim


def complete(directory):
    """The step of the checkpoint, if it is whole."""
    try:
        return [pickle.loads((directory / "state").read_bytes())["step"]]
    except Exception:
        return []


def main(directory, waits):
    file = Path(directory) / "state"
    state = {"step": (complete(Path(directory)) or [0])[0]}
    victim.tell(began=state["step"])
    while state["step"] < victim.EPOCHS * victim.STEPS:
        state["step"] += victim.STEPS
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            pickle.dump(state, opened)
        if waits:
            victim.tell(saved=state["step"])
    victim.tell(ended=victim.digest(state["step"]), results={}, best=None)


if __name__ == "__main__":
    faults.meet(sys.argv[2])
    main(sys.argv[1], waits=len(sys.argv) > 3)
