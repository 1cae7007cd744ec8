"""Rules: selectors in order, the first of which that matches takes a leaf."""

from collections.abc import Mapping
from typing import Literal

from functrain.errors import PartitionError
from functrain.tree.paths import PyTree, flatten
from functrain.tree.selectors import Selector, describe, matcher, resolved, unmatched
from functrain.tree.text import leaves_in_words, listed


def owners(tree: PyTree, rules: Mapping[str, Selector], overlap: Literal["first", "error"] = "first") -> dict[str, str]:
    """The name of the rule that takes each leaf, by path; what none takes is not there.

    >>> owners({"conv": {"kernel": 1.0, "bias": 2.0}, "head": 3.0}, {"biases": "**/bias", "head": "head"})
    {'conv/bias': 'biases', 'head': 'head'}

    Args:
      tree: any pytree.
      rules: a selector by the name of its rule.
      overlap: "error": that two rules match one leaf is an error, unless one of them is `...`.

    Raises:
      PartitionError: a rule takes no leaf (says which names come nearest, or which rule took them before), or two rules
        match one with `overlap="error"`.
    """
    flat = flatten(tree)
    owner: dict[str, str] = {}
    for name, given in rules.items():
        try:
            selector = resolved(given, tree)
            takes = matcher(selector)
        except PartitionError as error:
            raise PartitionError(f"rule {name!r}: {error}") from None
        if selector is ...:
            matched = [path for path in flat if path not in owner]
        else:
            matched = [path for path, leaf in flat.items() if takes(path, leaf)]
            if problem := unmatched(selector, flat):
                raise PartitionError(f"rule {name!r}: {problem}")
        free = [path for path in matched if path not in owner]
        earlier = dict.fromkeys(owner[path] for path in matched if path in owner)
        if earlier and overlap == "error":
            both = [path for path in matched if path in owner]
            raise PartitionError(
                f"rule {name!r} also matches {listed(both)} of {listed(earlier)}: make the two selectors disjoint,"
                " or overlap='first' to let the first rule have them"
            )
        if not free:
            _raise_shadowed(name, selector, matched, list(earlier))
        owner.update(dict.fromkeys(free, name))
    return owner


def _raise_shadowed(name: str, selector: Selector, matched: list[str], earlier: list[str]) -> None:
    if not earlier:
        raise PartitionError(f"rule {name!r}: {describe(selector)} takes no leaf, as earlier rules took all; remove it")
    raise PartitionError(
        f"rule {name!r} takes no leaf: {leaves_in_words(len(matched))} that {describe(selector)} matches went to the"
        f" earlier rule {listed(earlier)}; put {name!r} before it"
    )
