"""A program in XLA's own words, HLO text, as operations and what flows between them.

Loops, calls and branches are unrolled into one graph: each place that calls a computation has operations of its own,
with the number of times that they run. A value is a wire, a number; a tuple is several.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Array(NamedTuple):
    """The type of an array: its dtype in HLO's words, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes.

        >>> Array("bf16", (2, 3)).nbytes, Array("pred", (5,)).nbytes, Array("c64", ()).nbytes
        (12, 5, 8)
        """
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.size * int(bits.group()) / 8) if bits else self.size * (self.dtype == "pred")


class Instruction(NamedTuple):
    """A line of HLO.

    Attributes:
      name: of its result.
      arrays: of its result, those of a tuple in order, tuples within it included.
      counts: for a tuple, how many arrays each of its elements is; None for an array.
      opcode: what it does.
      operands: the names of its operands.
      inside: what stood in the place of the operands: of a constant or a parameter, its value or number.
      attributes: the rest of the line.
      is_root: whether it is what its computation returns.
    """

    name: str
    arrays: tuple[Array, ...]
    counts: tuple[int, ...] | None
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern, found in its attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """What JAX calls it; empty where that is not known."""
        return (self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "").replace("\\'", "'").replace('\\"', '"')


class Module(NamedTuple):
    """The computations of a program, and the name of the one that it begins with."""

    computations: dict[str, list[Instruction]]
    entry: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=? ]*)\](?:\{[^}]*\})?")


def parsed(text: str) -> Module:
    """The computations of an HLO text.

    >>> module = parsed('''HloModule m
    ...
    ... ENTRY main {
    ...   x = f32[2,3]{1,0} parameter(0), metadata={op_name="batch"}
    ...   ROOT y = (f32[2,3]{1,0}, f32[]) tuple(x, x)
    ... }''')
    >>> x, y = module.computations[module.entry]
    >>> x.opcode, x.inside, x.op_name, x.arrays
    ('parameter', '0', 'batch', (Array(dtype='f32', shape=(2, 3)),))
    >>> y.operands, y.counts, y.is_root
    (('x', 'x'), (1, 1), True)
    """
    computations: dict[str, list[Instruction]] = {}
    entry, mine = "", []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line_of_one := _LINE.match(line):
            mine.append(_instruction(bool(line_of_one[1]), line_of_one[2], line_of_one[3]))
        elif begin := _COMPUTATION.match(line):
            mine = computations.setdefault(begin[2], [])
            entry = begin[2] if begin[1] else entry
    return Module(computations, entry)


def _instruction(is_root: bool, name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, call = rest[:end], rest[end:].lstrip()
    begin = call.index("(")
    end = _closing(call, begin)
    opcode, inside = call[:begin], call[begin + 1 : end]
    arrays, counts = _type(kind)
    operands = tuple(re.findall(r"%?([\w.\-]+)(?=,|$)", inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(name, arrays, counts, opcode, operands, inside, call[end + 1 :], is_root)


def _type(kind: str) -> tuple[tuple[Array, ...], tuple[int, ...] | None]:
    arrays = tuple(
        Array(dtype, tuple(int(each.strip("<= ?")) for each in shape.split(",") if each.strip()))
        for dtype, shape in _ARRAY.findall(kind)
    )
    if not kind.startswith("("):
        return arrays, None
    return arrays, tuple(len(_ARRAY.findall(each)) for each in _elements(kind[1:-1]))


def _elements(kinds: str) -> Iterator[str]:
    """What the commas outside of all brackets divide."""
    depth, begin = 0, 0
    for at, character in enumerate(kinds):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            yield kinds[begin:at]
            begin = at + 1
    if kinds[begin:].strip():
        yield kinds[begin:]


def _closing(text: str, begin: int) -> int:
    """Where the bracket closes that opens at `begin`."""
    depth, at = 0, begin
    for at in range(begin, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            break
    return at


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction in one of the places from which its computation is called.

    Attributes:
      instruction: the line.
      times: how often it runs in a call of the program.
      scope: what JAX calls it, after what it calls that which it is called from.
      inputs: the wires of each operand.
      given: the arrays of each operand.
      outputs: its own wires.
    """

    instruction: Instruction
    times: int
    scope: str
    inputs: tuple[tuple[int, ...], ...]
    given: tuple[tuple[Array, ...], ...]
    outputs: tuple[int, ...]

    @property
    def opcode(self) -> str:
        """What it does."""
        return self.instruction.opcode


class Graph:
    """The operations of a program, unrolled, and the wires between them.

    Attributes:
      operations: all but those that only pass values on: tuples, calls, loops.
      same: pairs of wires, (from, to), through which values pass on as they are.
      parameters: `{name: wires}` of the program's arguments, by the names that JAX gives them.
      outputs: the wires of what it returns.
      unknown: the names of loops whose length is not known; they are counted once.
    """

    def __init__(self, module: Module):
        self.operations: list[Operation] = []
        self.same: list[tuple[int, int]] = []
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.unknown: list[str] = []
        self._module, self._wires = module, 0
        self.outputs = self._placed(module.entry, None, 1, "")

    def _fresh(self, count: int) -> tuple[int, ...]:
        self._wires += count
        return tuple(range(self._wires - count, self._wires))

    def _placed(
        self, name: str, arguments: Sequence[tuple[int, ...]] | None, times: int, scope: str
    ) -> tuple[int, ...]:
        """Adds a computation in one place, which returns the wires of its result."""
        wires: dict[str, tuple[int, ...]] = {}
        known = {line.name: line for line in self._module.computations[name]}
        result: tuple[int, ...] = ()
        for line in known.values():
            if line.opcode == "parameter":
                mine = self._fresh(len(line.arrays)) if arguments is None else arguments[int(line.inside)]
                if arguments is None:
                    self.parameters[line.op_name or line.name] = mine
            else:
                inputs = tuple(wires[each] for each in line.operands)
                mine = self._passed(line, inputs, known, times, f"{scope} {line.op_name}")
            wires[line.name] = result = mine
            if line.is_root:
                return mine
        return result

    def _passed(
        self,
        line: Instruction,
        inputs: tuple[tuple[int, ...], ...],
        known: dict[str, Instruction],
        times: int,
        scope: str,
    ) -> tuple[int, ...]:
        """The wires of the result of a line, which is added if it computes anything."""
        if line.opcode in ("tuple", "opt-barrier"):
            return tuple(wire for each in inputs for wire in each)
        if line.opcode == "get-tuple-element":
            counts, index = known[line.operands[0]].counts or (), int(line.attribute(r"index=(\d+)") or 0)
            begin = sum(counts[:index])
            return inputs[0][begin : begin + counts[index]]
        if line.opcode == "call":
            return self._placed(str(line.attribute(r"to_apply=%?([\w.\-]+)")), inputs, times, scope)
        if line.opcode == "while":
            return self._looped(line, inputs[0], times, scope)
        outputs = self._fresh(len(line.arrays))
        if line.opcode == "conditional":
            for branch, given in zip(_branches(line), inputs[1:], strict=True):
                self.same += zip(self._placed(branch, (given,), times, scope), outputs, strict=True)
            return outputs
        arrays = tuple(known[each].arrays for each in line.operands)
        self.operations.append(Operation(line, times, scope, inputs, arrays, outputs))
        return outputs

    def _looped(self, line: Instruction, start: tuple[int, ...], times: int, scope: str) -> tuple[int, ...]:
        state = self._fresh(len(start))
        turns = self._turns(line)
        if turns is None:
            self.unknown.append(line.op_name or line.name)
        body = str(line.attribute(r"body=%?([\w.\-]+)"))
        after = self._placed(body, (state,), times * (1 if turns is None else turns), scope)
        self.same += [*zip(start, state, strict=True), *zip(after, state, strict=True)]
        return state

    def _turns(self, line: Instruction) -> int | None:
        """How often a loop turns: as XLA says, or as its condition does, which compares with a constant."""
        if said := line.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(said)
        condition = {each.name: each for each in self._module.computations[
            str(line.attribute(r"condition=%?([\w.\-]+)"))]}  # fmt: skip
        root = next(each for each in condition.values() if each.is_root)
        bounds = [condition[each] for each in root.operands if condition[each].opcode == "constant"]
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(bounds) != 1:
            return None
        return int(bounds[0].inside)


def _branches(line: Instruction) -> list[str]:
    several = line.attribute(r"branch_computations=\{([^}]*)\}")
    names = several.split(",") if several else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line.attributes)
    return [name.strip().lstrip("%") for name in names]
