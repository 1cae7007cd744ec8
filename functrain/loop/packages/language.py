"""What a language model is judged by: its loss by token, and by byte."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from functrain.errors import EvaluationError
from functrain.loop.packages.drawing import blank, draw_histogram
from functrain.loop.packages.given import check_names, reals, refuse

_BINS = 40
_MOST = math.log(np.finfo(np.float64).max)


@dataclasses.dataclass(frozen=True)
class Language:
    """The loss by token, perplexity, and bits per byte of a language model, over all tokens of all examples.

    >>> nll, tokens, text = np.array([4.0, 2.0]), np.array([3, 1]), np.array([12, 4])
    >>> found = Language(bytes="text").function(nll, tokens, text)
    >>> found["loss"], round(found["perplexity"], 2), round(found["bits_per_byte"], 2)
    (1.5, 4.48, 0.54)

    Attributes:
      nll: the output with the negative log-likelihood of each example, the sum over its tokens in nats, (batch,).
      tokens: the output with the number of tokens in that sum, (batch,).
      bytes: the output with the number of bytes of the text that these tokens are, (batch,). Tokens do not say it: bits
        per byte are there only with it.
    """

    nll: str = "nll"
    tokens: str = "tokens"
    bytes: str | None = None

    def __post_init__(self) -> None:
        check_names(self, nll=self.nll, tokens=self.tokens)
        if self.bytes is not None:
            check_names(self, bytes=self.bytes)

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that it takes."""
        return (self.nll, self.tokens) if self.bytes is None else (self.nll, self.tokens, self.bytes)

    def function(self, nll: Any, tokens: Any, text: Any = None, *, sample_weight: Any = None) -> dict[str, Any]:
        """Computes it all.

        Args:
          nll: sums over tokens, in nats, (examples,).
          tokens: their numbers, (examples,).
          text: numbers of bytes, (examples,).
          sample_weight: what each example counts, (examples,); by default 1.

        Returns:
          "loss" by token, in nats; "perplexity", its exponential; "bits_per_byte", where there are bytes; "tokens",
          their number; "histogram" of the loss by token of each example, "edges" and "counts".

        Raises:
          EvaluationError: a number is NaN, infinite or negative, or there is no token, or no byte.
        """
        nll = reals(self, self.nll, np.asarray(nll), ndim=1)
        weight = np.ones(len(nll)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        counts, total = self._counts(self.tokens, tokens, weight)
        # Rounding may make the loss of what is certain a little less than 0.
        refuse(
            self, nll < -1e-3 * np.maximum(counts, 1), f"a {self.nll!r} below 0", "return the log-likelihood's negative"
        )
        loss = float(np.sum(weight * nll)) / total
        found: dict[str, Any] = {"loss": loss, "perplexity": math.exp(loss) if loss < _MOST else math.inf}
        if self.bytes is not None:
            _, length = self._counts(self.bytes, text, weight)
            found["bits_per_byte"] = loss * total / math.log(2) / length
        has = counts > 0
        drawn, edges = np.histogram(
            nll[has] / counts[has], _BINS, weights=None if sample_weight is None else weight[has]
        )
        return found | {"tokens": total, "histogram": {"edges": edges, "counts": drawn}}

    def figure(self, result: Mapping[str, Any]) -> Any:
        """The loss by token of the examples, as a `matplotlib.figure.Figure`.

        Raises:
          EvaluationError: matplotlib is not installed.
        """
        made, axes = blank(1, 1, 8, 4)
        draw_histogram(axes, **result["histogram"])
        axes.axvline(result["loss"], color="C3", label=f"over all tokens {result['loss']:.4g}")
        per_byte = (
            f"{result['bits_per_byte']:.4g} bits per byte" if self.bytes else "bits per byte need Language(bytes=)"
        )
        axes.set(title=f"perplexity {result['perplexity']:.4g}, {per_byte}", xlabel="loss by token of an example, nats")
        axes.legend()
        return made

    def _counts(self, name: str, given: Any, weight: np.ndarray) -> tuple[np.ndarray, float]:
        """Tokens or bytes, and their weighted sum."""
        counts = reals(self, name, np.asarray(given), ndim=1)
        refuse(self, counts < 0, f"a {name!r} below 0")
        if not (total := float(np.sum(weight * counts))):
            raise EvaluationError(f"Language: {name!r} is 0 for every example: return how many each example has")
        return counts, total
