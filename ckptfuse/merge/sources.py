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
from ckptfuse.merge.hashing import StretchHash
from ckptfuse.merge.output_files import Span
from ckptfuse.store import Reader

_BYTES: np.dtype[np.uint8] = np.dtype(np.uint8)


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
        self, spans: Sequence[Span], use: str, scratch: Scratch, hashed: StretchHash | None = None
    ) -> Array:
        """The bytes of these spans' elements, one span after the other, in ``use``'s memory.

        What is read goes through ``hashed`` too.
        """
        buffer = scratch.take(use, _BYTES, sum(span.count * _width(span) for span in spans))
        straight: list[_Straight] = []
        at = 0
        for span in spans:
            length = span.count * _width(span)
            target = _Target(span, buffer[at : at + length], at)
            for piece in self.layout.tensors[span.placed.tensor.name].pieces:
                runs = target.runs_of(piece)
                if len(runs.here) == 1:
                    _join(straight, target.straight(piece, runs))
                elif len(runs.here):
                    self._scatter(target, piece, runs, f"{use}, other", scratch)
            at += length
        for one in straight:
            view = buffer.data[one.at : one.at + one.length]
            self.readers[one.file].read_into(one.start, view)
            if hashed is not None:
                hashed.take(one.file, one.start, view)
        return buffer

    def _scatter(
        self, target: "_Target", piece: Piece, runs: Runs, use: str, scratch: Scratch
    ) -> None:
        """Read the range of the piece that holds the runs; in halves while it is too long."""
        begin, end = int(runs.there[0]), int(runs.there[-1] + runs.lengths[-1])
        if (end - begin) * target.width > self.request_size and len(runs.here) > 1:
            middle = len(runs.here) // 2
            for part in (slice(None, middle), slice(middle, None)):
                half = Runs(runs.here[part], runs.there[part], runs.lengths[part])
                self._scatter(target, piece, half, use, scratch)
            return
        data = scratch.take(use, _BYTES, (end - begin) * target.width)
        self.readers[piece.file].read_into(piece.start + begin * target.width, data.data)
        target.put(runs, begin, data)


@dataclass(slots=True)
class _Straight:
    """Bytes that are wanted as they lie: from ``start`` of ``file`` to ``at`` of the buffer."""

    file: str
    start: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a span's elements go: ``view`` is its part of the buffer, which begins at ``at``."""

    span: Span
    view: Array
    at: int

    @property
    def width(self) -> int:
        return _width(self.span)

    def runs_of(self, piece: Piece) -> Runs:
        """What of the span lies in a piece: as a rule, all of it in one run."""
        span = self.span
        if piece.box == span.placed.box:
            return Runs(np.array([span.first]), np.array([span.first]), np.array([span.count]))
        return shared_runs(span.placed.box, piece.box, span.first, span.count)

    def straight(self, piece: Piece, runs: Runs) -> _Straight:
        there, length = int(runs.there[0]) * self.width, int(runs.lengths[0]) * self.width
        to = self.at + (int(runs.here[0]) - self.span.first) * self.width
        return _Straight(piece.file, piece.start + there, length, to)

    def put(self, runs: Runs, begin: int, data: Array) -> None:
        """Copy runs out of ``data``, which holds the piece from its element ``begin`` on."""
        places = zip(
            ((runs.here - self.span.first) * self.width).tolist(),
            ((runs.there - begin) * self.width).tolist(),
            (runs.lengths * self.width).tolist(),
            strict=True,
        )
        for here, there, length in places:
            self.view[here : here + length] = data[there : there + length]


def _width(span: Span) -> int:
    """Bytes of an element in the inputs."""
    return tensor_bytes(span.placed.tensor.dtype, (1,))


def _join(straight: list[_Straight], one: _Straight) -> None:
    """Add a read, or make the last one longer where this goes on behind it in file and buffer."""
    last = straight[-1] if straight else None
    if (
        last is not None
        and last.file == one.file
        and last.start + last.length == one.start
        and last.at + last.length == one.at
    ):
        last.length += one.length
    else:
        straight.append(one)
