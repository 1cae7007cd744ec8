"""What would help where a run does not fit: which rule of a layout saves how much on each device."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from functrain.errors import PlanError
from functrain.mesh.specs import axes_in, cut_further
from functrain.planning.memory import Kept
from functrain.tree.text import bytes_in_words

_BESIDE = ("gradients", "optimizer state", "window", "ema")
_UNITS = {"": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))},
          **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}}  # fmt: skip


class Advice(NamedTuple):
    """Something that would help.

    Attributes:
      text: what is so now, and what to write.
      saves: bytes on each device.
    """

    text: str
    saves: int


def bytes_of(budget: str | int) -> int:
    """A number of bytes that was written in words.

    >>> bytes_of("80 GB"), bytes_of("1.5GiB"), bytes_of(1000)
    (80000000000, 1610612736, 1000)

    Raises:
      PlanError: it is none.
    """
    written = re.fullmatch(r"\s*([\d_.]*\d)\s*([kKMGT]?i?B|)\s*", str(budget))
    unit = written and written[2].replace("k", "K")
    if written is None or unit not in _UNITS or float(written[1]) <= 0:
        raise PlanError(f'budget={budget!r}: write what a device has, budget="80 GB", or a number of bytes')
    return int(float(written[1]) * _UNITS[unit])


def advice(found: Sequence[Kept], activations: int) -> list[Advice]:
    """What would help, the most first.

    Args:
      found: all that is kept.
      activations: the bytes of residuals.
    """
    on_device = [each for each in found if each.memory == "device"]
    axes = {axis: size for each in on_device for axis, size in _axes(each).items() if size > 1}
    given = [one for axis in axes for one in (*_cut_parameters(on_device, axis), *_cut_beside(on_device, axis))]
    states: dict[str, int] = {}
    for each in on_device:
        if each.what == "optimizer state":
            states[each.part] = states.get(each.part, 0) + each.nbytes
    for part, nbytes in states.items():
        text = f"memory={{{part!r}: 'pinned_host'}} saves {bytes_in_words(nbytes)} between two steps"
        given.append(Advice(f"{text}: its optimizer state lies on the host", nbytes))
    saves = activations // 2
    text = f"microbatches=2, or jax.checkpoint in the model, saves about {bytes_in_words(saves)} of activations"
    given.append(Advice(text, saves))
    return sorted((each for each in given if each.saves > 0), key=lambda each: -each.saves)


def _cut_parameters(found: Sequence[Kept], axis: str) -> list[Advice]:
    """What cutting parts over an axis saves, with all that follows their parameters."""
    given = []
    for part in dict.fromkeys(each.part for each in found if each.what == "parameters"):
        mine = [each for each in found if each.part == part and each.what in ("parameters", *_BESIDE)]
        saves = sum(_saved(each, axis) for each in mine)
        leaves = [each for each in mine if each.what == "parameters" and _saved(each, axis)]
        if leaves:
            largest = max(leaves, key=lambda each: each.nbytes)
            which = f"{largest.path!r} is" if len(leaves) == 1 else f"{largest.path!r} and {len(leaves) - 1} more are"
            text = f"ft.largest({axis!r}) for {part!r} saves {bytes_in_words(saves)}: {which} alike over that axis"
            given.append(Advice(text, saves))
    return given


def _cut_beside(found: Sequence[Kept], axis: str) -> list[Advice]:
    """What `zero` saves."""
    by_what = {what: sum(_saved(each, axis) for each in found if each.what == what) for what in _BESIDE}
    parts = {part: sum(_saved(each, axis) for each in found if each.part == part and each.what in _BESIDE)
             for part in dict.fromkeys(each.part for each in found)}  # fmt: skip
    saves = sum(by_what.values())
    if not saves:
        return []
    whats = [what for what in by_what if by_what[what]]
    words = ", ".join(whats[:-1]) + f" and {whats[-1]}" if len(whats) > 1 else whats[0]
    most = max(parts, key=lambda part: parts[part])
    text = f"zero={axis!r} saves {bytes_in_words(saves)}: {words}, most of them of {most!r}, are alike over that axis"
    return [Advice(text, saves)]


def _saved(each: Kept, axis: str) -> int:
    """What cutting it over one more axis saves on each device; 0 where it is cut over it, or can't be."""
    size = _axes(each).get(axis, 1)
    spec = each.leaf.sharding.spec if size > 1 else jax.P()
    if size == 1 or axis in axes_in(spec) or cut_further(spec, each.leaf.shape, (axis,), each.mesh) is None:
        return 0
    return each.nbytes - each.nbytes // size


def _axes(each: Kept) -> Mapping[str, int]:
    return {} if each.mesh is None else dict(each.mesh.shape)
