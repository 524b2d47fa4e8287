"""Where a tensor's bytes lie: in one range of a file, or in pieces over many files.

A sharded trainer writes each tensor as boxes, every rank its own; a box is stored row-major::

    tensor [4, 6]      piece 0: offsets (0, 0), shape (4, 3)      in __0_0.distcp
    +-----+-----+      piece 1: offsets (0, 3), shape (4, 3)      in __1_0.distcp
    |  0  |  1  |
    +-----+-----+      Elements of a box come in the same order as in the tensor, so any run of the
                       tensor's elements is one run of each piece.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Bits per element of every dtype that safetensors 0.8 writes; the names of dtypes everywhere.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; raises KeyError for an unknown dtype."""
    return math.prod(shape) * BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class Box:
    """The elements from ``offsets`` on, ``shape`` of them along each axis."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def is_within(self, shape: Sequence[int]) -> bool:
        return len(self.offsets) == len(self.shape) == len(shape) and all(
            offset >= 0 and length >= 0 and offset + length <= whole
            for offset, length, whole in zip(self.offsets, self.shape, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, stored row-major from byte ``start`` of ``file``."""

    file: str
    start: int
    box: Box


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor and the pieces that together hold each of its elements once."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        """Bytes of all its elements."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def box(self) -> Box:
        return Box((0,) * len(self.shape), self.shape)


def whole_tensor(name: str, dtype: str, shape: tuple[int, ...], file: str, start: int) -> Tensor:
    """A tensor that lies in one piece."""
    return Tensor(name, dtype, shape, (Piece(file, start, Box((0,) * len(shape), shape)),))


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of elements that two boxes share: where each begins in either, and how long it is.

    Elements are counted row-major within each box; both sequences rise.
    """

    here: NDArray[np.int64]
    there: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def elements(self) -> int:
        return int(self.lengths.sum())


def shared_runs(here: Box, there: Box, first: int, count: int) -> Runs:
    """What of elements ``first`` to ``first + count`` of ``here`` also lies in ``there``."""
    if here.shape == ():
        one = np.array([0]), np.array([0]), np.array([1])
        return _cut(*one, first, count)
    low = [max(pair) for pair in zip(here.offsets, there.offsets, strict=True)]
    high = [
        min(a + m, b + n)
        for a, m, b, n in zip(here.offsets, here.shape, there.offsets, there.shape, strict=True)
    ]
    row = max(1, math.prod(here.shape[1:]))  # only the rows that the elements lie in
    low[0] = max(low[0], here.offsets[0] + first // row)
    high[0] = min(high[0], here.offsets[0] - (-(first + count) // row))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        nothing = np.empty(0, np.int64)
        return Runs(nothing, nothing, nothing)
    axis, length = _run(here, there, low, high)
    return _cut(
        _starts(here, low, high, axis), _starts(there, low, high, axis), length, first, count
    )


def _run(here: Box, there: Box, low: list[int], high: list[int]) -> tuple[int, int]:
    """The axis that a run goes along, and its elements: whole rows of both make longer ones."""
    axis = len(low) - 1
    length = high[axis] - low[axis]
    while axis and here.shape[axis] == there.shape[axis] == high[axis] - low[axis]:
        axis -= 1
        length *= high[axis] - low[axis]
    return axis, length


def _starts(box: Box, low: list[int], high: list[int], axis: int) -> NDArray[np.int64]:
    """Where in ``box`` the runs along ``axis`` begin."""
    strides = [math.prod(box.shape[k + 1 :]) for k in range(len(low))]
    base = sum(
        stride * (a - offset) for stride, a, offset in zip(strides, low, box.offsets, strict=True)
    )
    starts = np.array([base], np.int64)
    for k in range(axis):
        steps = strides[k] * np.arange(high[k] - low[k], dtype=np.int64)
        starts = (starts[:, None] + steps).ravel()
    return starts


def _cut(
    here: NDArray[np.int64],
    there: NDArray[np.int64],
    length: int | NDArray[np.int64],
    first: int,
    count: int,
) -> Runs:
    begin, end = np.maximum(here, first), np.minimum(here + length, first + count)
    kept = begin < end
    return Runs(begin[kept], (there + begin - here)[kept], (end - begin)[kept])


def is_partition(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes hold every element of ``shape`` exactly once."""
    if not all(box.is_within(shape) for box in boxes):
        return False
    filled = [box for box in boxes if box.elements]
    if sum(box.elements for box in filled) != math.prod(shape):
        return False
    return _is_grid(filled, shape) or _are_disjoint(filled)


def _is_grid(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether they are the products of intervals that follow each other along every axis."""
    if len({box.offsets for box in boxes}) != len(boxes):
        return False
    cells = 1
    for axis, whole in enumerate(shape):
        intervals = sorted({(box.offsets[axis], box.shape[axis]) for box in boxes})
        cells *= len(intervals)
        position = 0
        for offset, length in intervals:
            if offset != position:
                return False
            position += length
        if boxes and position != whole:
            return False
    return not boxes or cells == len(boxes)


def _are_disjoint(boxes: Sequence[Box]) -> bool:
    low = np.array([box.offsets for box in boxes])
    high = low + np.array([box.shape for box in boxes])
    for i in range(len(boxes) - 1):
        shared = (low[i + 1 :] < high[i]) & (low[i] < high[i + 1 :])
        if bool(shared.all(axis=1).any()):
            return False
    return True
