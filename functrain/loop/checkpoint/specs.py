"""The shape and dtype of a leaf as text, and what it says; nothing here needs JAX."""

import functools
import math
import re

_KEYS = {"key<fry>": 8, "key<rbg>": 16, "key<urbg>": 16}


@functools.lru_cache(4096)
def shape_dtype(spec: str) -> tuple[tuple[int, ...], str]:
    """The inverse of `leaf_spec`.

    >>> shape_dtype("float32[3,4]"), shape_dtype("key<fry>[]")
    (((3, 4), 'float32'), ((), 'key<fry>'))
    """
    dtype, _, sizes = spec.removesuffix("]").partition("[")
    return tuple(int(size) for size in sizes.split(",") if size), dtype


def nbytes(spec: str) -> int:
    """How many bytes a leaf takes up.

    >>> nbytes("bfloat16[3,4]"), nbytes("int4[8]"), nbytes("bool[]"), nbytes("key<fry>[2]")
    (24, 8, 1, 16)
    """
    shape, dtype = shape_dtype(spec)
    bits = re.search(r"\d+", dtype)
    size = _KEYS.get(dtype) or (max(1, int(bits.group()) // 8) if bits else 1)
    return math.prod(shape) * size
