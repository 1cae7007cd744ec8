"""`functrain verify`: every file of every checkpoint against its checksum."""

from argparse import Namespace

from functrain.cli.answer import Answer
from functrain.cli.place import checkpoints_of
from functrain.cli.soundness import looks
from functrain.tree.text import listed

_EXIT_CODES = {"sound": 0, "unreadable": 2, "unverified": 1, "damaged": 1}


def run(arguments: Namespace) -> Answer:
    """Looks at all checkpoints of a folder.

    Returns:
      An answer with exit code 0 where all are sound, 1 where one is damaged or has no checksums, and 2 where there is
      no damage but one can't be read.
    """
    folder = checkpoints_of(arguments.run)
    found, aside = [*looks(folder)], folder.corrupt()
    codes = {_EXIT_CODES[look.state] for look in found}
    lines = [
        "\n  ".join([f"{look.entry.path.name}: {look.state}", *look.problems])
        for look in found
        if look.state != "sound"
    ]
    sound = [look.entry.path.name for look in found if look.state == "sound"]
    if not found:
        lines.append("there is no checkpoint but what was set aside")
    elif len(sound) == len(found):
        lines.append(f"all sound: {', '.join(sound)}")
    elif sound:
        lines.append(f"sound: {', '.join(sound)}")
    if aside:
        lines.append(f"set aside as damaged before: {listed(aside)}")
    data = {
        "directory": folder.where,
        "sound": bool(found) and codes == {0},
        "checkpoints": [
            {"name": look.entry.path.name, "state": look.state, "problems": look.problems} for look in found
        ],
        "set_aside": aside,
    }
    return Answer("\n".join(lines), data, 1 if 1 in codes or not found else max(codes))
