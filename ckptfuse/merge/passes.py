"""One pass over the inputs: every output file, leaf by leaf, for all weight vectors at once.

::

    output file   |-- leaf 0 --|-- leaf 1 --| ...      8 MiB each, several threads, any order
                        |
    one leaf      |- request -|- request -| ...        the tensors in it, without their borders
                        |            \\_ from each input with a weight: one ranged read
                   blocks -> weighted sums -> rounded into the leaf, one leaf per weight vector
                        |
                   SHA-256 of the leaf, written at its place

Leaves are those of the content hash (digests.py), so the file's hash comes with its bytes.
Memory is bounded by threads x (inputs x request + outputs x leaf), whatever the model's size.
"""

import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ckptfuse import digests
from ckptfuse.checkpoints import Layout
from ckptfuse.errors import ConfigurationError, NonFiniteValues
from ckptfuse.fingerprints import check_unchanged
from ckptfuse.formats.safetensors import Tensor, encode_header, tensor_bytes
from ckptfuse.merge.arithmetic import (
    BLOCK_ELEMENTS,
    DTYPES,
    Array,
    Scratch,
    round_into,
    weighted_sums,
)
from ckptfuse.merge.inputs import COPIED, Inputs
from ckptfuse.store import PartWriter, Reader

#: What the buffers of all threads together may take.
MEMORY = 160 * 1024 * 1024
#: Threads where reads wait for a network; elsewhere one a core.
REMOTE_THREADS = 16


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


class Pass:
    """A pass over ``inputs`` for these weight vectors; a context that holds the input files open.

    Each input with a weight in any vector is read once. When the context ends without an error,
    ChangedCheckpoint is raised if an input was written again during the pass.
    """

    def __init__(
        self,
        inputs: Inputs,
        vectors: Sequence[Sequence[float]],
        *,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        for vector in vectors:
            if len(vector) != len(inputs.layouts):
                raise ConfigurationError(f"{len(vector)} weights for {len(inputs.layouts)} inputs")
        self.inputs = inputs
        self.vectors = vectors
        self._block_elements = block_elements
        self._read = [any(vector[i] for vector in vectors) for i in range(len(inputs.layouts))]
        self._store = inputs.ancillary.checkpoint.store()
        self._local = threading.local()
        self._stack = ExitStack()

    def __enter__(self) -> "Pass":
        self._threads = self._choose_threads()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._threads))
        self._requests_pool = (
            self._stack.enter_context(ThreadPoolExecutor(self._threads * sum(self._read)))
            if self._store.is_remote
            else None
        )
        self._sources = [
            self._open(layout) if wanted else None
            for layout, wanted in zip(self.inputs.layouts, self._read, strict=True)
        ]
        self._ancillary = self._open(self.inputs.ancillary)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            for source in self._sources:
                if source is not None:
                    check_unchanged(source.layout.checkpoint)

    def _open(self, layout: Layout) -> "_Source":
        store = layout.checkpoint.store()
        readers = {file: self._stack.enter_context(store.reader(file)) for file in layout.headers}
        return _Source(layout, readers)

    def _choose_threads(self) -> int:
        each = sum(self._read) * self._store.request_size + len(self.vectors) * digests.LEAF_SIZE
        most = REMOTE_THREADS if self._store.is_remote else len(os.sched_getaffinity(0))
        return max(1, min(most, MEMORY // each))

    def merge_file(self, file: OutputFile, outputs: Sequence[PartWriter]) -> list[str]:
        """Write one file of every vector's merge; returns the content hash of each.

        Raises NonFiniteValues naming checkpoint and tensor.
        """
        leaves: list[list[bytes]] = [[] for _ in outputs]
        pending: deque[Future[list[bytes]]] = deque()
        try:
            for begin in file.leaves:
                pending.append(self._pool.submit(self._merge_leaf, file, begin, outputs))
                if len(pending) > 2 * self._threads:
                    _append(leaves, pending.popleft().result())
            while pending:
                _append(leaves, pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()
        return [digests.tree_digest(digests_of_one) for digests_of_one in leaves]

    def _merge_leaf(
        self, file: OutputFile, begin: int, outputs: Sequence[PartWriter]
    ) -> list[bytes]:
        end = min(begin + digests.LEAF_SIZE, file.size)
        scratch = self._scratch()
        leaves = [
            scratch.take(f"leaf {v}", np.dtype(np.uint8), digests.LEAF_SIZE)[: end - begin]
            for v in range(len(outputs))
        ]
        if begin < len(file.header):
            head = np.frombuffer(file.header[begin:end], np.uint8)
            for leaf in leaves:
                leaf[: len(head)] = head
        for request in self._requests(file.within(begin, end)):
            self._merge_request(request, begin, leaves, scratch)
        hashes = []
        for leaf, output in zip(leaves, outputs, strict=True):
            view = leaf.data
            hashes.append(digests.leaf_digest(view))
            output.write_at(begin, view)
        return hashes

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch

    def _requests(self, spans: Iterator[Span]) -> Iterator[list[Span]]:
        """Groups of spans of one kind that together make a read of about ``request_size``."""
        group: list[Span] = []
        room = self._store.request_size
        for span in spans:
            width = tensor_bytes(span.placed.tensor.dtype, (1,))
            for piece in span.split(max(1, self._store.request_size // width)):
                needed = piece.count * width
                if group and (needed > room or not _alike(piece, group[0])):
                    yield group
                    group, room = [], self._store.request_size
                group.append(piece)
                room -= needed
        if group:
            yield group

    def _merge_request(
        self, spans: list[Span], begin: int, leaves: list[Array], scratch: Scratch
    ) -> None:
        if spans[0].placed.tensor.dtype in COPIED:
            data = self._ancillary.read(spans, "ancillary", scratch)
            _place(spans, data, begin, leaves)
            return
        dtype = DTYPES[spans[0].placed.tensor.dtype]
        parts = self._read_parts(spans, dtype, scratch)
        output = DTYPES[spans[0].placed.dtype]
        count = sum(span.count for span in spans)
        merged = [scratch.take(f"merged {v}", output, count) for v in range(len(leaves))]
        for first in range(0, count, self._block_elements):
            block = slice(first, first + self._block_elements)
            blocks = [None if part is None else part[block] for part in parts]
            sums = weighted_sums(blocks, self.vectors, scratch)
            for result, total in zip(merged, sums, strict=True):
                if not round_into(result[block], total):
                    self._blame(spans, parts, output)
        for result, leaf in zip(merged, leaves, strict=True):
            _place(spans, result.view(np.uint8), begin, [leaf])

    def _read_parts(
        self, spans: list[Span], dtype: np.dtype[np.generic], scratch: Scratch
    ) -> list[Array | None]:
        """The spans' elements from each input; from a network, all inputs at once."""

        def read(i: int) -> Array | None:
            source = self._sources[i]
            return None if source is None else source.read(spans, f"input {i}", scratch).view(dtype)

        spread = self._requests_pool.map if self._requests_pool else map
        return list(spread(read, range(len(self._sources))))

    def _blame(
        self, spans: list[Span], parts: Sequence[Array | None], output: np.dtype[np.generic]
    ) -> None:
        for source, part in zip(self._sources, parts, strict=True):
            if source is not None and part is not None:
                _check_finite(spans, part, source.layout)
        names = ", ".join(repr(span.placed.tensor.name) for span in spans[:3])
        raise NonFiniteValues(
            f"tensor {names}: the merge overflows {output} although every input is "
            "finite; ask for a wider output dtype (fuse.dtype)",
            checkpoint="",
        )


@dataclass(frozen=True, slots=True)
class _Source:
    """One input's open files."""

    layout: Layout
    readers: Mapping[str, Reader]

    def read(self, spans: Sequence[Span], use: str, scratch: Scratch) -> Array:
        """The bytes of these spans, one after the other; neighbours come by one request."""
        runs = _runs([self._range(span) for span in spans])
        size = sum(length for _, _, length in runs)
        buffer = scratch.take(use, np.dtype(np.uint8), size)
        view, position = buffer.data, 0
        for file, start, length in runs:
            self.readers[file].read_into(start, view[position : position + length])
            position += length
        return buffer

    def _range(self, span: Span) -> tuple[str, int, int]:
        tensor = self.layout.tensors[span.placed.tensor.name]
        width = tensor_bytes(tensor.dtype, (1,))
        return tensor.file, tensor.start + span.first * width, span.count * width


def _runs(ranges: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Ranges (file, start, length) in the same order, those that touch made one."""
    runs: list[tuple[str, int, int]] = []
    for file, start, length in ranges:
        if runs and runs[-1][0] == file and runs[-1][1] + runs[-1][2] == start:
            runs[-1] = (file, runs[-1][1], runs[-1][2] + length)
        else:
            runs.append((file, start, length))
    return runs


def _alike(one: Span, other: Span) -> bool:
    a, b = one.placed, other.placed
    return (a.tensor.dtype, a.dtype) == (b.tensor.dtype, b.dtype)


def _place(spans: Sequence[Span], data: Array, begin: int, leaves: Sequence[Array]) -> None:
    """Put the spans' output bytes where they belong in the leaf that begins at ``begin``.

    An element may lie on the border of two leaves: each gets its own part of it.
    """
    position = 0
    for span in spans:
        length = span.count * span.placed.width
        start = span.start - begin
        for leaf in leaves:
            first, stop = max(start, 0), min(start + length, len(leaf))
            leaf[first:stop] = data[position + first - start : position + stop - start]
        position += length


def _check_finite(spans: Sequence[Span], part: Array, layout: Layout) -> None:
    position = 0
    for span in spans:
        values = part[position : position + span.count]
        bad = len(values) - int(np.isfinite(values).sum())
        if bad:
            raise NonFiniteValues(
                f"{layout.checkpoint.uri}: tensor {span.placed.tensor.name!r} has {bad} NaN or "
                f"Inf values among the {span.count} from element {span.first}",
                checkpoint=layout.checkpoint.name,
            )
        position += span.count


def _append(leaves: Sequence[list[bytes]], hashes: Sequence[bytes]) -> None:
    for known, new in zip(leaves, hashes, strict=True):
        known.append(new)
