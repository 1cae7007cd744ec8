"""Whose parameters each value of a program is about, by data flow: from which leaves it comes, and to which it goes."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from functrain.planning.hlo import Graph, Operation

REST = ""
"""What is of no part, or of several: activations, losses, norms."""

# What makes of many numbers one, or of one many: of what goes through these, nothing is an element of a gradient.
_MIXES = {
    "cholesky", "convolution", "dot", "fft", "gather", "map", "reduce-window", "scatter", "select-and-scatter", "sort",
    "triangular-solve",
}  # fmt: skip

Labels = dict[int, str]
"""The part of each wire; a wire that is not in it is of none, such as a constant's."""


class Flow:
    """What comes from where in a graph, and goes where.

    Args:
      graph: of a program.
      arguments: `{name: part}` of its arguments; one that is not named is of no part, like a constant.
      outputs: the part of each of its outputs.
    """

    def __init__(self, graph: Graph, arguments: Mapping[str, str], outputs: Sequence[str]):
        known = [(wire, arguments[name]) for name, wires in graph.parameters.items() if name in arguments
                 for wire in wires]  # fmt: skip
        returned = [*zip(graph.outputs, outputs, strict=True)]
        self._comes = _spread(known, [*graph.same, *_forth(graph.operations)])
        back = [(after, before) for before, after in graph.same]
        self._goes = _spread(returned, [*back, *_back(graph.operations, _passes)])
        self._leads = _spread(returned, [*back, *_back(graph.operations, lambda _: True)])

    def part(self, operation: Operation) -> str:
        """The part that an operation is about: whose leaves it is given, or whose its result is an element of.

        The product of a value and a weight is of the weight's part, and so is that of two values that is a gradient of
        the part's leaves. What is computed outside of a gradient, as in an optimizer, is of the part that it leads to.
        """
        given = sorted(zip(operation.given, operation.inputs, strict=True), key=lambda each: -_nbytes(each[0]))
        for _, wires in given:
            if part := self._of(self._comes, wires):
                return part
        found = self._of(self._goes, operation.outputs)
        return found if found or "jvp(" in operation.scope else self._of(self._leads, operation.outputs)

    @staticmethod
    def _of(labels: Labels, wires: Iterable[int]) -> str:
        found = {labels[wire] for wire in wires if wire in labels}
        return found.pop() if len(found) == 1 else REST


def followed(graph: Graph, wires: Iterable[int]) -> set[int]:
    """All wires whose values are computed of these."""
    return {*_spread([(wire, REST) for wire in wires], [*graph.same, *_forth(graph.operations)])}


def _nbytes(arrays: Iterable[Any]) -> int:
    return sum(array.nbytes for array in arrays)


def _passes(operation: Operation) -> bool:
    """Whether each number of a result follows from one of each operand, or is one of them."""
    if operation.opcode == "custom-call":
        return "harding" in (operation.instruction.attribute(r'custom_call_target="([^"]*)"') or "")
    if operation.opcode == "reduce":  # Of dimensions of 1 it is a reshape.
        return operation.given[0][0].size == operation.instruction.arrays[0].size
    return operation.opcode not in _MIXES


def _forth(operations: Iterable[Operation]) -> Iterable[tuple[int, int]]:
    for operation in operations:
        yield from ((before, after) for each in operation.inputs for before in each for after in operation.outputs)


def _back(operations: Iterable[Operation], passes: Callable[[Operation], bool]) -> Iterable[tuple[int, int]]:
    for operation in operations:
        if passes(operation):
            yield from ((after, before) for each in operation.inputs for before in each for after in operation.outputs)


def _spread(start: Iterable[tuple[int, str]], edges: Iterable[tuple[int, int]]) -> Labels:
    """The labels of all wires that edges lead to: of one where all that leads there agrees, else `REST`."""
    to, labels, waiting = defaultdict(list), Labels(), [*start]
    for begin, end in edges:
        to[begin].append(end)
    while waiting:
        wire, label = waiting.pop()
        before = labels.get(wire)
        after = label if before in (None, label) else REST
        if after != before:
            labels[wire] = after
            waiting += [(end, after) for end in to[wire]]
    return labels
