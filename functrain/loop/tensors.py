"""Tensors of PyTorch as arrays, without importing it."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functrain.errors import DataError
from functrain.tree.paths import flatten

_CUSTOM = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")  # Not NumPy's own.


def arrays_of(tree: Any) -> Any:
    """A tree in which each tensor of PyTorch is a NumPy array in the same memory.

    Raises:
      DataError: a tensor that is not on the CPU, or that requires a gradient.
    """
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    if not any(isinstance(leaf, tensor) for leaf in leaves):
        return tree
    named = zip(flatten(tree), leaves, strict=True)
    arrays = [_array(path, leaf) if isinstance(leaf, tensor) else leaf for path, leaf in named]
    return jax.tree.unflatten(treedef, arrays)


def _array(path: str, tensor: Any) -> np.ndarray:
    name = f"{path!r} is" if path else "the data is"
    if tensor.device.type != "cpu":
        raise DataError(f"{name} a tensor of PyTorch on {tensor.device}: write tensor.cpu()")
    if tensor.requires_grad:
        raise DataError(f"{name} a tensor of PyTorch that requires a gradient: write tensor.detach()")
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        if dtype not in _CUSTOM:
            array: np.ndarray = tensor.numpy()
            return array
        torch: Any = sys.modules["torch"]
        same_size = torch.int16 if dtype == "bfloat16" else torch.int8
        return np.asarray(tensor.view(same_size).numpy().view(jnp.dtype(dtype)))
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"{name} a tensor of PyTorch, {dtype} {tuple(tensor.shape)}, that is no NumPy array:"
            f" {str(error).rstrip('.')}; write tensor.to_dense().float(), or what makes a dtype that JAX has of it"
        ) from error
