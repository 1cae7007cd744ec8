"""The programs of an update: what each kind of call compiles, consumes and returns, and where they are kept."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import LossError, PhaseError
from functrain.gradients.loss import Loss, name_of
from functrain.mesh.constraints import told_of_explicit_axes
from functrain.tree.arrays import is_here
from functrain.tree.paths import flatten
from functrain.tree.text import listed
from functrain.update.checks import check_batch_of_all
from functrain.update.consumed import check_not_deleted
from functrain.update.metrics import Metrics
from functrain.update.options import Settings
from functrain.update.packed import Form, consume, pack, packed_leaves, unpack
from functrain.update.phases import Phase, Turn
from functrain.update.placing import check_places
from functrain.update.precision import check_products
from functrain.update.state import TrainState
from functrain.update.step import Step
from functrain.update.tracing import Batches, described, field_and_path, names_of_arguments
from functrain.update.turns import Body, Found, apart, make_cycles, make_turn, under_phases
from functrain.update.unmoved import Unmoved
from functrain.update.window import Window

_LAST = 2**31 - 1
_THREADS = 16  # In which XLA compiles: each works on one program, without the GIL.
_BY_PART = ("opt_state", "ema")  # Fields that a step changes those parts of which it trains.


class Call(NamedTuple):
    """What is compiled once: a kind of call, the turns that it takes (of a scan one cycle), whether with telemetry.

    And the number of the stage in which it takes them, of a run whose parts join on the way.
    """

    kind: str
    turns: tuple[Turn, ...]
    measured: bool = False
    stage: int = 0

    @property
    def only_adds(self) -> bool:
        """Whether it adds to a window and makes no step."""
        return self.kind in ("first", "middle")


class Program:
    """The compiled program of a call, for states of a form.

    It consumes the leaves of the state that it changes, and reads the others: a phase leaves the networks of other
    phases where they are, and every update what is frozen. XLA deletes what is consumed and writes the new in its
    place. Optimizer state and averages that it does not change are no arguments of it, as nothing of them is looked at;
    a frozen part has none at all.

    Attributes:
      form: of the states.
      is_of_several: whether the parameters lie over several processes.
    """

    def __init__(self, steps: Sequence[Step], call: Call, form: Form, see: Callable[[Any], None]):
        self.form = form
        self.is_of_several = False
        self._see = see
        self._consumes = _changed(steps, call, form)
        self._reads = _read(self._consumes, form)
        # Only a middle batch returns a window, of which a consumed one could be the place.
        self._consumes_window = call.kind == "middle"
        self.jitted = self._jitted(steps, call)

    def split(self, state: TrainState) -> tuple[Any, Any]:
        """What it consumes of a state, and what it reads."""
        _, leaves = pack(state)
        consumed = leaves if len(self._consumes) == len(leaves) else [leaves[i] for i in self._consumes]
        consumed_window, read_window = (state.window, None) if self._consumes_window else (None, state.window)
        step, batches = counted(state)
        read = ([leaves[i] for i in self._reads], read_window, state.key, step, batches)
        return (consumed, consumed_window), read

    def join(self, consumed: Any, read: Any) -> TrainState:
        """The inverse of `split`; what it gave away nowhere is 0."""
        (changing, consumed_window), (others, read_window, key, step, batches) = consumed, read
        given = dict(zip((*self._consumes, *self._reads), (*changing, *others), strict=True))
        return TrainState(
            **self.form.fields([given.get(i, 0) for i in range(self.form.leaves)]),
            key=key,
            step=step,
            batches=batches,
            pending=0,
            window=consumed_window or read_window,
        )

    def __call__(
        self, state: TrainState, batch: Any, settings: Settings | None, **counters: Any
    ) -> tuple[TrainState, Metrics, Any]:
        """The next state, with the given counters, the metrics, and what they are means over.

        Raises:
          UpdateError: an earlier call has consumed the state.
        """
        consumed, read = self.split(state)
        # One leaf of each tells: what a call consumes is deleted together.
        check_not_deleted([*consumed[0][:1], *read[0][:1], *([consumed[1].weight] if consumed[1] else [])])
        changed, window, metrics, weights = self.jitted(consumed, read, batch, settings)
        consume(state)
        leaves = changed
        if len(changed) < self.form.leaves:
            leaves = pack(state)[1].copy()
            for i, leaf in zip(self._consumes, changed, strict=True):
                leaves[i] = leaf
        others = {"key": state.key, "window": window, "configuration": state.configuration, **counters}
        return unpack(TrainState, self.form, leaves, **others), metrics, weights

    def traced(self, state: TrainState, batch: Any, settings: Settings | None) -> Any:
        """What `jax.jit(...).trace` gives; a call with such arguments does not trace again."""
        return self.jitted.trace(*self.split(state), batch, settings)

    def arguments(self, state: TrainState, batch: Any, settings: Settings | None) -> list[str]:
        """What the arguments of what `traced` gives are to the user, in order: "params 'conv1/kernel'"."""
        names, given = self._names(batch, settings), (*self.split(state), batch, settings)
        calls = [
            f"{argument}{jax.tree_util.keystr(keys)}"
            for argument, tree in zip(("consumed", "read", "batch", "settings"), given, strict=True)
            for keys, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]
        return [names.get(call, call) for call in calls]

    def _names(self, batch: Any, settings: Settings | None) -> dict[str, str]:
        """What the arguments of the jitted function are to the user, by what JAX calls them."""
        leaves = {i: path for path, i in flatten(self.form.fields(range(self.form.leaves))).items()}
        of = {f"consumed[0][{nth}]": leaves[i] for nth, i in enumerate(self._consumes)}
        of |= {f"read[0][{nth}]": leaves[i] for nth, i in enumerate(self._reads)}
        fields = {name: field_and_path(path) for name, path in of.items()}
        others = {"read[2]": "the key", "read[3]": "the step", "read[4]": "the number of batches"}
        return (
            fields
            | others
            | described("batch", "the batch's", batch)
            | described("settings", "the hyperparameter", settings)
        )

    def _jitted(self, steps: Sequence[Step], call: Call) -> Any:
        body = body_of(steps, call)

        def run(consumed: Any, read: Any, batch: Any, settings: Settings | None) -> tuple[list[Any], Any, Metrics, Any]:
            self._see(batch)
            told: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if layout is not None:
                batch = layout.constrained(batch, stacked=call.kind == "scan")
                told = told_of_explicit_axes(layout.mesh)
            with told, names_of_arguments(lambda: self._names(batch, settings)), _told_of_scan(call, batch):
                state, found = body(self.join(consumed, read), batch, settings)
            leaves, window = packed_leaves(state), state.window
            if window is not None and grads is not None and step.options.by_loss:
                of_each = dict.fromkeys(window.grads, grads)
                window = dataclasses.replace(window, grads=jax.lax.with_sharding_constraint(window.grads, of_each))
            return [leaves[i] for i in self._consumes], window, *apart(found)

        run.__name__ = f"functrain_{call.kind}"
        step, grads, out_shardings = steps[call.turns[0][0]], None, None
        layout = step.options.optim.layout
        if self.form.shardings is not None:
            optim = step.options.optim
            places = step.options.places_of_sums or optim.parts.split(self.form.field("params", self.form.shardings))
            grads = {part: places[part] for part in step.parts}
            # The names of the losses, where there are gradients of each, are not known yet.
            of_window = None if step.options.by_loss else grads
            others = step.options.by_shard and step.options.by_shard.place
            window = Window(grads=of_window, metrics=others, weight=others) if call.only_adds else None
            out_shardings = ([self.form.shardings[i] for i in self._consumes], window, None, None)
        return jax.jit(run, donate_argnums=0, out_shardings=out_shardings)


class Programs:
    """The programs of an update, each made when it is first called for; and what they know of each other."""

    def __init__(self, phases: Sequence[Phase], stages: Sequence[Sequence[Step]]):
        self._phases = phases
        self._stages = [
            [dataclasses.replace(step, see=functools.partial(self._see, step.index)) for step in steps]
            for steps in stages
        ]
        self.kept: dict[tuple[Call, Form], Program] = {}
        self._losses: dict[int, list[str]] = {}
        self._checked: set[int] = set()
        self._batches = Batches()
        self._unmoved = Unmoved(self._stages[0][0].options.optim, len(phases))
        self.options = self._stages[0][0].options

    def program(self, call: Call, state: TrainState, batch: Any, settings: Settings | None) -> Program:
        """The program of a call with such arguments."""
        form, _ = pack(state)
        program = self.kept.get((call, form))
        if program is None:
            self._check_parts(call)
            if all(known != form for _, known in self.kept):
                check_places(self.options, state, batch)
            program = Program(self._stages[call.stage], call, form, functools.partial(self._batches.see, (call, form)))
            self._check_precision(program, call, (state, batch, settings))
            self._check_unmoved(program, call, (state, batch, settings))
            program.is_of_several = jax.process_count() > 1 and not all(map(is_here, jax.tree.leaves(state.params)))
            self.kept[call, form] = program
        return program

    def compile(self, asked: Iterable[tuple[Call, TrainState, Any]]) -> None:
        """Compiles the programs of calls with such states and batches: traced one by one, compiled side by side.

        What is traced, lowered or compiled here is not again when it is called.
        """
        lowered = (
            self.program(call, state, batch, None).traced(state, batch, None).lower() for call, state, batch in asked
        )
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            for compiling in [threads.submit(each.compile) for each in lowered]:
                compiling.result()

    def run(
        self, call: Call, state: TrainState, batch: Any, settings: Settings | None, *, batches: int, steps: int
    ) -> tuple[TrainState, Metrics, Any]:
        """Makes a call, which takes in a number of batches and makes a number of steps; also returns the weights.

        Raises:
          UpdateError: of several processes each gives a batch of its own.
        """
        program = self.program(call, state, batch, settings)
        if program.is_of_several:
            check_batch_of_all(batch)
        return program(
            state,
            batch,
            settings,
            step=np.array(int(state.step) + steps, np.int64),
            batches=np.array(int(state.batches) + batches, np.int64),
            pending=np.array(int(state.pending) + 1 if call.only_adds else 0, np.int64),
        )

    def trains(self, turn: Turn, stage: int) -> bool:
        """Whether each phase of a turn has a part to train in a stage."""
        return all(self._stages[stage][index].parts for index in turn)

    def _check_parts(self, call: Call) -> None:
        """Raises if it is the turn of a phase whose parts are all to join later."""
        for turn in call.turns:
            if not self.trains(turn, call.stage):
                phase = next(self._phases[index] for index in turn if not self._stages[call.stage][index].parts)
                begin = min(self.options.optim.frozen_until[part] for part in phase.trained)
                raise PhaseError(
                    f"phase= gives phase {phase.name!r} a turn before step {begin}, where the first of its parts joins,"
                    f" {listed(phase.trained)}: have it return another phase until then, or lower frozen_until="
                )

    def _check_precision(self, program: Program, call: Call, arguments: tuple[TrainState, Any, Any]) -> None:
        """Warns, once, of phases that compute in 32 bits although they were to do so in 16."""
        dtype, phases = self.options.narrow, {index for turn in call.turns for index in turn}
        if dtype is None or call.kind == "flush" or phases <= self._checked:
            return
        self._checked |= phases
        names = [name_of(self._phases[i].loss_fn) for i in sorted(phases)]
        check_products(program.traced(*arguments).jaxpr, dtype, names, lambda: program.arguments(*arguments))

    def _check_unmoved(self, program: Program, call: Call, arguments: tuple[TrainState, Any, Any]) -> None:
        """Warns, once, of state of a model in frozen parts that phases use as if it moved."""
        phases = {index for turn in call.turns for index in turn}
        if call.kind != "flush" and not self._unmoved.is_known(phases):
            names, has_model_state = program.arguments(*arguments), arguments[0].model_state is not None
            self._unmoved.see(program.traced(*arguments).jaxpr, names, phases, has_model_state=has_model_state)

    def _see(self, index: int, loss: Loss) -> None:
        """Raises if one program returns other losses than another: what they are logged as would jump."""
        names = sorted(loss.values)
        before = self._losses.setdefault(index, names)
        if names != before:
            raise LossError(
                f"{name_of(self._phases[index].loss_fn)} returned the losses {listed(names)}, and before"
                f" {listed(before)}: return the same names in every call, a constant 0.0 where one does not apply"
            )


@contextlib.contextmanager
def _told_of_scan(call: Call, batches: Any) -> Iterator[None]:
    """Adds to an error of a scan what it takes each batch to be: one that was not stacked has lost its examples."""
    try:
        yield
    except Exception as error:
        if call.kind == "scan":
            shapes = {path: jnp.shape(leaf)[1:] for path, leaf in flatten(batches).items()}
            error.add_note(
                f"update.scan takes the leading axis as that of the batches, so that each has the shapes {shapes}:"
                " batches are stacked, jax.tree.map(lambda *leaves: np.stack(leaves), *batches)"
            )
        raise


def _changed(steps: Sequence[Step], call: Call, form: Form) -> list[int]:
    """Which leaves of the state a call changes."""
    numbers = form.fields(range(form.leaves))
    changed = [numbers["model_state"]]
    if not call.only_adds:
        mine = [steps[index] for turn in call.turns for index in turn]
        parts = {part for step in mine for part in step.parts}
        params = numbers["params"]
        if not any(step.after for step in mine):
            split = mine[0].options.optim.parts.split(params)
            params = [split[part] for part in parts]
        names = {mine[0].options.optim.states_used(step.using)[part] for step in mine for part in step.parts}
        ema = [numbers["ema"][part] for part in parts if part in (numbers["ema"] or ())]
        changed += [params, [numbers["opt_state"][name] for name in names], ema, numbers["scale_state"]]
    return sorted(jax.tree.leaves(changed))


def _read(changed: Sequence[int], form: Form) -> list[int]:
    """Which others it looks at: optimizer state and averages that it does not change are none of them."""
    numbers = {name: value for name, value in form.fields(range(form.leaves)).items() if name not in _BY_PART}
    return sorted({*jax.tree.leaves(numbers)} - {*changed})


def counted(state: TrainState) -> tuple[np.ndarray, np.ndarray]:
    """`step` and `batches` in 32 bits, as programs count: a step stops at the last one, batches begin anew."""
    step = np.array(min(int(state.step), _LAST), np.int32)
    return step, np.array(int(state.batches), np.int64).astype(np.int32)


def body_of(steps: Sequence[Step], call: Call) -> Body:
    """What a call computes, as a pure function."""
    turn, measured = call.turns[0], call.measured
    if call.kind == "scan":
        return make_cycles(steps, call.turns, measured=measured)
    if call.kind == "whole":
        return make_turn(steps, turn, measured=measured)
    step = steps[turn[0]]

    def run(state: TrainState, batch: Any, settings: Settings | None) -> tuple[TrainState, Found]:
        if call.only_adds:
            state, weighed = step.add(state, batch)
        elif call.kind == "last":
            state, weighed = step.last(state, batch, settings, measured=measured)
        else:
            state, weighed = step.flush(state, settings, measured=measured)
        return state, under_phases({step.name: weighed})

    return run
