"""One stretch of an output file, for all weight vectors at once.

::

    output file   |-- leaf --|-- leaf --|-- leaf --|-- leaf --| ...   8 MiB each
                  |------ stretch ------|
                        |
    one stretch   |- request -|- request -| ...      the tensors in it, without their borders
                        |            \\_ from each input with a weight: one ranged read
                   blocks -> weighted sums -> rounded in their place, one buffer per weight vector
                        |
                   SHA-256 of each leaf, written at its place

Leaves are those of the content hash (digests.py), so the file's hash comes with its bytes.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptfuse import digests
from ckptfuse.errors import MismatchedCheckpoints, NonFiniteValues
from ckptfuse.formats.tensors import tensor_bytes
from ckptfuse.layouts import Layout
from ckptfuse.merge.arithmetic import DTYPES, Array, Scratch, round_into, weighted_sums
from ckptfuse.merge.hashing import StretchHash
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import OutputFile, Span
from ckptfuse.merge.sources import Source
from ckptfuse.merge.tally import Tally
from ckptfuse.store import PartWriter

#: Most that is read at once of what is hashed but not merged: headers, other archives.
UNMERGED = 2 * 1024 * 1024
_BYTES: np.dtype[np.uint8] = np.dtype(np.uint8)

#: Calls a function for each input and gives the answers in order: ``map``, or that of a pool.
Spread = Callable[[Callable[[int], Array | None], Iterable[int]], Iterable[Array | None]]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring leaves of an output file: its bytes from ``begin`` to ``end``."""

    file: OutputFile
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class LeafDigests:
    """Digests of a stretch's leaves: of each output, and of each input that is hashed."""

    outputs: list[list[bytes]]
    inputs: dict[int, list[bytes]]


class Worker:
    """One thread's working memory and what it did so far."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self.tally = Tally()

    def buffers(self, use: str, count: int, size: int) -> list[Array]:
        return [self.scratch.take(f"{use} {number}", _BYTES, size) for number in range(count)]


@dataclass(frozen=True, slots=True)
class StretchMerger:
    """Merges stretches, each with the memory of the thread that asks.

    ``sources`` are the inputs' open files, None where no vector has a weight; no read asks for
    more than ``request_size`` bytes.
    """

    inputs: Inputs
    vectors: Sequence[Sequence[float]]
    sources: Sequence[Source | None]
    ancillary: Source
    request_size: int
    block_elements: int
    spread: Spread

    def merge(
        self,
        stretch: Stretch,
        outputs: Sequence[PartWriter],
        hashed: Sequence[int],
        worker: Worker,
    ) -> LeafDigests:
        """Write one stretch of each output; the bytes of the inputs ``hashed`` are hashed too.

        Raises NonFiniteValues naming checkpoint and tensor.
        """
        buffers = worker.buffers("output", len(outputs), stretch.end - stretch.begin)
        header = np.frombuffer(stretch.file.header[stretch.begin : stretch.end], np.uint8)
        for buffer in buffers:
            buffer[: len(header)] = header
        self._copy_segments(stretch, buffers, worker)
        hashes = self._input_hashes(stretch, hashed, worker)
        for spans in self._requests(stretch.file.within(stretch.begin, stretch.end)):
            carry_out = self._copy_request if self._is_copied(spans[0]) else self._merge_request
            carry_out(spans, stretch.begin, buffers, hashes, worker)
        inputs = {i: found.leaves() for i, found in hashes.items()}
        return LeafDigests(_write(stretch, buffers, outputs, worker), inputs)

    def _copy_segments(self, stretch: Stretch, buffers: list[Array], worker: Worker) -> None:
        started = time.perf_counter()
        size = 0
        for segment in stretch.file.copied_within(stretch.begin, stretch.end):
            start = segment.start - stretch.begin
            part = slice(start, start + segment.length)
            self.ancillary.read_bytes(segment.file, segment.file_start, buffers[0][part].data)
            for buffer in buffers[1:]:
                buffer[part] = buffers[0][part]
            size += segment.length
        worker.tally += Tally(read=size, reading=time.perf_counter() - started)

    def _input_hashes(
        self, stretch: Stretch, hashed: Sequence[int], worker: Worker
    ) -> dict[int, StretchHash]:
        hashes = {}
        name = stretch.file.name
        for i in hashed:
            source = self.sources[i]
            assert source is not None
            size = min(self.request_size, UNMERGED)
            buffer = worker.scratch.take(f"unmerged {i}", _BYTES, size)
            reader = source.readers[name]
            hashes[i] = StretchHash(name, reader, stretch.begin, stretch.end, buffer.data)
        return hashes

    def _requests(self, spans: Iterator[Span]) -> Iterator[list[Span]]:
        """Groups of spans of one kind that together make a read of about ``request_size``."""
        group: list[Span] = []
        room = self.request_size
        for span in spans:
            width = tensor_bytes(span.placed.tensor.dtype, (1,))
            for piece in span.split(max(1, self.request_size // width)):
                needed = piece.count * width
                if group and (needed > room or not self._alike(piece, group[0])):
                    yield group
                    group, room = [], self.request_size
                group.append(piece)
                room -= needed
        if group:
            yield group

    def _alike(self, one: Span, other: Span) -> bool:
        a, b = one.placed, other.placed
        return (a.tensor.dtype, a.dtype) == (b.tensor.dtype, b.dtype) and (
            self._is_copied(one) == self._is_copied(other)
        )

    def _is_copied(self, span: Span) -> bool:
        return span.placed.tensor.name in self.inputs.copied

    def _copy_request(
        self,
        spans: list[Span],
        begin: int,
        buffers: list[Array],
        hashes: Mapping[int, StretchHash],
        worker: Worker,
    ) -> None:
        started = time.perf_counter()
        newest = self._read_newest(spans, hashes, worker.scratch)
        worker.tally += Tally(read=newest.nbytes, reading=time.perf_counter() - started)
        for buffer in buffers:
            _place(spans, newest, begin, buffer)

    def _merge_request(
        self,
        spans: list[Span],
        begin: int,
        buffers: list[Array],
        hashes: Mapping[int, StretchHash],
        worker: Worker,
    ) -> None:
        started = time.perf_counter()
        parts = self._read_inputs(spans, hashes, worker.scratch)
        was_read = time.perf_counter()
        self._merge_spans(spans, parts, begin, buffers, worker.scratch)
        worker.tally += Tally(
            read=sum(part.nbytes for part in parts if part is not None),
            reading=was_read - started,
            adding=time.perf_counter() - was_read,
        )

    def _read_inputs(
        self, spans: list[Span], hashes: Mapping[int, StretchHash], scratch: Scratch
    ) -> list[Array | None]:
        """The bytes of the spans' elements in each input; None without a weight."""

        def read(i: int) -> Array | None:
            source = self.sources[i]
            if source is None:
                return None
            return source.read(spans, f"input {i}", scratch, hashes.get(i))

        return list(self.spread(read, range(len(self.sources))))

    def _read_newest(
        self, spans: list[Span], hashes: Mapping[int, StretchHash], scratch: Scratch
    ) -> Array:
        """What is copied; with ``strict``, MismatchedCheckpoints where an input differs from it."""
        parts = self._read_inputs(spans, hashes, scratch) if self.inputs.recipe.strict else []
        newest = self.ancillary.read(spans, "ancillary", scratch)
        for source, part in zip(self.sources, parts, strict=False):
            if source is not None and part is not None and not np.array_equal(part, newest):
                raise MismatchedCheckpoints(
                    f"tensor {_names(spans)}: not merged but copied from the newest checkpoint, "
                    f"and different in {source.layout.checkpoint.uri}; without strict it is copied"
                )
        return newest

    def _merge_spans(
        self,
        spans: list[Span],
        parts: Sequence[Array | None],
        begin: int,
        buffers: list[Array],
        scratch: Scratch,
    ) -> None:
        """Put the spans' merge into each output's buffer, which begins at ``begin`` of the file."""
        dtype = DTYPES[spans[0].placed.dtype]
        read = DTYPES[spans[0].placed.tensor.dtype]
        given = [None if part is None else part.view(read) for part in parts]
        count = sum(span.count for span in spans)
        place = _one_place(spans, begin, len(buffers[0]))
        merged = [
            buffer[place].view(dtype) if place else scratch.take(f"merged {v}", dtype, count)
            for v, buffer in enumerate(buffers)
        ]
        for first in range(0, count, self.block_elements):
            block = slice(first, first + self.block_elements)
            blocks = [None if part is None else part[block] for part in given]
            sums = weighted_sums(blocks, self.vectors, scratch)
            for result, total in zip(merged, sums, strict=True):
                if not round_into(result[block], total):
                    self._blame(spans, given, dtype)
        if place is None:
            for buffer, result in zip(buffers, merged, strict=True):
                _place(spans, result.view(np.uint8), begin, buffer)

    def _blame(
        self, spans: list[Span], parts: Sequence[Array | None], output: np.dtype[np.generic]
    ) -> None:
        for source, part in zip(self.sources, parts, strict=True):
            if source is not None and part is not None:
                _check_finite(spans, part, source.layout)
        raise NonFiniteValues(
            f"tensor {_names(spans)}: the merge overflows {output} although every input is "
            "finite; ask for a wider output dtype (fuse.dtype)",
            checkpoint="",
        )


def _write(
    stretch: Stretch, buffers: list[Array], outputs: Sequence[PartWriter], worker: Worker
) -> list[list[bytes]]:
    """Hash each output's leaves and write them at their places."""
    started = time.perf_counter()
    size = stretch.end - stretch.begin
    hashes: list[list[bytes]] = [[] for _ in outputs]
    for found, buffer, output in zip(hashes, buffers, outputs, strict=True):
        for start in range(0, size, digests.LEAF_SIZE):
            leaf = buffer[start : start + digests.LEAF_SIZE].data
            found.append(digests.leaf_digest(leaf))
            output.write_at(stretch.begin + start, leaf)
    written = len(outputs) * size
    worker.tally += Tally(written=written, writing=time.perf_counter() - started)
    return hashes


def _one_place(spans: Sequence[Span], begin: int, size: int) -> slice | None:
    """Where in a buffer of ``size`` bytes from ``begin`` on the spans lie, if they do in one."""
    start = position = spans[0].start - begin
    for span in spans:
        if span.start - begin != position:
            return None
        position += span.count * span.placed.width
    return slice(start, position) if start >= 0 and position <= size else None


def _place(spans: Sequence[Span], data: Array, begin: int, buffer: Array) -> None:
    """Put the spans' output bytes where they belong in the buffer that begins at ``begin``.

    An element may lie on the border of two stretches: each gets its own part of it.
    """
    position = 0
    for span in spans:
        length = span.count * span.placed.width
        start = span.start - begin
        first, stop = max(start, 0), min(start + length, len(buffer))
        buffer[first:stop] = data[position + first - start : position + stop - start]
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


def _names(spans: Sequence[Span]) -> str:
    return ", ".join(repr(span.placed.tensor.name) for span in spans[:3])
