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
import resource
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ckptfuse import digests
from ckptfuse.errors import ConfigurationError, MismatchedCheckpoints, NonFiniteValues
from ckptfuse.fingerprints import check_unchanged
from ckptfuse.formats.tensors import tensor_bytes
from ckptfuse.layouts import Layout
from ckptfuse.merge.arithmetic import (
    BLOCK_ELEMENTS,
    DTYPES,
    Array,
    Scratch,
    round_into,
    weighted_sums,
)
from ckptfuse.merge.hashing import InputHashes, LeafHash
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import OutputFile, Span, output_files
from ckptfuse.merge.sources import Source
from ckptfuse.merge.tally import Progress, Tally, ignore
from ckptfuse.store import PartWriter

#: What the buffers of all threads together may take.
MEMORY = 160 * 1024 * 1024
#: Most that is read at once of what is hashed but not merged: headers, other archives.
UNMERGED = 2 * 1024 * 1024
SMALLEST_REQUEST = 256 * 1024
#: Threads where reads wait for a network; elsewhere one a core.
REMOTE_THREADS = 16


@dataclass(frozen=True, slots=True)
class _LeafDigests:
    """Digests of one leaf: of each output, and of each input that is hashed."""

    outputs: list[bytes]
    inputs: dict[int, bytes]


class _Worker:
    """One thread's working memory and what it did so far."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self.tally = Tally()


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
        only: Collection[str] | None = None,
        hashes: InputHashes | None = None,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        for vector in vectors:
            if len(vector) != len(inputs.layouts):
                raise ConfigurationError(f"{len(vector)} weights for {len(inputs.layouts)} inputs")
        self.inputs = inputs
        self.vectors = vectors
        self.hashes = hashes
        self.files = [f for f in output_files(inputs) if only is None or f.name in only]
        self.size = len(vectors) * sum(file.size for file in self.files)
        self._block_elements = block_elements
        self._read = [any(vector[i] for vector in vectors) for i in range(len(inputs.layouts))]
        self._store = inputs.ancillary.checkpoint.store()
        self._request_size = self._choose_request_size()
        self._threads = self._choose_threads()
        self._workers: list[_Worker] = []
        self._local = threading.local()
        self._stack = ExitStack()

    def __enter__(self) -> "Pass":
        self._started = time.perf_counter()
        self._sources = [
            self._open(layout) if wanted else None
            for layout, wanted in zip(self.inputs.layouts, self._read, strict=True)
        ]
        self._ancillary = self._open(self.inputs.ancillary)
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._threads))
        self._requests_pool = (
            self._stack.enter_context(ThreadPoolExecutor(self._threads * sum(self._read)))
            if self._store.is_remote
            else None
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            for source in self._sources:
                if source is not None:
                    check_unchanged(source.layout.checkpoint)

    def _open(self, layout: Layout) -> Source:
        store = layout.checkpoint.store()
        files = dict.fromkeys([*layout.files, *layout.item_files])
        _allow_open_files(len(files) * (2 + len(self._read)))
        readers = {file: self._stack.enter_context(store.reader(file)) for file in files}
        return Source(layout, readers, self._request_size)

    def _choose_request_size(self) -> int:
        """That of the store, or less where two threads would not have room for it."""
        room = MEMORY // 2 - len(self.vectors) * digests.LEAF_SIZE
        return min(self._store.request_size, max(SMALLEST_REQUEST, room // max(1, sum(self._read))))

    def _choose_threads(self) -> int:
        each = sum(self._read) * self._request_size + len(self.vectors) * digests.LEAF_SIZE
        most = REMOTE_THREADS if self._store.is_remote else len(os.sched_getaffinity(0))
        return max(1, min(most, MEMORY // each))

    @property
    def tally(self) -> Tally:
        """What was done so far."""
        since = Tally(seconds=time.perf_counter() - self._started)
        return sum((worker.tally for worker in self._workers), start=since)

    def merge_file(
        self,
        file: OutputFile,
        outputs: Sequence[PartWriter],
        progress: Progress = ignore,
    ) -> list[str]:
        """Write one file of every vector's merge; returns the content hash of each.

        ``progress`` is called about once a leaf. Raises NonFiniteValues
        naming checkpoint and tensor.
        """
        aligned = self._hashed_inputs(file)
        hashes: list[_LeafDigests] = []
        pending: deque[Future[_LeafDigests]] = deque()
        try:
            for begin in file.leaves:
                pending.append(self._pool.submit(self._merge_leaf, file, begin, outputs, aligned))
                if len(pending) > 2 * self._threads:
                    hashes.append(pending[0].result())
                    pending.popleft()
                    progress(self.tally, self.size)
            hashes += [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()
            wait(pending)  # no thread may write after its output was closed
        progress(self.tally, self.size)
        if self.hashes is not None:
            self.hashes.add(file, {i: [leaf.inputs[i] for leaf in hashes] for i in aligned})
        written = zip(*(leaf.outputs for leaf in hashes), strict=True)
        return [digests.tree_digest(leaves) for leaves in written]

    def _hashed_inputs(self, file: OutputFile) -> list[int]:
        """The inputs whose bytes of this file are to be hashed on the way."""
        if self.hashes is None:
            return []
        return [i for i in self.hashes.aligned(file) if self._sources[i] is not None]

    def _leaf_hashes(
        self, file: str, begin: int, end: int, aligned: Sequence[int], scratch: Scratch
    ) -> dict[int, LeafHash]:
        hashes = {}
        for i in aligned:
            source = self._sources[i]
            assert source is not None
            size = min(self._request_size, UNMERGED)
            buffer = scratch.take(f"unmerged {i}", np.dtype(np.uint8), size)
            hashes[i] = LeafHash(file, source.readers[file], begin, end, buffer.data)
        return hashes

    def _merge_leaf(
        self, file: OutputFile, begin: int, outputs: Sequence[PartWriter], aligned: Sequence[int]
    ) -> "_LeafDigests":
        end = min(begin + digests.LEAF_SIZE, file.size)
        worker = self._worker()
        leaves = [
            worker.scratch.take(f"leaf {v}", np.dtype(np.uint8), digests.LEAF_SIZE)[: end - begin]
            for v in range(len(outputs))
        ]
        if begin < len(file.header):
            head = np.frombuffer(file.header[begin:end], np.uint8)
            for leaf in leaves:
                leaf[: len(head)] = head
        self._copy_segments(file, begin, end, leaves, worker)
        read = self._leaf_hashes(file.name, begin, end, aligned, worker.scratch)
        for request in self._requests(file.within(begin, end)):
            self._merge_request(request, begin, leaves, worker, read)
        ended = {i: found.digest() for i, found in read.items()}
        started = time.perf_counter()
        hashes = []
        for leaf, output in zip(leaves, outputs, strict=True):
            view = leaf.data
            hashes.append(digests.leaf_digest(view))
            output.write_at(begin, view)
        worker.tally += Tally(
            written=len(leaves) * (end - begin), writing=time.perf_counter() - started
        )
        return _LeafDigests(hashes, ended)

    def _copy_segments(
        self, file: OutputFile, begin: int, end: int, leaves: list[Array], worker: _Worker
    ) -> None:
        started = time.perf_counter()
        size = 0
        for segment in file.copied_within(begin, end):
            part = slice(segment.start - begin, segment.start - begin + segment.length)
            self._ancillary.read_bytes(segment.file, segment.file_start, leaves[0][part].data)
            for leaf in leaves[1:]:
                leaf[part] = leaves[0][part]
            size += segment.length
        worker.tally += Tally(read=size, reading=time.perf_counter() - started)

    def _worker(self) -> _Worker:
        if not hasattr(self._local, "worker"):
            self._local.worker = _Worker()
            self._workers.append(self._local.worker)
        worker: _Worker = self._local.worker
        return worker

    def _requests(self, spans: Iterator[Span]) -> Iterator[list[Span]]:
        """Groups of spans of one kind that together make a read of about ``request_size``."""
        group: list[Span] = []
        room = self._request_size
        for span in spans:
            width = tensor_bytes(span.placed.tensor.dtype, (1,))
            for piece in span.split(max(1, self._request_size // width)):
                needed = piece.count * width
                if group and (needed > room or not self._alike(piece, group[0])):
                    yield group
                    group, room = [], self._request_size
                group.append(piece)
                room -= needed
        if group:
            yield group

    def _merge_request(
        self,
        spans: list[Span],
        begin: int,
        leaves: list[Array],
        worker: _Worker,
        hashes: Mapping[int, LeafHash],
    ) -> None:
        started = time.perf_counter()
        parts = self._read_parts(spans, worker.scratch, hashes)
        was_read = time.perf_counter()
        for leaf, result in zip(leaves, self._merged(spans, parts, worker.scratch), strict=True):
            _place(spans, result.view(np.uint8), begin, leaf)
        worker.tally += Tally(
            read=sum(part.nbytes for part in parts if part is not None),
            reading=was_read - started,
            adding=time.perf_counter() - was_read,
        )

    def _alike(self, one: Span, other: Span) -> bool:
        a, b = one.placed, other.placed
        return (a.tensor.dtype, a.dtype) == (b.tensor.dtype, b.dtype) and (
            self._is_copied(one) == self._is_copied(other)
        )

    def _is_copied(self, span: Span) -> bool:
        return span.placed.tensor.name in self.inputs.copied

    def _read_parts(
        self, spans: list[Span], scratch: Scratch, hashes: Mapping[int, LeafHash]
    ) -> list[Array | None]:
        """The spans' elements from each input, or from the ancillary source if they are copied.

        From a network, all inputs at once.
        """
        copied = self._is_copied(spans[0])
        if copied and not self.inputs.recipe.strict:
            return [self._ancillary.read(spans, "ancillary", scratch)]

        def read(i: int) -> Array | None:
            source = self._sources[i]
            if source is None:
                return None
            return source.read(spans, f"input {i}", scratch, hashes.get(i))

        spread = self._requests_pool.map if self._requests_pool else map
        parts = list(spread(read, range(len(self._sources))))
        if copied:
            newest = self._ancillary.read(spans, "ancillary", scratch)
            self._check_equal(spans, parts, newest)
            return [newest]
        dtype = DTYPES[spans[0].placed.tensor.dtype]
        return [None if part is None else part.view(dtype) for part in parts]

    def _check_equal(self, spans: list[Span], parts: Sequence[Array | None], newest: Array) -> None:
        for source, part in zip(self._sources, parts, strict=True):
            if source is not None and part is not None and not np.array_equal(part, newest):
                names = ", ".join(repr(span.placed.tensor.name) for span in spans[:3])
                raise MismatchedCheckpoints(
                    f"tensor {names}: not merged but copied from the newest checkpoint, and "
                    f"different in {source.layout.checkpoint.uri}; without strict it is copied"
                )

    def _merged(
        self, spans: list[Span], parts: Sequence[Array | None], scratch: Scratch
    ) -> list[Array]:
        if self._is_copied(spans[0]):
            return [part for part in parts if part is not None] * len(self.vectors)
        output = DTYPES[spans[0].placed.dtype]
        count = sum(span.count for span in spans)
        results = [scratch.take(f"merged {v}", output, count) for v in range(len(self.vectors))]
        for first in range(0, count, self._block_elements):
            block = slice(first, first + self._block_elements)
            blocks = [None if part is None else part[block] for part in parts]
            sums = weighted_sums(blocks, self.vectors, scratch)
            for result, total in zip(results, sums, strict=True):
                if not round_into(result[block], total):
                    self._blame(spans, parts, output)
        return results

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


def _allow_open_files(count: int) -> None:
    """Raise this process's own limit where the ranks of a distributed checkpoint exceed it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _place(spans: Sequence[Span], data: Array, begin: int, leaf: Array) -> None:
    """Put the spans' output bytes where they belong in the leaf that begins at ``begin``.

    An element may lie on the border of two leaves: each gets its own part of it.
    """
    position = 0
    for span in spans:
        length = span.count * span.placed.width
        start = span.start - begin
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
