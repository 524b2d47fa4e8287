"""One input of a merge: any elements of any tensor, from wherever its pieces lie.

What lies in the files as it is wanted goes straight into the buffer, neighbours by one request. A
piece of another shape than what is wanted (a run that was restarted on other ranks, or whole
tensors out of sharded ones) is read in one range too, and its runs are put where they belong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptfuse.formats.tensors import Piece, Runs, shared_runs, tensor_bytes
from ckptfuse.layouts import Layout
from ckptfuse.merge.arithmetic import Array, Scratch
from ckptfuse.merge.hashing import LeafHash
from ckptfuse.merge.output_files import Span
from ckptfuse.store import Reader

_BYTES: np.dtype[np.uint8] = np.dtype(np.uint8)


@dataclass(slots=True)
class _Straight:
    """Bytes that are wanted as they lie: from ``start`` of ``file`` to ``at`` of the buffer."""

    file: str
    start: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class Source:
    """One input's open files. No read asks for more than about ``request_size`` bytes."""

    layout: Layout
    readers: Mapping[str, Reader]
    request_size: int

    def read_bytes(self, file: str, start: int, view: memoryview) -> None:
        """Fill ``view`` from ``start`` of a file."""
        self.readers[file].read_into(start, view)

    def read(
        self, spans: Sequence[Span], use: str, scratch: Scratch, hashed: LeafHash | None = None
    ) -> Array:
        """The bytes of these spans' elements, one span after the other, in ``use``'s memory.

        What is read goes through ``hashed`` too.
        """
        lengths = [span.count * _width(span) for span in spans]
        buffer = scratch.take(use, _BYTES, sum(lengths))
        straight: list[_Straight] = []
        at = 0
        for span, length in zip(spans, lengths, strict=True):
            for piece in self.layout.tensors[span.placed.tensor.name].pieces:
                self._plan(span, piece, at, straight, buffer, f"{use}, other", scratch)
            at += length
        for one in straight:
            view = buffer.data[one.at : one.at + one.length]
            self.readers[one.file].read_into(one.start, view)
            if hashed is not None:
                hashed.take(one.file, one.start, view)
        return buffer

    def _plan(
        self,
        span: Span,
        piece: Piece,
        at: int,
        straight: list[_Straight],
        buffer: Array,
        use: str,
        scratch: Scratch,
    ) -> None:
        width = _width(span)
        if piece.box == span.placed.box:
            start = piece.start + span.first * width
            _join(straight, _Straight(piece.file, start, span.count * width, at))
            return
        runs = shared_runs(span.placed.box, piece.box, span.first, span.count)
        if len(runs.here) == 1:
            start = piece.start + int(runs.there[0]) * width
            to = at + (int(runs.here[0]) - span.first) * width
            _join(straight, _Straight(piece.file, start, int(runs.lengths[0]) * width, to))
        elif len(runs.here):
            target = buffer[at : at + span.count * width]
            self._scatter(runs, span.first, piece, width, target, use, scratch)

    def _scatter(
        self,
        runs: Runs,
        first: int,
        piece: Piece,
        width: int,
        target: Array,
        use: str,
        scratch: Scratch,
    ) -> None:
        """Read the range of the piece that holds the runs; in halves while it is too long."""
        begin, end = int(runs.there[0]), int(runs.there[-1] + runs.lengths[-1])
        if (end - begin) * width > self.request_size and len(runs.here) > 1:
            middle = len(runs.here) // 2
            for part in (slice(None, middle), slice(middle, None)):
                half = Runs(runs.here[part], runs.there[part], runs.lengths[part])
                self._scatter(half, first, piece, width, target, use, scratch)
            return
        data = scratch.take(use, _BYTES, (end - begin) * width)
        self.readers[piece.file].read_into(piece.start + begin * width, data.data)
        places = zip(
            ((runs.here - first) * width).tolist(),
            ((runs.there - begin) * width).tolist(),
            (runs.lengths * width).tolist(),
            strict=True,
        )
        for here, there, length in places:
            target[here : here + length] = data[there : there + length]


def _width(span: Span) -> int:
    """Bytes of an element in the inputs."""
    return tensor_bytes(span.placed.tensor.dtype, (1,))


def _join(straight: list[_Straight], one: _Straight) -> None:
    if straight:
        last = straight[-1]
        if (last.file, last.start + last.length, last.at + last.length) == (
            one.file,
            one.start,
            one.at,
        ):
            last.length += one.length
            return
    straight.append(one)
