"""What a merge's weight files hold, before a byte is computed: headers, tensors, places."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ckptfuse import digests
from ckptfuse.formats.safetensors import Tensor, encode_header, tensor_bytes
from ckptfuse.merge.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of the output: ``tensor`` is the ancillary source's, ``start`` its first byte."""

    tensor: Tensor
    dtype: str
    start: int
    length: int

    @property
    def width(self) -> int:
        """Bytes of an element; every dtype that is merged or copied has whole ones."""
        return tensor_bytes(self.dtype, (1,))


@dataclass(frozen=True)
class OutputFile:
    """One weight file of a merge: its header's bytes, and its tensors in the order of theirs."""

    name: str
    header: bytes
    placed: tuple[Placed, ...]

    @property
    def size(self) -> int:
        return self.placed[-1].start + self.placed[-1].length if self.placed else len(self.header)

    @property
    def leaves(self) -> range:
        return range(0, self.size, digests.LEAF_SIZE)

    def within(self, begin: int, end: int) -> Iterator["Span"]:
        """The elements that have bytes from ``begin`` to ``end``."""
        for placed in self._overlapping(begin, end):
            first = max(begin - placed.start, 0) // placed.width
            stop = -(-(min(end - placed.start, placed.length)) // placed.width)
            yield Span(placed, first, stop - first)

    def _overlapping(self, begin: int, end: int) -> Iterator[Placed]:
        index = max(bisect_right(self._starts, begin) - 1, 0)
        for placed in self.placed[index:]:
            if placed.start >= end:
                return
            if placed.length and placed.start + placed.length > begin:
                yield placed

    @cached_property
    def _starts(self) -> list[int]:
        return [placed.start for placed in self.placed]


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` elements of one tensor from element ``first``."""

    placed: Placed
    first: int
    count: int

    @property
    def start(self) -> int:
        """Its first byte in the output file."""
        return self.placed.start + self.first * self.placed.width

    def split(self, count: int) -> Iterator["Span"]:
        for offset in range(0, self.count, count):
            yield Span(self.placed, self.first + offset, min(count, self.count - offset))


def output_files(inputs: Inputs) -> list[OutputFile]:
    """The merge's weight files: the ancillary source's, in the output's dtype."""
    files = []
    for name, header in inputs.ancillary.headers.items():
        entries = [(t.name, inputs.output_dtype(t), t.shape) for t in header.tensors]
        start = encode_header(entries, header.metadata)
        placed, position = [], len(start)
        for tensor, (_, dtype, shape) in zip(header.tensors, entries, strict=True):
            length = tensor_bytes(dtype, shape)
            placed.append(Placed(tensor, dtype, position, length))
            position += length
        files.append(OutputFile(name, start, tuple(placed)))
    return files
