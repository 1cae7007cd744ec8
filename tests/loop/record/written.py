"""The files of a record, as a run writes them, for tests to read and to harm."""

import copy
import json

PART = {
    "optimizer": "adam(b1=0.8)", "hyperparameters": {"learning_rate": 0.001}, "selector": "body", "leaves": 4,
    "parameters": 1234, "bytes": 4936, "trained": True,
}  # fmt: skip
SECTION = {
    "started": 1763770000.5, "ended": 1763770100.5, "from_step": 0, "from_epoch": 0, "checkpoint": None, "to_step": 8,
    "to_epoch": 2, "seconds": 12.25, "how": "stopped", "why": "SIGTERM", "changed": {},
    "warnings": [{"text": "the batch is small", "count": 2}], "memory": {"device": None, "host": 3 << 20},
}  # fmt: skip
RUN = {
    "format": 1,
    "name": "digits",
    "config": {"width": 64, "rates": {"body": 0.001}},
    "command": ["train.py", "--epochs", "10"],
    "versions": {"python": "3.11.9", "functrain": "0.2.0"},
    "device": {"platform": "cpu", "kind": "cpu", "devices": 1, "processes": 1, "system": "Linux x86_64", "cores": 2},
    "git": {"commit": "8" * 40, "dirty": True},
    "source": {"file": "source.tar.gz", "files": 12, "left_out": {"data.bin": "12 MB"}, "masked": ["a.py"]},
    "model": {
        "parts": {"body": PART, "head": PART | {"selector": "...", "parameters": 66, "trained": False}},
        "parameters": {"total": 1300, "trained": 1234},
        "optimizers": "part  optimizer",
        "audit": "part  loss",
    },
    "checkpoints": {"directory": "checkpoints", "keep_best": {"valid/accuracy": "max"}},
    "sections": [
        SECTION,
        SECTION
        | {"started": 1763770200.5, "from_step": 8, "from_epoch": 2, "checkpoint": "8", "to_step": 16, "to_epoch": 4}
        | {"how": "finished", "why": None, "changed": {"config/rates/body": [0.01, 0.001], "config/new": [None, 1]}},
    ],
}
RESULTS = {
    "format": 1,
    "final": [
        {"evaluation": "test", "of": "best valid/accuracy", "step": 12, "checkpoint": "12",
         "arrays": None, "outputs": None, "numbers": {"test/accuracy": 0.975, "test/loss": "NaN"}, "figures": {}},
        {"evaluation": "test", "of": "last", "step": 16, "checkpoint": "16", "arrays": None, "outputs": None,
         "numbers": {"test/accuracy": 0.9625, "test/loss": 0.125}, "figures": {"test/confusion": "results/last.png"}},
    ],
}  # fmt: skip


def rows(steps=16, epoch=4):
    """The rows of a log."""
    for step in range(1, steps + 1):
        about = {"step": step, "time": 1763770000.5 + step, "epoch": (step - 1) // epoch}
        parts = {f"train/parts/{part}/grad_norm": 1 / step for part in ("body", "head")}
        yield about | {"train/loss": 2 / step, "train/steps_per_second": 10.0, "train/learning_rate/body": 0.1} | parts
        if step % epoch == 0:
            yield about | {"epoch": step // epoch, "valid/loss": 3 / step, "valid/accuracy": 1 - 1 / step}


def write(directory, run=RUN, results=RESULTS, log=None):
    """Writes a record, and returns its folder; without what is None."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, said in (("run.json", run), ("results.json", results)):
        if said is not None:
            (directory / name).write_text(json.dumps(said))
    lines = [json.dumps(row) for row in (rows() if log is None else log)]
    (directory / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return directory


def with_a(section, **changes):
    """A run.json in which a section of it, the last by default, says something else."""
    run = copy.deepcopy(RUN)
    run["sections"][section] |= changes
    return run
