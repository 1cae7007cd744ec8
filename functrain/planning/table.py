"""A plan as tables."""

from collections.abc import Callable, Sequence
from typing import Any

from functrain.planning.flow import REST
from functrain.planning.memory import WHATS
from functrain.tree.text import aligned, bytes_in_words, listed

OF_NO_PART = "activations"
_OF_PARTS = WHATS[:-1]


def table(plan: Any) -> str:
    """A `Plan` as tables: bytes by part, FLOPs by part, collectives; and whether it fits."""
    devices = f"{plan.devices:,} device{'s' * (plan.devices > 1)}"
    batches = f"{plan.batches:,} batch{'es' * (plan.batches > 1)}"
    head = f"{plan.parameters:,} parameters on {devices}; a step takes {batches}"
    tables = [_memory(plan), _flops(plan), *([_collectives(plan)] if plan.collectives else [])]
    return "\n\n".join([head, *tables, "\n".join(_lines(plan))])


def _memory(plan: Any) -> str:
    whats = [what for what in _OF_PARTS if plan.bytes(what)]
    rows = [["bytes a device", *whats, "total"]]
    for part in plan.flops:
        if part != REST:
            cells = [_or_dash(plan.bytes(what, part)) for what in whats]
            rows.append([part, *cells, bytes_in_words(plan.bytes(part=part))])
    blank = [""] * len(whats)
    if of_model := plan.bytes("model state"):
        rows.append(["model state", *blank, bytes_in_words(of_model)])
    rows.append([OF_NO_PART, *blank, bytes_in_words(plan.activations)])
    rows.append(["total", *(bytes_in_words(plan.bytes(what)) for what in whats), bytes_in_words(plan.peak)])
    return _table(rows)


def _flops(plan: Any) -> str:
    rows = [["FLOPs a step", "whole", "a device"]]
    for part, count in plan.flops.items():
        if count or plan.flops_here[part]:
            rows.append([part or OF_NO_PART, flops_in_words(count), flops_in_words(plan.flops_here[part])])
    sums = (sum(plan.flops.values()), sum(plan.flops_here.values()))
    return _table([*rows, ["total", *map(flops_in_words, sums)]])


def _collectives(plan: Any) -> str:
    rows = [["collectives a step", "of", "devices", "count", "bytes a device"]]
    for each in plan.collectives:
        cells = (f"{each.devices:,}", f"{each.times:,}", bytes_in_words(each.nbytes))
        rows.append([each.kind, each.part or OF_NO_PART, *cells])
    total = bytes_in_words(sum(each.nbytes for each in plan.collectives))
    rows.append(["total", "", "", f"{sum(each.times for each in plan.collectives):,}", total])
    return _table(rows, names=2)


def _lines(plan: Any) -> list[str]:
    kinds = dict.fromkeys(each.memory for each in plan.held if each.memory != "device")
    lines = [f"in {kind}: {bytes_in_words(plan.bytes(memory=kind))} a device" for kind in kinds]
    if plan.temporaries is not None:
        lines.append(f"temporaries of the compiled programs: {bytes_in_words(plan.temporaries)}, on this platform")
    if plan.unknown:
        lines.append(f"counted once, as their length is not known: the loops {listed(plan.unknown)}")
    if plan.budget is not None:
        needs, has = bytes_in_words(plan.peak), bytes_in_words(plan.budget)
        if plan.fits:
            lines.append(f"fits: {needs} of {has} a device")
        else:
            largest = max(plan.held, key=lambda each: each.nbytes)
            what = f"the {largest.what} of {largest.part!r}, {bytes_in_words(largest.nbytes)}"
            if plan.activations > largest.nbytes:
                what = f"activations, {bytes_in_words(plan.activations)}"
            lines.append(f"does not fit: {needs} a device, which has {has}; the largest: {what}")
            lines += [f"- {each.text}" for each in plan.advice[:5]]
    return lines


def _table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    aligns: Sequence[Callable[[str, int], str]] = [str.ljust] * names + [str.rjust] * (len(rows[0]) - names)
    return aligned(rows, aligns)


def _or_dash(nbytes: int) -> str:
    return bytes_in_words(nbytes) if nbytes else "-"


def flops_in_words(count: float) -> str:
    """A number of FLOPs for a reader.

    >>> flops_in_words(999), flops_in_words(1.5e12)
    ('999', '1.50 T')
    """
    for unit in ("", "K", "M", "G", "T", "P"):
        if count < 1000 or unit == "P":
            break
        count /= 1000
    return f"{count:.2f} {unit}" if unit else f"{count:.0f}"
