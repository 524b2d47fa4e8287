"""One request of a merge: some elements, read from every input and summed for every weight vector.

What is read at once is many neighbouring tensors, or part of one: their borders do not matter
where they are alike. The sums are rounded where the output's bytes belong.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptfuse.errors import MismatchedCheckpoints, NonFiniteValues
from ckptfuse.formats.tensors import tensor_bytes
from ckptfuse.layouts import Layout
from ckptfuse.merge.arithmetic import DTYPES, Array, Scratch, round_into, weighted_sums
from ckptfuse.merge.hashing import StretchHash
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import Span
from ckptfuse.merge.sources import Source
from ckptfuse.merge.tally import Tally

#: Calls a function for each input and gives the answers in order: ``map``, or that of a pool.
Spread = Callable[[Callable[[int], Array | None], Iterable[int]], Iterable[Array | None]]


@dataclass(frozen=True, slots=True)
class Requests:
    """What every request of a pass needs.

    ``sources`` are the inputs' open files, None where no vector has a weight; no read asks for
    more than ``size`` bytes.
    """

    inputs: Inputs
    vectors: Sequence[Sequence[float]]
    sources: Sequence[Source | None]
    ancillary: Source
    size: int
    block_elements: int
    spread: Spread

    def of(self, spans: Iterator[Span]) -> Iterator[list[Span]]:
        """Groups of spans of one kind, each but the last of a kind a read of ``size``."""
        group: list[Span] = []
        room = self.size
        for span in spans:
            width = tensor_bytes(span.placed.tensor.dtype, (1,))
            rest: Span | None = span
            while rest is not None:
                if group and (room < width or not self._alike(rest, group[0])):
                    yield group
                    group, room = [], self.size
                piece, rest = rest.cut(max(1, room // width))
                group.append(piece)
                room -= piece.count * width
        if group:
            yield group

    def _alike(self, one: Span, other: Span) -> bool:
        a, b = one.placed, other.placed
        return (a.tensor.dtype, a.dtype) == (b.tensor.dtype, b.dtype) and (
            self._is_copied(one) == self._is_copied(other)
        )

    def _is_copied(self, span: Span) -> bool:
        return span.placed.tensor.name in self.inputs.copied

    def carry_out(
        self,
        spans: list[Span],
        begin: int,
        buffers: list[Array],
        hashes: Mapping[int, StretchHash],
        scratch: Scratch,
    ) -> Tally:
        """Put a request's bytes into each output's buffer, which begins at ``begin`` of the file.

        What is read of an input goes through its hash. Raises NonFiniteValues naming checkpoint and
        tensor.
        """
        carry_out = self._copy if self._is_copied(spans[0]) else self._merge
        return carry_out(spans, begin, buffers, hashes, scratch)

    def _copy(
        self,
        spans: list[Span],
        begin: int,
        buffers: list[Array],
        hashes: Mapping[int, StretchHash],
        scratch: Scratch,
    ) -> Tally:
        started = time.perf_counter()
        newest = self._read_newest(spans, hashes, scratch)
        seconds = time.perf_counter() - started
        for buffer in buffers:
            _place(spans, newest, begin, buffer)
        return Tally(read=newest.nbytes, reading=seconds)

    def _merge(
        self,
        spans: list[Span],
        begin: int,
        buffers: list[Array],
        hashes: Mapping[int, StretchHash],
        scratch: Scratch,
    ) -> Tally:
        started = time.perf_counter()
        parts = self._read_inputs(spans, hashes, scratch)
        was_read = time.perf_counter()
        self._sum(spans, parts, begin, buffers, scratch)
        return Tally(
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

    def _sum(
        self,
        spans: list[Span],
        parts: Sequence[Array | None],
        begin: int,
        buffers: list[Array],
        scratch: Scratch,
    ) -> None:
        """Round the weighted sums into their place, or, where that is several, put them there."""
        dtype = DTYPES[spans[0].placed.dtype]
        read = DTYPES[spans[0].placed.tensor.dtype]
        given = [None if part is None else part.view(read) for part in parts]
        count = sum(span.count for span in spans)
        place = _one_place(spans, begin, len(buffers[0]))
        merged = [
            buffer[place].view(dtype) if place else scratch.take(f"merged {v}", dtype, count)
            for v, buffer in enumerate(buffers)
        ]
        with np.errstate(over="ignore", invalid="ignore"):  # the answer of round_into says it
            for first in range(0, count, self.block_elements):
                block = slice(first, first + self.block_elements)
                blocks = [None if part is None else part[block] for part in given]
                sums = weighted_sums(blocks, self.vectors, scratch)
                for result, total in zip(merged, sums, strict=True):
                    if not round_into(result[block], total):
                        self._blame(spans, given, first, result[block])
        if place is None:
            for buffer, result in zip(buffers, merged, strict=True):
                _place(spans, result.view(np.uint8), begin, buffer)

    def _blame(
        self, spans: list[Span], parts: Sequence[Array | None], first: int, result: Array
    ) -> None:
        """Raise NonFiniteValues: ``result``, elements from ``first`` on, holds NaN or Inf."""
        for source, part in zip(self.sources, parts, strict=True):
            if source is not None and part is not None:
                _check_finite(spans, part, source.layout)
        at = first + int(np.flatnonzero(~np.isfinite(result))[0])
        ends = np.cumsum([span.count for span in spans])
        span = spans[int(np.searchsorted(ends, at, side="right"))]
        raise NonFiniteValues(
            f"tensor {_names([span])}: the merge overflows {result.dtype} although every input is "
            "finite; ask for a wider output dtype (fuse.dtype)",
            checkpoint="",
        )


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
