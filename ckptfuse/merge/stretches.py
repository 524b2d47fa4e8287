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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckptfuse import digests
from ckptfuse.merge.arithmetic import Array, Scratch
from ckptfuse.merge.hashing import StretchHash
from ckptfuse.merge.output_files import OutputFile
from ckptfuse.merge.requests import Requests
from ckptfuse.merge.sources import Source
from ckptfuse.merge.tally import Tally
from ckptfuse.store import PartWriter

#: Most that is read at once of what is hashed but not merged: headers, other archives.
UNMERGED = 2 * 1024 * 1024
_BYTES: np.dtype[np.uint8] = np.dtype(np.uint8)


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


def merge_stretch(
    stretch: Stretch,
    requests: Requests,
    outputs: Sequence[PartWriter],
    hashed: Sequence[int],
    worker: Worker,
) -> LeafDigests:
    """Write one stretch of each output; the bytes of the inputs ``hashed`` are hashed too.

    Raises NonFiniteValues naming checkpoint and tensor.
    """
    size = stretch.end - stretch.begin
    buffers = [worker.scratch.take(f"output {v}", _BYTES, size) for v in range(len(outputs))]
    header = np.frombuffer(stretch.file.header[stretch.begin : stretch.end], np.uint8)
    for buffer in buffers:
        buffer[: len(header)] = header
    worker.tally += _copy_segments(stretch, requests.ancillary, buffers)
    hashes = {i: _input_hash(stretch, requests, i, worker.scratch) for i in hashed}
    for spans in requests.of(stretch.file.within(stretch.begin, stretch.end)):
        worker.tally += requests.carry_out(spans, stretch.begin, buffers, hashes, worker.scratch)
    inputs = {i: found.leaves() for i, found in hashes.items()}
    return LeafDigests(_write(stretch, buffers, outputs, worker), inputs)


def _copy_segments(stretch: Stretch, newest: Source, buffers: list[Array]) -> Tally:
    started = time.perf_counter()
    size = 0
    for segment in stretch.file.copied_within(stretch.begin, stretch.end):
        start = segment.start - stretch.begin
        part = slice(start, start + segment.length)
        newest.read_bytes(segment.file, segment.file_start, buffers[0][part].data)
        for buffer in buffers[1:]:
            buffer[part] = buffers[0][part]
        size += segment.length
    return Tally(read=size, reading=time.perf_counter() - started)


def _input_hash(stretch: Stretch, requests: Requests, i: int, scratch: Scratch) -> StretchHash:
    source = requests.sources[i]
    assert source is not None
    name = stretch.file.name
    buffer = scratch.take(f"unmerged {i}", _BYTES, min(requests.size, UNMERGED))
    return StretchHash(name, source.readers[name], stretch.begin, stretch.end, buffer.data)


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
