"""The arithmetic of a merge, on one block of elements at a time.

Per element: input to float32 (float64 for float64 inputs), times the weight rounded to that type,
added without fused multiply-add, oldest first, zero weights skipped, one round-to-nearest-even at
the end. NumPy's ufuncs do one operation a call, so nothing can be fused, and the bytes depend on
no thread count, block size or CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

#: The dtypes that are merged, by their names in safetensors.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

#: Elements of a block. Its float32 sums stay in the second-level cache, and one NumPy call takes
#: long enough that threads do not queue for the interpreter (a quarter of it scaled to 1.0 cores).
BLOCK_ELEMENTS = 256 * 1024

Array = NDArray[Any]


class Scratch:
    """One thread's working memory: blocks of the wide type, made once and used again."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, np.dtype[Any]], Array] = {}

    def take(self, use: str, dtype: np.dtype[Any], count: int) -> Array:
        """``count`` uninitialised elements that are ``use``'s until it takes them again."""
        array = self._arrays.get((use, dtype))
        if array is None or len(array) < count:
            array = self._arrays[use, dtype] = np.empty(count, dtype)
        return array[:count]


def wide_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that a dtype is summed in."""
    return DTYPES["F64"] if dtype == DTYPES["F64"] else DTYPES["F32"]


def weighted_sums(
    parts: Sequence[Array | None], vectors: Sequence[Sequence[float]], scratch: Scratch
) -> Iterator[Array]:
    """For each weight vector in turn the sum of parts x weight, in the wide type, first part first.

    ``parts`` are flat arrays of one length and dtype; None where no vector has a weight. A sum is
    scratch memory: it is gone when the next one is asked for.
    """
    given = next(part for part in parts if part is not None)
    dtype, count = wide_dtype(given.dtype), len(given)
    total, product = (scratch.take(use, dtype, count) for use in ("total", "product"))
    if len(vectors) > 1:  # once for all of them; for one, in the cache, when it is used
        parts = [
            part if part is None else _widened(part, scratch.take(f"widened {i}", dtype, count))
            for i, part in enumerate(parts)
        ]
    for vector in vectors:  # one sum at a time stays in the cache, however many there are
        terms = (
            (part, dtype.type(weight))
            for part, weight in zip(parts, vector, strict=True)
            if part is not None and weight
        )
        oldest, weight = next(terms)
        np.multiply(_widened(oldest, total), weight, out=total)  # 0 + -0 would lose the sign
        for part, weight in terms:
            np.add(total, np.multiply(_widened(part, product), weight, out=product), out=total)
        yield total


def _widened(part: Array, to: Array) -> Array:
    """A part in the wide type of ``to``, where it is put unless it is of that type."""
    if part.dtype == to.dtype:
        return part
    np.copyto(to, part)
    return to


def round_into(output: Array, total: Array) -> bool:
    """Round sums to ``output``'s dtype, to nearest, ties to even; False unless all are finite."""
    if total.dtype == np.float64 and output.dtype == DTYPES["BF16"]:
        total = _to_odd_float32(total)  # a cast by way of float32 would round twice
    np.copyto(output, total, casting="unsafe")
    return _is_finite(output)


def _is_finite(values: Array) -> bool:
    """No NaN or Inf: no bit pattern from infinity's on, in either sign."""
    width = values.dtype.itemsize
    infinities = np.array([np.inf, -np.inf]).astype(values.dtype)
    positive, _ = infinities.view(f"i{width}")
    _, negative = infinities.view(f"u{width}")
    largest = values.view(f"i{width}").max(), values.view(f"u{width}").max()
    return bool(largest[0] < positive and largest[1] < negative)


def _to_odd_float32(values: Array) -> Array:
    """float64 cut to float32, the last bit set where anything was cut: safe to round once more."""
    near = values.astype(np.float32)
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = near.view(np.uint32)
    bits -= away  # sign and magnitude: one step towards zero
    bits |= near.astype(np.float64) != values
    return near
