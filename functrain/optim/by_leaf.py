"""The update of a transform taken apart by leaf: what of it is computed of which leaf, and of which alike."""

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Literal

from functrain.errors import OptimizerError
from functrain.tree.operations import computed, needed_for, operations_of, written

_SEVERAL = -1  # In the place of a leaf's number: a value that is computed of several of them.


class LeafProgram(NamedTuple):
    """What a transform computes for one leaf.

    Attributes:
      operations: the indices of those that it takes.
      owned: the inputs that are this leaf's alone, its gradient, parameter and state, by number.
      shared: the inputs and constants that other leaves are given too.
      outputs: its update and its next state.
      places: which outputs of the transform these are.
    """

    operations: list[int]
    owned: list[int]
    shared: list[int]
    outputs: list[Any]
    places: list[int]


class ByLeaf:
    """A traced update as a program for each leaf, and one for what belongs to no leaf: counts, rates.

    Attributes:
      leaves: the program of each leaf.
      places: which outputs belong to no leaf.
      params: the numbers of the inputs that are parameters.
      updates: which outputs are updates.

    Args:
      program: of inputs and outputs in an order in which the first are the gradients, respectively the updates.
      leaves: paths, in the order of the gradients.
      params: the numbers of the inputs that are parameters, in the same order, or none.
      states: pairs of the number of an input and of the output that is the next of it.

    Raises:
      OptimizerError: what a leaf is given follows from others.
    """

    def __init__(
        self,
        program: ClosedJaxpr,
        leaves: Sequence[str],
        params: Sequence[int],
        states: Sequence[tuple[int, int]],
    ):
        self._program = operations_of(program)
        self._avals = [str(aval) for aval in program.in_avals]
        self._made_by = {
            number: index for index, each in enumerate(self._program.operations) for number in each.outputs
        }
        self._leaves = leaves
        self.params, self.updates = frozenset(params), range(len(leaves))
        self._owners = dict(enumerate(range(len(leaves)))) | dict(zip(params, range(len(leaves)), strict=False))
        self._values = self._with_states(states)
        after = {out: self._owner(self._program.outputs[out]) for _, out in states}
        mine: list[list[int]] = [[leaf] for leaf in range(len(leaves))]
        for out, owner in after.items():
            if owner is not None and owner != _SEVERAL:
                mine[owner].append(out)
        self.places = [out for out in after if after[out] in (None, _SEVERAL)]
        for leaf in range(len(leaves)):
            self._check_alone(leaf)
        self.leaves = self._programs(mine)

    def form(self, leaf: int) -> Hashable:
        """What is equal for leaves whose updates are computed alike: they may be stacked."""
        program = self.leaves[leaf]
        slots = {number: ("own", slot) for slot, number in enumerate(program.owned)}
        constants = self._program.constants

        def called(number: int) -> Hashable:
            return slots.get(number) or ("constant", id(constants[number]) if number in constants else number)

        operations = [self._program.operations[index] for index in program.operations]
        return tuple(self._avals[number] for number in program.owned), written(operations, program.outputs, called)

    def of_leaf(self, leaf: int, owned: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
        """The outputs of a leaf's program; its own inputs may be those of another leaf of the same form."""
        program = self.leaves[leaf]
        values = dict(zip(program.owned, owned, strict=True)) | dict(zip(program.shared, shared, strict=True))
        return self._computed(program.operations, values, program.outputs)

    def of_none(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs that belong to no leaf."""
        outputs = [self._program.outputs[place] for place in self.places]
        needed = needed_for(outputs, self._made_by, self._program.operations)
        return self._computed(needed, dict(enumerate(inputs)), outputs)

    def given(self, numbers: Sequence[int], inputs: Sequence[Any]) -> list[Any]:
        """Inputs and constants by number."""
        constants = self._program.constants
        return [constants[number] if number in constants else inputs[number] for number in numbers]

    def _computed(self, operations: Iterable[int], values: dict[int, Any], outputs: Sequence[Any]) -> list[Any]:
        return computed((self._program.operations[i] for i in operations), self._program.constants | values, outputs)

    # Whose each value is.

    def _with_states(self, states: Sequence[tuple[int, int]]) -> dict[int, int | None]:
        """The owner of each value, where state is that leaf's whose gradients went into it."""
        while True:
            values = self._followed()
            found = {
                given: owner
                for given, out in states
                if given not in self._owners
                and (owner := _owner_of(self._program.outputs[out], values)) is not None
                and owner != _SEVERAL
            }
            if not found:
                return values
            self._owners |= found

    def _followed(self) -> dict[int, int | None]:
        values: dict[int, int | None] = dict(self._owners)
        for each in self._program.operations:
            owner = functools.reduce(_together, (_owner_of(atom, values) for atom in each.inputs), None)
            values.update(dict.fromkeys(each.outputs, owner))
        return values

    def _owner(self, atom: Any) -> int | None:
        return _owner_of(atom, self._values)

    def _check_alone(self, leaf: int) -> None:
        owner = self._owner(self._program.outputs[leaf])
        if owner in (None, leaf):
            return
        operations = self._program.operations
        needed = needed_for([self._program.outputs[leaf]], self._made_by, operations)
        mixing = [
            operations[i].eqn.primitive.name for i in needed if self._values[operations[i].outputs[0]] == _SEVERAL
        ]
        what = f" (`{mixing[0]}` takes several at once)" if mixing else ""
        raise OptimizerError(
            f"ft.stacked: the update of {self._leaves[leaf]!r} is computed of the gradients or the state of other"
            f" leaves too{what}, which stacks can't be: put what mixes leaves outside,"
            " optax.chain(optax.clip_by_global_norm(1.0), ft.stacked(optax.contrib.muon(0.02))), or write"
            " ft.Optimizer(..., clip_norm=1.0)"
        )

    def _programs(self, mine: Sequence[Sequence[int]]) -> list[LeafProgram]:
        count = len(self._avals)
        operations = self._program.operations
        needed, given = [], []
        for places in mine:
            outputs = [self._program.outputs[place] for place in places]
            indices = needed_for(outputs, self._made_by, operations)
            atoms = [*outputs, *(atom for index in indices for atom in operations[index].inputs)]
            numbers = {atom for atom in atoms if not isinstance(atom, Literal)}
            needed.append(indices)
            given.append(sorted(n for n in numbers if n < count or n in self._program.constants))
        uses: dict[int, int] = {}
        for numbers_of_leaf in given:
            for number in numbers_of_leaf:
                uses[number] = uses.get(number, 0) + 1
        programs = []
        for places, indices, numbers_of_leaf in zip(mine, needed, given, strict=True):
            # What is given to one leaf alone is its own too, such as the parameters that it began with.
            owned = [n for n in numbers_of_leaf if n in self._owners or (uses[n] == 1 and n < count)]
            shared = [n for n in numbers_of_leaf if n not in owned]
            outputs = [self._program.outputs[place] for place in places]
            programs.append(LeafProgram(indices, owned, shared, outputs, [*places]))
        return programs


def _owner_of(atom: Any, values: Mapping[int, int | None]) -> int | None:
    return None if isinstance(atom, Literal) else values.get(atom)


def _together(one: int | None, other: int | None) -> int | None:
    if one is None or one == other:
        return other
    return one if other is None else _SEVERAL
