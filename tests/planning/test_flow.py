"""Whose an operation is, of programs small enough to be read."""

import pytest

from functrain.planning.collectives import collectives
from functrain.planning.flow import Flow
from functrain.planning.hlo import Graph, parsed

SUM = """sum {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b)
}

"""

GRADIENT = """ENTRY main {{
  zero = f32[] constant(0)
  p = f32[4]{{0}} parameter(0)
  x = f32[{rows},4]{{1,0}} parameter(1)
  r = f32[4]{{0}} reduce(x, zero), dimensions={{0}}, to_apply=sum
  s = f32[4]{{0}} all-reduce(r), replica_groups=[1,8]<=[8], to_apply=sum, metadata={{op_name="transpose(jvp())"}}
  two = f32[{copies},4]{{1,0}} {spread}
  g = f32[4]{{0}} reduce(two, zero), dimensions={{0}}, to_apply=sum
  ROOT q = f32[4]{{0}} subtract(p, g)
}}"""


def found(text, arguments, outputs):
    graph = Graph(parsed(SUM + text))
    return collectives(graph, Flow(graph, arguments, outputs), 8)


@pytest.mark.parametrize(
    ("copies", "spread", "part"),
    [
        (1, "reshape(s)", "body"),  # A sum over one row leaves every number as it is,
        (2, "broadcast(s), dimensions={1}", ""),  # and one over two does not.
    ],
)
def test_a_sum_over_a_dimension_of_one_is_no_sum(copies, spread, part):
    (one,) = found(GRADIENT.format(rows=3, copies=copies, spread=spread), {"p": "body", "x": ""}, ["body"])
    assert (one.kind, one.part, one.devices) == ("all-reduce", part, 8)


SCATTERED = """ENTRY main {{
  x = f32[8,4]{{1,0}} parameter(0)
  s = f32[8,4]{{1,0}} all-reduce(x), replica_groups=[1,8]<=[8], to_apply=sum, metadata={{op_name="transpose(jvp())"}}
  zero = s32[] constant(0)
  id = u32[] partition-id()
  one = s32[] convert(id)
  two = s32[] parameter(1)
  ROOT y = f32[{rows},4]{{1,0}} dynamic-slice(s, {begin}, zero), dynamic_slice_sizes={{{rows},4}}
}}"""


@pytest.mark.parametrize(
    ("rows", "begin", "kind"),
    [
        (1, "one", "reduce-scatter"),  # Its own eighth;
        (2, "one", "all-reduce"),  # a quarter, which two devices have;
        (1, "two", "all-reduce"),  # an eighth that all have alike.
    ],
)
def test_a_sum_is_scattered_where_each_device_keeps_its_own_slice(rows, begin, kind):
    (one,) = found(SCATTERED.format(rows=rows, begin=begin), {"x": ""}, ["body"])
    assert (one.kind, one.part, one.nbytes) == (kind, "body", 128)


def test_what_comes_from_two_parts_or_goes_to_two_is_of_none():
    text = """ENTRY main {
  p = f32[4]{0} parameter(0)
  q = f32[4]{0} parameter(1)
  of_p = f32[8]{0} all-gather(p), replica_groups=[4,2]<=[8], dimensions={0}
  both = f32[4]{0} add(p, q)
  of_both = f32[8]{0} all-gather(both), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT out = (f32[8]{0}, f32[8]{0}, f32[8]{0}) tuple(of_p, of_both, of_both)
}"""
    assert {each.part for each in found(text, {"p": "body", "q": "head"}, ["body", "body", "head"])} == {"body", ""}
