"""What is done to the gradients of a window before the optimizer is given them: `make_update(gradients=fn)`."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functrain.errors import UpdateError
from functrain.gradients.loss import name_of
from functrain.tree.paths import flatten, structure_difference
from functrain.tree.text import listed

_KNOWN = ("per_loss", "key", "step", "params", "metrics")
_NO_SLICE = 2**32 - 1  # Microbatches fold their index into the key of their batch.


@dataclasses.dataclass(frozen=True, eq=False)
class Surgery:
    """A function of gradients, and what it declares to be given.

    Attributes:
      fn: `fn(grads, *, per_loss, key, step, params, metrics) -> grads`, pure, of split gradients.

    Raises:
      UpdateError: it is no function, or requires an argument that functrain does not know.
    """

    fn: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise UpdateError(f"gradients={self.fn!r}: give a function, fn(grads) -> grads, of split gradients")
        if unknown := [name for name, is_required in self._arguments.items() if is_required and name not in _KNOWN]:
            raise UpdateError(
                f"gradients={name_of(self.fn)} requires {listed(unknown)}, which functrain does not give: it is called"
                f" with the split gradients, and may declare {listed(_KNOWN, 10)}; bind the rest with functools.partial"
            )

    @functools.cached_property
    def _arguments(self) -> dict[str, bool]:
        """The arguments after the gradients, and whether it requires them."""
        parameters = [*inspect.signature(self.fn).parameters.values()][1:]
        return {p.name: p.default is p.empty for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}

    @property
    def declares(self) -> frozenset[str]:
        """The arguments beyond the gradients that it takes."""
        return frozenset(self._arguments) & {*_KNOWN}

    @property
    def needs_key(self) -> bool:
        """Whether it can't be called without a key."""
        return self._arguments.get("key", False)

    def __call__(self, grads: Any, *, key: Any, **given: Any) -> Any:
        """The gradients that it returns.

        Raises:
          UpdateError: they are of another structure or shapes.
        """
        if key is not None:
            given["key"] = jax.random.fold_in(key, jnp.uint32(_NO_SLICE))
        made = self.fn(grads, **{name: given[name] for name in self.declares if name in given})
        _check_like(made, grads, name_of(self.fn))
        return made


def _check_like(made: Any, grads: Mapping[str, Any], name: str) -> None:
    what = f"gradients={name} must return split gradients like those that it is given"
    if differs := structure_difference(made, dict(grads)):
        raise UpdateError(f"{what}: the tree {differs}")
    shapes = {path: jnp.shape(leaf) for path, leaf in flatten(grads).items()}
    for path, leaf in flatten(made).items():
        if jnp.shape(leaf) != shapes[path]:
            raise UpdateError(f"{what}: {path!r} has shape {jnp.shape(leaf)}, not {shapes[path]}")
