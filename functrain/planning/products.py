"""What a program multiplies: the FLOPs of its matrix products and convolutions, by the part that they are about."""

import collections
import math
import re

from functrain.planning.flow import Flow
from functrain.planning.hlo import Graph, Operation


def flops_by_part(graph: Graph, flow: Flow) -> collections.Counter[str]:
    """The FLOPs of a call's products, by part; a multiplication and an addition are two, and what is 0 by padding none.

    >>> from functrain.planning.hlo import parsed
    >>> graph = Graph(parsed('''ENTRY main {
    ...   x = f32[4,2]{1,0} parameter(0)
    ...   w = f32[2,3]{1,0} parameter(1)
    ...   ROOT y = f32[4,3]{1,0} dot(x, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }'''))
    >>> flops_by_part(graph, Flow(graph, {"w": "body"}, [""]))
    Counter({'body': 48})
    """
    found: collections.Counter[str] = collections.Counter()
    for operation in graph.operations:
        if operation.opcode in ("dot", "convolution"):
            flops = _of_dot(operation) if operation.opcode == "dot" else _of_convolution(operation)
            found[flow.part(operation)] += operation.times * flops
    return found


def _of_dot(operation: Operation) -> int:
    (left, *_), (out, *_) = operation.given[0], operation.instruction.arrays
    contracted = _numbers(operation.instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2 * out.size * math.prod(left.shape[number] for number in contracted)


def _of_convolution(operation: Operation) -> int:
    (left, *_), (right, *_), (out, *_) = *operation.given, operation.instruction.arrays
    line = operation.instruction
    of_left, of_right, of_out = re.split("_|->", line.attribute(r"dim_labels=([\w>-]+)") or "bf_io->bf")
    window = line.attribute(r"window=\{([^}]*)\}") or ""
    positions = 1
    for number in range(len(left.shape) - 2):
        length, kernel, of_result = (
            of.shape[labels.index(str(number))] for of, labels in ((left, of_left), (right, of_right), (out, of_out))
        )
        said = (_of_window(window, name, number) for name in _WINDOW)
        positions *= _positions(length, kernel, of_result, *said)
    groups = int(line.attribute(r"batch_group_count=(\d+)") or 1)
    examples = left.shape[of_left.index("b")] // groups
    return 2 * positions * examples * right.shape[of_right.index("i")] * out.shape[of_out.index("f")]


_WINDOW = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


def _of_window(window: str, name: str, number: int) -> str:
    found = re.search(rf"\b{name}=([\dx_-]+)", window)
    return found[1].split("x")[number] if found else _WINDOW[name]


def _positions(length: int, kernel: int, out: int, stride: str, pad: str, dilated: str, spread: str) -> int:
    """How many pairs of a place of the kernel and one of the result meet a number of the input, in one dimension.

    >>> _positions(4, 3, 4, "1", "1_1", "1", "1")
    10
    """
    low, step, end = int(pad.partition("_")[0]), int(dilated), (length - 1) * int(dilated) + 1
    places = (nth * int(stride) + at * int(spread) - low for nth in range(out) for at in range(kernel))
    return sum(0 <= place < end and place % step == 0 for place in places)


def _numbers(text: str | None) -> list[int]:
    return [int(each) for each in (text or "").split(",") if each]
