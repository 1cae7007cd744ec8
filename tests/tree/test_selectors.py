"""What each kind of selector takes."""

import fnmatch
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trees import TREES, escaped, quick, says

import functrain as ft
from functrain.tree.selectors import matcher


def taken(selector, *among):
    takes = matcher(selector)
    return [path for path in among if takes(path, None)]


def test_a_string_takes_a_leaf_by_its_whole_path():
    assert taken("conv/bias", "conv/bias", "conv/kernel", "bias") == ["conv/bias"]


def test_a_string_takes_the_subtree_beneath():
    assert taken("encoder", "encoder/layers/0/kernel", "encoder/norm", "decoder/norm") == [
        "encoder/layers/0/kernel",
        "encoder/norm",
    ]


def test_a_string_takes_whole_segments():
    assert taken("block_1", "block_1/kernel", "block_10/kernel", "block_1", "block_10") == ["block_1/kernel", "block_1"]


def test_a_string_starts_at_the_root():
    assert taken("bias", "bias", "conv/bias") == ["bias"]


def test_the_empty_string_takes_a_bare_array():
    assert taken("", "", "a") == [""]


@pytest.mark.parametrize(
    ("selector", "takes", "leaves"),
    [
        ("block_*", ["block_", "block_1/bias", "block_10"], ["blocks", "a/block_1"]),
        ("*/bias", ["conv/bias", "linear/bias"], ["bias", "a/conv/bias", "conv/kernel"]),
        ("*", ["a", "a/b", ""], []),
        ("block_?", ["block_1/bias", "block_x"], ["block_", "block_10"]),
        ("a?b", ["axb"], ["a/b", "ab"]),
        ("blocks/[0-3]", ["blocks/0/w", "blocks/3"], ["blocks/4", "blocks/03", "blocks/-"]),
        ("blocks/[!0-3]", ["blocks/4", "blocks/a", "blocks/!"], ["blocks/0", "blocks/3", "blocks/44", "blocks/"]),
        ("blocks/[02-4]", ["blocks/0", "blocks/3"], ["blocks/1"]),
        ("[ab]x", ["ax", "bx/c"], ["cx", "x"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("[a!]", ["a", "!"], ["b"]),
        ("[-a]", ["-", "a"], ["b"]),
        ("[a-]", ["-", "a"], ["b"]),
        ("[]]", ["]"], ["[", "[]"]),
        ("[!]]", ["a", "["], ["]"]),
        ("[]a]", ["]", "a"], ["b"]),
        ("[[]0]", ["[0]", "[0]/kernel"], ["0", "[", "[]0]"]),
        ("[*]", ["*"], ["a", "**"]),
        ("[?]", ["?"], ["a"]),
        ("a[", ["a[", "a[/b"], ["a", "a/["]),
        ("a]", ["a]"], ["a"]),
        ("[]", ["[]"], ["[", "]", ""]),
        ("[!]", ["[!]"], ["!", "a", ""]),
        ("[b-a]", [], ["a", "b", "-", "[b-a]"]),
        ("[!b-a]", ["a", "b", "-"], ["ab", ""]),
        ("[+--]", ["+", ",", "-"], ["a"]),
        ("[--0]", ["-", ".", "0"], ["1"]),
        ("[&&~~||]", ["&", "~", "|"], ["a"]),
        ("[\\d]", ["\\", "d"], ["0"]),
        ("a.b", ["a.b"], ["axb"]),
        ("(a|b)+$", ["(a|b)+$"], ["a"]),
        ("mlp/~/linear_0", ["mlp/~/linear_0/w"], ["mlp/~/linear_1/w", "mlp/linear_0/w"]),
    ],
)
def test_wildcards_stay_within_a_segment(selector, takes, leaves):
    assert taken(selector, *takes, *leaves) == takes


@pytest.mark.parametrize(
    ("selector", "takes", "leaves"),
    [
        ("**", ["", "a", "a/b/c"], []),
        ("**/bias", ["bias", "conv/bias", "a/b/bias/c"], ["conv/my_bias", "biases"]),
        ("**/lora/a", ["lora/a", "x/lora/a/w"], ["lora/b", "lora/x/a"]),
        ("encoder/**/bias", ["encoder/bias", "encoder/a/b/bias"], ["bias", "encoder/a", "x/encoder/bias"]),
        ("encoder/**", ["encoder", "encoder/a", "encoder/a/b"], ["encoder2", "a/encoder"]),
        ("**/**/bias", ["bias", "a/bias", "a/b/bias"], ["a/b"]),
        ("**/block_[0-3]/*/w", ["block_1/a/w", "x/y/block_3/b/w"], ["block_4/a/w", "block_1/w", "block_1/a/b/w"]),
        ("**/a/**/b", ["a/b", "x/a/y/z/b"], ["b/a", "a", "ab"]),
        ("a**", ["a", "abc/d"], ["b/a"]),
        ("**a", ["a", "xa"], ["x/a"]),
    ],
)
def test_two_stars_are_any_number_of_segments(selector, takes, leaves):
    assert taken(selector, *takes, *leaves) == takes


def test_a_selector_with_an_odd_bracket_is_compiled_without_a_warning(recwarn):
    for selector in ("[+--a]", "[a&&b]", "[[a]", "[a||b]", "[a~~b]"):
        assert taken(selector, "a") == ["a"]
    assert not recwarn


def test_a_compiled_regex_takes_the_whole_path():
    selector = re.compile(r"block_\d+/kernel")
    assert taken(selector, "block_1/kernel", "block_10/kernel", "a/block_1/kernel", "block_1/kernel/x") == [
        "block_1/kernel",
        "block_10/kernel",
    ]


def test_a_compiled_regex_keeps_its_flags():
    assert taken(re.compile("BIAS", re.IGNORECASE), "bias") == ["bias"]


def test_a_function_gets_the_path_and_the_leaf():
    seen = []

    def is_matrix(path, leaf):
        seen.append(path)
        return leaf.ndim == 2

    takes = matcher(is_matrix)
    assert takes("kernel", jnp.ones((2, 2))) is True
    assert takes("bias", jnp.ones(2)) is False
    assert seen == ["kernel", "bias"]


def test_a_function_may_return_any_truth_value():
    assert matcher(lambda path, leaf: np.bool_(True))("a", None) is True
    assert matcher(lambda path, leaf: None)("a", None) is False


def test_a_sequence_takes_what_any_of_its_members_takes():
    selector = ["encoder", re.compile(".*/bias"), lambda path, leaf: path == "scale", ("x", ["y"])]
    among = ["encoder/kernel", "head/bias", "scale", "x/w", "y", "head/kernel"]
    assert taken(selector, *among) == among[:-1]


def test_the_ellipsis_takes_everything():
    assert taken(..., "", "a", "a/b") == ["", "a", "a/b"]


def test_non_float_is_a_selector():
    takes = matcher(ft.non_float)
    assert takes("steps", jnp.zeros((), jnp.int32))
    assert not takes("kernel", jnp.ones(2))


@pytest.mark.parametrize(
    "selector", [None, 3, 1.0, {"a", "b"}, {"a": "b"}, b"a", ["a", 3], [["a"], None]], ids=lambda s: type(s).__name__
)
def test_what_is_no_selector_is_an_error(selector):
    with pytest.raises(
        ft.PartitionError,
        match=says("is no selector: write a path like 'encoder/layers'", "regex", "function", "sequence", "..."),
    ):
        matcher(selector)


# non_float.


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.zeros((), jnp.int32),
        jnp.zeros(2, jnp.uint8),
        jnp.zeros(2, bool),
        np.arange(3),
        np.int64(1),
        jax.random.key(0),
        jax.random.split(jax.random.key(0), 3),
        jax.random.PRNGKey(0),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
        np.zeros(2, jax.dtypes.float0),
        3,
        True,
        "relu",
        jnp.tanh,
        jax.nn.relu,
        len,
        lambda x: x,
        np.float32,
        jnp.float32,
        np.dtype("float32"),
        float,
        object(),
    ],
    ids=lambda leaf: f"{type(leaf).__name__} {getattr(leaf, '__name__', getattr(leaf, 'dtype', ''))}",
)
def test_non_float_takes_what_has_no_gradient(leaf):
    assert ft.non_float("path", leaf) is True


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.ones(2),
        jnp.ones(2, jnp.bfloat16),
        jnp.ones(2, jnp.float16),
        jnp.ones(2, jnp.float8_e4m3fn),
        jnp.ones(2, jnp.complex64),
        np.ones(2),
        np.ones(2, jnp.bfloat16),
        np.float32(1.0),
        jax.ShapeDtypeStruct((2,), jnp.bfloat16),
        1.0,
        1j,
        float("nan"),
    ],
    ids=lambda leaf: f"{type(leaf).__name__} {getattr(leaf, 'dtype', '')}",
)
def test_non_float_leaves_floating_point_and_complex_numbers(leaf):
    assert ft.non_float("path", leaf) is False


def test_non_float_sees_the_dtype_of_a_tracer():
    seen = {}

    @jax.jit
    def trace(tree):
        seen.update({path: ft.non_float(path, leaf) for path, leaf in ft.flatten(tree).items()})

    trace({"kernel": jnp.ones(2), "steps": jnp.zeros((), jnp.int32), "key": jax.random.key(0)})
    assert seen == {"kernel": False, "steps": True, "key": True}


# The string matcher against one that is too simple to be wrong.


def simple_match(selector: Sequence[str], path: Sequence[str]) -> bool:
    if not selector:
        return True
    if selector[0] == "**":
        return simple_match(selector[1:], path) or (bool(path) and simple_match(selector, path[1:]))
    return bool(path) and fnmatch.fnmatchcase(path[0], selector[0]) and simple_match(selector[1:], path[1:])


SPECIAL = "ab-!]^["
names = st.text(SPECIAL, max_size=2)
brackets = st.builds("[{}{}]".format, st.sampled_from(["", "!", "^", "]", "!]"]), st.text("abc-!^[&\\", max_size=4))
patterns = st.lists(st.sampled_from([*SPECIAL, "*", "?"]) | brackets, max_size=3).map("".join)


@settings(max_examples=1000)
@given(st.lists(patterns | names | st.just("**"), min_size=1, max_size=4), st.lists(names, min_size=1, max_size=4))
@example(["[]"], ["[]"])
@example(["[!]"], ["[!]"])
@example(["[b-a]"], ["a"])
@example(["[!b-a]"], ["a"])
@example(["**", "a", "**", "b"], ["a", "a", "b", "b"])
def test_a_string_matches_segment_by_segment_as_fnmatch_does(selector, path):
    assert matcher("/".join(selector))("/".join(path), None) == simple_match(selector, path)


@settings(max_examples=300)
@given(brackets)
def test_a_bracket_takes_the_characters_that_it_takes_in_fnmatch(bracket):
    characters = [*"abcd-!^[]&\\", ""]
    assert taken(bracket, *characters) == [one for one in characters if fnmatch.fnmatchcase(one, bracket)]


@quick
@given(st.lists(st.text(SPECIAL + "*?.\\$\n é", max_size=4), min_size=1, max_size=4), st.data())
def test_an_escaped_path_takes_itself_and_nothing_beside(path, data):
    takes = matcher(escaped("/".join(path)))
    assert takes("/".join(path), None)
    assert takes("/".join([*path, "below"]), None)
    other = data.draw(st.lists(names, min_size=1, max_size=4))
    assert takes("/".join(other), None) == (other[: len(path)] == path)


def test_a_mask_is_refused_at_once_where_its_selector_is_none():
    with pytest.raises(ft.PartitionError, match=says("3 is no selector")):
        ft.mask(3)


@pytest.mark.parametrize("name", TREES)
def test_a_mask_is_a_tree_of_booleans_of_the_trees_own_type(name):
    tree = TREES[name]()
    path = next(iter(ft.flatten(tree)))
    for invert in (False, True):
        masked = ft.mask(lambda other, leaf: other == path, invert=invert)(tree)
        assert jax.tree.structure(masked) == jax.tree.structure(tree)
        assert ft.flatten(masked) == {other: (other == path) != invert for other in ft.flatten(tree)}


@pytest.mark.parametrize(
    ("selector", "advice"),
    [("...", "write ... without them"), ("blocks/*/kernel", r"did you mean 'blocks/\*\*/kernel' \(2 leaves\)\?")],
)
def test_what_was_nearly_said_is_suggested(selector, advice):
    params = {"blocks": {"0": {"qkv": {"kernel": 1.0}, "out": {"kernel": 1.0}}}, "head": 1.0}
    with pytest.raises(ft.PartitionError, match=advice):
        ft.partition(params, {"mine": selector, "rest": ...})


def test_a_mask_says_what_it_takes():
    assert ft.mask(["**/bias", "norm"], invert=True).__name__ == "ft.mask(['**/bias', 'norm'], invert=True)"
