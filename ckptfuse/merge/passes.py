"""One pass over the inputs: every output file, stretch by stretch, for all weight vectors at once.

A stretch is some neighbouring leaves of a file (`stretches`), as many as one read fills: threads
take stretches in order and end them in any. Memory is bounded by threads x (inputs x request +
outputs x stretch), whatever the model's size.
"""

import os
import resource
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

from ckptfuse import digests
from ckptfuse.errors import ConfigurationError
from ckptfuse.fingerprints import check_unchanged
from ckptfuse.layouts import Layout
from ckptfuse.merge.arithmetic import BLOCK_ELEMENTS
from ckptfuse.merge.hashing import InputHashes
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import OutputFile, output_files
from ckptfuse.merge.requests import Requests, Spread
from ckptfuse.merge.sources import Source
from ckptfuse.merge.stretches import LeafDigests, Stretch, Worker, merge_stretch
from ckptfuse.merge.tally import Progress, Tally, ignore
from ckptfuse.store import PartWriter

#: What the buffers of all threads together may take.
MEMORY = 160 * 1024 * 1024
SMALLEST_REQUEST = 256 * 1024
#: Threads where reads wait for a network; elsewhere one a core.
REMOTE_THREADS = 16


class Pass:
    """A pass over ``inputs`` for these weight vectors; a context that holds the input files open.

    Each input with a weight in any vector is read once, and of the ancillary one what is copied.
    When the context ends without an error, ChangedCheckpoint is raised if one of these was written
    again during the pass.
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
        self._workers: list[Worker] = []
        self._local = threading.local()
        self._stack = ExitStack()

    def __enter__(self) -> "Pass":
        self._started = time.perf_counter()
        self._sources = [
            self._open(layout) if wanted else None
            for layout, wanted in zip(self.inputs.layouts, self._read, strict=True)
        ]
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._threads))
        spread: Spread = map
        if self._store.is_remote:  # from a network, all inputs at once
            pool = ThreadPoolExecutor(self._threads * sum(self._read))
            spread = self._stack.enter_context(pool).map
        self._requests = Requests(
            inputs=self.inputs,
            vectors=self.vectors,
            sources=self._sources,
            ancillary=self._open(self.inputs.ancillary),
            size=self._request_size,
            block_elements=self._block_elements,
            spread=spread,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            read = [source.layout for source in self._sources if source is not None]
            for layout in {id(one): one for one in (*read, self.inputs.ancillary)}.values():
                check_unchanged(layout.checkpoint)

    def _open(self, layout: Layout) -> Source:
        store = layout.checkpoint.store()
        files = dict.fromkeys([*layout.files, *layout.item_files])
        _allow_open_files(len(files) * (2 + len(self._read)))
        readers = {file: self._stack.enter_context(store.reader(file)) for file in files}
        return Source(layout, readers, self._request_size)

    def _choose_request_size(self) -> int:
        """That of the store, halved until two threads have room for it."""
        size = self._store.request_size
        while size > SMALLEST_REQUEST and 2 * self._memory(size) > MEMORY:
            size //= 2
        return size

    def _choose_threads(self) -> int:
        most = REMOTE_THREADS if self._store.is_remote else len(os.sched_getaffinity(0))
        return max(1, min(most, MEMORY // self._memory(self._request_size)))

    def _memory(self, request_size: int) -> int:
        """Bytes that a thread's buffers take with requests of this size."""
        return sum(self._read) * request_size + len(self.vectors) * _stretch_size(request_size)

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

        ``progress`` is called about once a stretch. Raises NonFiniteValues naming
        checkpoint and tensor.
        """
        hashed = self._hashed_inputs(file)
        done: list[LeafDigests] = []
        pending: deque[Future[LeafDigests]] = deque()
        try:
            for stretch in self._stretches(file):
                pending.append(self._pool.submit(self._merge_stretch, stretch, outputs, hashed))
                if len(pending) > 2 * self._threads:
                    done.append(pending[0].result())
                    pending.popleft()
                    progress(self.tally, self.size)
            done += [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()
            wait(pending)  # no thread may write after its output was closed
        progress(self.tally, self.size)
        if self.hashes is not None:
            read = {i: [leaf for each in done for leaf in each.inputs[i]] for i in hashed}
            self.hashes.add(file, read)
        return [
            digests.tree_digest(leaf for each in done for leaf in each.outputs[v])
            for v in range(len(outputs))
        ]

    def _stretches(self, file: OutputFile) -> Iterator[Stretch]:
        size = _stretch_size(self._request_size)
        for begin in range(0, file.size, size):
            yield Stretch(file, begin, min(begin + size, file.size))

    def _hashed_inputs(self, file: OutputFile) -> list[int]:
        """The inputs whose bytes of this file are to be hashed on the way."""
        if self.hashes is None:
            return []
        return [i for i in self.hashes.aligned(file) if self._sources[i] is not None]

    def _merge_stretch(
        self, stretch: Stretch, outputs: Sequence[PartWriter], hashed: Sequence[int]
    ) -> LeafDigests:
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker()
            self._workers.append(self._local.worker)
        return merge_stretch(stretch, self._requests, outputs, hashed, self._local.worker)


def _stretch_size(request_size: int) -> int:
    """Whole leaves, as many as one request may fill."""
    return max(digests.LEAF_SIZE, request_size // digests.LEAF_SIZE * digests.LEAF_SIZE)


def _allow_open_files(count: int) -> None:
    """Raise this process's own limit where the ranks of a distributed checkpoint exceed it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
