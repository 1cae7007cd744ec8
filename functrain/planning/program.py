"""What the programs of a step compute and send, read from what XLA makes of them."""

import collections
from typing import Any, NamedTuple

import jax

from functrain.errors import PlanError
from functrain.planning.collectives import Collective, collectives, merged
from functrain.planning.compiling import compiled
from functrain.planning.flow import Flow
from functrain.planning.hlo import Graph, parsed
from functrain.planning.products import flops_by_part
from functrain.update.anatomy import Lowered


class Costs(NamedTuple):
    """What a step costs.

    Attributes:
      flops: by part, of all devices together if none did what another does.
      flops_here: by part, of each device.
      collectives: of each device.
      temporaries: the most bytes that a program has beside its arguments and results; None where XLA does not say.
      unknown: loops whose length is not known: what is in them is counted once.
    """

    flops: collections.Counter[str]
    flops_here: collections.Counter[str]
    collectives: list[Collective]
    temporaries: int | None
    unknown: tuple[str, ...]

    def __add__(self, other: Any) -> "Costs":
        sizes = [each for each in (self.temporaries, other.temporaries) if each is not None]
        return Costs(
            self.flops + other.flops,
            self.flops_here + other.flops_here,
            merged([*self.collectives, *other.collectives]),
            max(sizes, default=None),
            tuple(dict.fromkeys(self.unknown + other.unknown)),
        )


NOTHING = Costs(collections.Counter(), collections.Counter(), [], None, ())


def costs_of(call: Lowered, devices: int) -> Costs:
    """What a step has of one of its calls, as often as it makes it.

    Raises:
      PlanError: XLA did not show how it partitions the program.
    """
    whole, of_whole = _followed(call, call.program.as_text(dialect="hlo", debug_info=True))
    made = compiled(call.program)
    if made.text is None and devices > 1:
        raise PlanError(
            f"XLA showed nothing of how it cuts {call.kind!r} over {devices} devices: take dump options out of"
            " XLA_FLAGS, or plan with the jax that functrain is tested with"
        )
    here, of_here = (whole, of_whole) if made.text is None else _followed(call, made.text)
    memory: Any = made.program.memory_analysis()
    return Costs(
        _times(flops_by_part(whole, of_whole), call.times),
        _times(flops_by_part(here, of_here), call.times),
        merged(collectives(here, of_here, devices), call.times),
        getattr(memory, "temp_size_in_bytes", None),
        tuple(here.unknown),
    )


def _followed(call: Lowered, text: str) -> tuple[Graph, Flow]:
    graph = Graph(parsed(text))
    return graph, Flow(graph, call.arguments, call.outputs)


def _times(counts: collections.Counter[str], times: int) -> collections.Counter[str]:
    return collections.Counter({part: count * times for part, count in counts.items()})


def devices_of(state: Any) -> int:
    """How many devices a state lies over."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(state))
    return max((sharding.num_devices for sharding in shardings if sharding is not None), default=1)
