"""`functrain diff`: how far two checkpoints are from each other, by part and leaf."""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from functrain.cli.answer import Answer
from functrain.cli.arrays import PARAMS, leaves_in
from functrain.loop.checkpoint.held import owners
from functrain.loop.record.words import number
from functrain.tree.text import aligned, leaves_in_words, listed

if TYPE_CHECKING:
    import numpy as np

_ALL = (PARAMS, "opt_state/", "model_state/", "ema/", "scale_state/")


def run(arguments: Namespace) -> Answer:
    """Compares two checkpoints.

    Returns:
      An answer with exit code 0 where all that is compared is the same to the bit, and 1 where it is not.
    """
    compared = _ALL if arguments.all else (PARAMS,)
    a, noted = leaves_in(arguments.a, lambda name: name.startswith(compared))
    b, noted_too = leaves_in(arguments.b, lambda name: name.startswith(compared))
    part_of = owners(b.contents) | owners(a.contents)
    both = sorted(a.named.keys() & b.named.keys(), key=lambda name: (not name.startswith(PARAMS), name))
    leaves = {name: _compared(a.named[name], b.named[name]) | {"part": part_of[name]} for name in both}
    only = {"a": sorted(a.named.keys() - b.named.keys()), "b": sorted(b.named.keys() - a.named.keys())}
    is_equal = all(leaf["equal"] for leaf in leaves.values()) and not only["a"] and not only["b"]
    data = {
        "a": a.shown,
        "b": b.shown,
        "equal": is_equal,
        "parts": _by_part(leaves),
        "leaves": leaves,
        "only_in_a": only["a"],
        "only_in_b": only["b"],
    }
    return Answer(_text(data), data, 0 if is_equal else 1, (*noted, *noted_too))


def _compared(a: "np.ndarray", b: "np.ndarray") -> dict[str, Any]:
    """The norms of a leaf and of its difference; None where the two have different shapes."""
    import numpy as np

    forms = [f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for leaf in (a, b)]
    is_equal = forms[0] == forms[1] and a.tobytes() == b.tobytes()
    found: dict[str, Any] = {"equal": is_equal, "a": forms[0], "b": forms[1], "norm": None, "difference": None}
    if a.shape == b.shape:
        wide = np.complex128 if "complex" in f"{a.dtype}{b.dtype}" else np.float64
        one, other = a.astype(wide), b.astype(wide)
        with np.errstate(all="ignore"):
            difference = 0.0 if is_equal else float(np.linalg.norm((other - one).ravel()))
            found |= {"norm": float(np.linalg.norm(one.ravel())), "difference": difference}
    return found | {"relative": _relative(found["difference"], found["norm"])}


def _by_part(leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether each part is the same, and the norms of its parameters; moments and counts would mean nothing in one."""
    parts = {}
    for part in dict.fromkeys(leaf["part"] for leaf in leaves.values()):
        of_part = {name: leaf for name, leaf in leaves.items() if leaf["part"] == part}
        params = [leaf for name, leaf in of_part.items() if name.startswith(PARAMS) and leaf["norm"] is not None]
        norm, difference = (
            math.hypot(*(leaf[key] for leaf in params)) if params else None for key in ("norm", "difference")
        )
        parts[part] = {
            "equal": all(leaf["equal"] for leaf in of_part.values()),
            "norm": norm,
            "difference": difference,
            "relative": _relative(difference, norm),
        }
    return parts


def _relative(difference: float | None, norm: float | None) -> float | None:
    if difference is None or not norm:
        return 0.0 if difference == 0 else None
    return difference / norm


def _text(data: Mapping[str, Any]) -> str:
    rows = [("part", "leaf", "|B - A|", "|B - A| / |A|", "")]
    for part, total in data["parts"].items():
        rows.append((part, "", *_cells(total), ""))
        of_part = {name: leaf for name, leaf in data["leaves"].items() if leaf["part"] == part and not leaf["equal"]}
        for name, leaf in of_part.items():
            forms = "" if leaf["a"] == leaf["b"] else f"{leaf['a']}, now {leaf['b']}"
            rows.append(("", name.removeprefix(PARAMS), *_cells(leaf), forms))
    equal = sum(leaf["equal"] for leaf in data["leaves"].values())
    lines = [f"A {data['a']}", f"B {data['b']}"]
    lines += [aligned(rows, [str.ljust, str.ljust, str.rjust, str.rjust, str.ljust])] if data["leaves"] else []
    lines.append(f"equal to the bit: {equal} of {leaves_in_words(len(data['leaves']))}")
    lines += [f"only in {each.upper()}: {listed(data[f'only_in_{each}'])}" for each in "ab" if data[f"only_in_{each}"]]
    return "\n".join(lines)


def _cells(found: Mapping[str, Any]) -> tuple[str, str]:
    if found["equal"]:
        return "equal", ""
    return number(found["difference"]), number(found["relative"])
