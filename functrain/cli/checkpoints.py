"""`functrain checkpoints`: what each checkpoint of a folder is."""

from argparse import Namespace
from typing import Any

from functrain.cli.answer import Answer
from functrain.cli.place import checkpoints_of
from functrain.cli.soundness import Look, looks
from functrain.errors import CheckpointError
from functrain.loop.checkpoint.folder import Name
from functrain.loop.checkpoint.held import REST, held_in, saved_at
from functrain.loop.record.words import moment, number
from functrain.tree.text import aligned, bytes_in_words, listed


def run(arguments: Namespace) -> Answer:
    """Lists the checkpoints of a folder, oldest first."""
    folder = checkpoints_of(arguments.run)
    rows, aside = [_row(look) for look in looks(folder)], folder.corrupt()
    data = {"directory": folder.where, "checkpoints": rows, "set_aside": aside}
    lines = [_table(rows)] if rows else ["there is no checkpoint but what was set aside"]
    lines += [f"{row['name']}: {problem}" for row in rows for problem in row["problems"]]
    lines += [f"set aside as damaged: {listed(aside)}"] if aside else []
    return Answer("\n".join(lines), data)


def _row(look: Look) -> dict[str, Any]:
    entry, problems, sizes, epoch = look.entry, [*look.problems], None, None
    if look.state in ("sound", "unverified"):
        try:
            held = held_in(entry.path)
            sizes, epoch = held.bytes_by_part, held.epoch
        except CheckpointError as error:
            problems.append(str(error))
    name = Name.of(entry.path.name)
    return {
        "name": entry.path.name,
        "step": None if name is None else name.step,
        "epoch": epoch,
        "time": saved_at(entry),
        "bytes": sizes,
        "results": entry.metrics,
        "state": look.state,
        "problems": problems,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    parts = list(dict.fromkeys(part for row in rows for part in row["bytes"] or {} if part != REST))
    parts += [REST] if any(row["bytes"] for row in rows) else []
    results = list(dict.fromkeys(name for row in rows for name in row["results"]))
    head = ["checkpoint", "epoch", "saved (UTC)", *parts, *results, ""]
    lines = [
        [
            row["name"],
            "-" if row["epoch"] is None else str(row["epoch"]),
            moment(row["time"]),
            *(bytes_in_words(row["bytes"][part]) if part in (row["bytes"] or {}) else "-" for part in parts),
            *(number(row["results"].get(name)) for name in results),
            row["state"],
        ]
        for row in rows
    ]
    return aligned([head, *lines], [str.ljust, str.rjust, str.ljust, *[str.rjust] * (len(head) - 4), str.ljust])
