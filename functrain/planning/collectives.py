"""What the devices send each other in a program that was partitioned: collectives, by kind and part."""

import collections
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from functrain.planning.flow import Flow, followed
from functrain.planning.hlo import Graph, Operation

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_MOVES = {"bitcast", "convert", "copy", "reshape", "transpose"}


class Collective(NamedTuple):
    """The collectives of a step that are alike.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      part: whose parameters, gradients or updates are sent; "" for what is of no part: activations, losses, norms.
      devices: how many take part in one together.
      times: how many there are.
      nbytes: of each device together: of every one the larger of what it gives and what it gets.
    """

    kind: str
    part: str
    devices: int
    times: int
    nbytes: int


def collectives(graph: Graph, flow: Flow, devices: int) -> list[Collective]:
    """The collectives of a call, those that are alike as one, the most bytes first.

    >>> from functrain.planning.hlo import parsed
    >>> graph = Graph(parsed('''ENTRY main {
    ...   x = f32[4]{0} parameter(0)
    ...   ROOT y = f32[8]{0} all-gather(x), replica_groups={{0,1},{2,3}}, dimensions={0}
    ... }'''))
    >>> collectives(graph, Flow(graph, {"x": "body"}, ["body"]), 4)
    [Collective(kind='all-gather', part='body', devices=2, times=1, nbytes=32)]

    Args:
      graph: of the partitioned program: its shapes are those of one device.
      flow: of it.
      devices: how many run it.
    """
    uses = _Uses(graph)
    found = [each for operation in graph.operations if operation.opcode in KINDS
             if (each := _collective(operation, uses, flow, devices)).devices > 1]  # fmt: skip
    return merged(found)


def merged(found: Iterable[Collective], times: int = 1) -> list[Collective]:
    """Those that are alike as one, all of them so many times."""
    counts: collections.Counter[tuple[str, str, int]] = collections.Counter()
    nbytes: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for each in found:
        counts[each[:3]] += each.times * times
        nbytes[each[:3]] += each.nbytes * times
    return sorted((Collective(*key, counts[key], nbytes[key]) for key in counts), key=lambda each: -each.nbytes)


def _collective(operation: Operation, uses: "_Uses", flow: Flow, devices: int) -> Collective:
    gives = sum(array.nbytes for each in operation.given for array in each)
    gets = sum(array.nbytes for array in operation.instruction.arrays)
    group, kind = _group(operation.instruction.attributes, devices), operation.opcode
    if kind == "all-reduce" and uses.are_slices(operation, group):
        kind = "reduce-scatter"
    return Collective(kind, flow.part(operation), group, operation.times, operation.times * max(gives, gets))


def _group(attributes: str, devices: int) -> int:
    """How many devices take part in a collective together.

    >>> groups = ("{{0,1},{2,3}}", "[2,4]<=[8]", "mesh['a'=2,'b'=4] {'b'}", "{}")
    >>> [_group(f"replica_groups={each}", 8) for each in groups]
    [2, 4, 4, 8]
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "source_target_pairs={}" in attributes:
        return 1
    return devices


class _Uses:
    """What becomes of the values of a graph."""

    def __init__(self, graph: Graph):
        self._of: dict[int, list[Operation]] = collections.defaultdict(list)
        for operation in graph.operations:
            for wire in {wire for each in operation.inputs for wire in each}:
                self._of[wire].append(operation)
        self._elsewhere = {begin for begin, _ in graph.same} | {*graph.outputs}
        numbers = [op.outputs[0] for op in graph.operations if op.opcode in ("partition-id", "replica-id")]
        self._of_device = followed(graph, numbers)

    def are_slices(self, operation: Operation, group: int) -> bool:
        """Whether each device keeps of a sum only its own slice: what XLA's CPU backend has no operation for."""
        slices = [each for wire in operation.outputs for each in self._slices(wire)]
        size = operation.instruction.arrays[0].size
        return bool(slices) and all(
            each is not None and each.instruction.arrays[0].size * group == size for each in slices
        )

    def _slices(self, wire: int) -> list[Operation | None]:
        """The operations that cut a device's slice out of a value, and None for each other use of it."""
        found: list[Operation | None] = [None] if wire in self._elsewhere else []
        for user in self._of[wire]:
            if user.opcode in _MOVES:
                found += self._slices(user.outputs[0])
            else:
                begins = [each[0] for each in user.inputs[1:]]
                is_own = user.opcode == "dynamic-slice" and not self._of_device.isdisjoint(begins)
                found.append(user if is_own else None)
        return found
