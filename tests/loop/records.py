"""Small runs with a record, and what they leave."""

import json
import subprocess
import tarfile

import numpy as np
from runs import data_of, start, update_of

import functrain as ft


def eval_step(params, batch):
    error = np.tanh(0) + (batch["x"] @ params["body"]["w"]).sum(1) - batch["y"]
    return {"loss": error**2, "error": error, "sign": error > 0, "is_up": batch["y"] > 0}


def evaluation(name="test", **options):
    return ft.Evaluation(eval_step, data_of(shuffle=False), name=name, **options)


def record_of(folder, **options):
    return ft.Record(folder, **{"report": False, **options})


def fitted(folder, record=None, epochs=2, **options):
    update = options.pop("update", None) or update_of()
    record = record_of(folder) if record is None else record
    return ft.fit(update, update.init(start()), data_of(), epochs=epochs, record=record, progress=False, **options)


def saved(folder, **options):
    return ft.Checkpoints(folder / "checkpoints", **options)


def read(folder, name="run.json"):
    return json.loads((folder / name).read_text())


def rows(folder):
    return [(row["step"], row["epoch"]) for row in ft.read_json_lines(folder / "log.jsonl")]


def committed(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    who = ["-c", "user.name=ada", "-c", "user.email=ada@lovelace.example", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A", "-f"], [*who, "commit", "-qm", "begin"]):
        subprocess.run(["git", "-C", folder, *words], check=True)


def unpacked(path):
    with tarfile.open(path) as archive:
        return {each.name: archive.extractfile(each).read().decode() for each in archive}
