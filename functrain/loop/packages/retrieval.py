"""What a search is judged by: at which rank the right item comes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from functrain.errors import EvaluationError
from functrain.loop.packages.curves import MOST
from functrain.loop.packages.drawing import blank
from functrain.loop.packages.given import check_names, indices, reals, refuse, whole

_AT_ONCE = 2**23  # Scores that are compared at once.


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The share of queries whose right item is among the k best, and the mean of 1 by its rank.

    Each example is a query. What it finds is told by its scores for all items, or by embeddings: then every example is
    an item too, the right one for its own query, and the score is the inner product; of embeddings of length 1 that is
    the cosine.

    >>> scores = np.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    >>> found = Retrieval(ks=(1, 2)).function(scores, np.array([0, 2]))
    >>> found["recall"], found["mrr"]
    ({'1': 0.5, '2': 1.0}, 0.75)

    Attributes:
      ks: of how many best items.
      scores: the output with the scores of a query, (batch, items).
      item: the output with the right item of a query, int (batch,): the column of its score. With embeddings it is not
        needed; where several examples have one item, such as the captions of an image, it is a number of the item, and
        each of them is right.
      embeddings: the outputs with the embeddings of queries and of items, (batch, features), in the place of scores.
    """

    ks: Sequence[int] = (1, 5, 10)
    scores: str = "scores"
    item: str | None = None
    embeddings: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ks, Sequence) or not self.ks or not all(_is_count(k) for k in self.ks):
            raise EvaluationError(f"Retrieval(ks={self.ks!r}): give whole numbers of at least 1, ks=(1, 5, 10)")
        object.__setattr__(self, "ks", tuple(self.ks))
        if self.embeddings is None:
            object.__setattr__(self, "item", "item" if self.item is None else self.item)
        elif not isinstance(self.embeddings, Sequence) or isinstance(self.embeddings, str) or len(self.embeddings) != 2:
            raise EvaluationError(
                f"Retrieval(embeddings={self.embeddings!r:.100}): give the outputs with queries and items,"
                " embeddings=('query', 'item')"
            )
        else:
            check_names(self, embeddings=self.embeddings[0])
            check_names(self, embeddings=self.embeddings[1])
        check_names(self, scores=self.scores, item="" if self.item is None else self.item)

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that it takes."""
        found = (self.scores,) if self.embeddings is None else tuple(self.embeddings)
        return found if self.item is None else (*found, self.item)

    def function(self, *arrays: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Computes it all; of N embeddings never all N by N scores at once.

        Args:
          *arrays: the outputs by `names`.
          sample_weight: what each query counts, (examples,); by default 1. An item is an item, whatever it weighs.

        Returns:
          "recall" by k; "mrr", the mean reciprocal rank; "median_rank"; "curve", rows k and recall, of at most 200 k. A
          wrong item whose score is that of the right one comes before it.

        Raises:
          EvaluationError: a number is NaN, an item is none, or there are fewer than k.
        """
        given = [np.asarray(array) for array in arrays]
        scores_of, right, of = self._scored(given) if self.embeddings is None else self._embedded(given)
        if len(of) < max(self.ks):
            raise EvaluationError(f"Retrieval(ks={self.ks!r}): there are {len(of)} items; give ks of {len(of)} at most")
        weight = None if sample_weight is None else np.asarray(sample_weight, np.float64)
        ranks = _ranks(scores_of, right, of)
        ks = np.unique(np.geomspace(1, len(of), MOST).round().astype(int))
        return {
            "recall": {str(k): float(np.average(ranks <= k, weights=weight)) for k in self.ks},
            "mrr": float(np.average(1 / ranks, weights=weight)),
            "median_rank": float(np.quantile(ranks, 0.5, weights=weight, method="inverted_cdf")),
            "curve": np.array([ks, [np.average(ranks <= k, weights=weight) for k in ks]]),
        }

    def figure(self, result: Mapping[str, Any]) -> Any:
        """Recall by k, as a `matplotlib.figure.Figure`.

        Raises:
          EvaluationError: matplotlib is not installed.
        """
        made, axes = blank(1, 1, 8, 4)
        axes.plot(*result["curve"], color="C0")
        for k, recall in result["recall"].items():
            axes.plot(int(k), recall, "o", color="C0")
            axes.annotate(f"{recall:.3g} at {k}", (int(k), recall), (6, -12), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel="k best items", ylabel="recall", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(f"mean reciprocal rank {result['mrr']:.4g}, median rank {result['median_rank']:.4g}")
        return made

    def _scored(self, given: Sequence[np.ndarray]) -> tuple[Callable[[slice], Any], np.ndarray, np.ndarray]:
        scores, item = given
        if scores.ndim != 2:
            raise EvaluationError(f"Retrieval: {self.scores!r} is of shape {scores.shape}: return (batch, items)")
        right = indices(self, str(self.item), item, scores.shape[1], "items")
        refuse(self, np.isnan(scores).any(axis=1), f"{self.scores!r} with NaN")
        return lambda rows: scores[rows].astype(np.float64), right, np.arange(scores.shape[1])

    def _embedded(self, given: Sequence[np.ndarray]) -> tuple[Callable[[slice], Any], np.ndarray, np.ndarray]:
        assert self.embeddings is not None
        queries, items = (
            reals(self, name, each, ndim=2) for name, each in zip(self.embeddings, given[:2], strict=True)
        )
        if queries.shape != items.shape:
            raise EvaluationError(
                f"Retrieval: the embeddings are of shapes {queries.shape} and {items.shape}: return as many features"
                " of both"
            )
        which = np.arange(len(items))
        if self.item is not None:
            which = np.unique(whole(self, self.item, given[2]), return_inverse=True)[1]
        return lambda rows: queries[rows] @ items.T, which, which


def _ranks(scores_of: Callable[[slice], Any], right: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The rank of the best right item of each query, from 1.

    Args:
      scores_of: of some queries the scores, (queries, items).
      right: the item that each query looks for, (all queries,).
      of: which item each column is of, (items,).
    """
    ranks = np.empty(len(right), np.int64)
    step = max(1, _AT_ONCE // len(of))
    for start in range(0, len(right), step):
        rows = slice(start, start + step)
        scores, is_right = scores_of(rows), right[rows, None] == of
        best = np.max(scores, axis=1, keepdims=True, initial=-np.inf, where=is_right)
        ranks[rows] = 1 + np.count_nonzero((scores >= best) & ~is_right, axis=1)
    return ranks


def _is_count(k: Any) -> bool:
    return hasattr(k, "__index__") and k >= 1
