"""Uploads to S3: a new object appears when all of it is there, or not at all.

Two ways to bring the bytes: `StreamUpload` takes them in order and knows no size; `PartsUpload`
knows the size, takes parts from any thread in any order and sends several at once. Either way
nothing is on the local disk, what failed is aborted, and S3's limits hold: parts of 5 MiB to
5 GiB (but for the last), 10,000 of them, 5 TiB an object.
"""

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from ckptfuse.errors import StoreError
from ckptfuse.store.s3_client import client

LARGEST = 5 * 1024**4
MOST_PARTS = 10_000
SMALLEST_PART = 5 * 1024**2
_STREAM_PART = 16 * 1024**2
#: Parts on their way at once, if they do not take more memory than this; one always goes.
_IN_FLIGHT = 8
_MEMORY = 128 * 1024**2


class _Upload:
    """One S3 object on its way: parts by number, or a single put. A context: ends it, or aborts."""

    def __init__(self, bucket: str, key: str) -> None:
        self._target = {"Bucket": bucket, "Key": key}
        self._upload_id: str | None = None
        self._tags: dict[int, str] = {}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._abort()
            raise
        if kind is not None:
            self._abort()

    def _finish(self) -> None:
        """Everything was handed over: make the object appear."""
        raise NotImplementedError

    def _begin(self) -> None:
        self._upload_id = client().create_multipart_upload(**self._target)["UploadId"]

    def _put(self, data: bytes | bytearray) -> None:
        client().put_object(**self._target, Body=data)

    def _send(self, number: int, data: bytes | bytearray) -> None:
        answer = client().upload_part(
            **self._target, UploadId=self._upload_id, PartNumber=number, Body=data
        )
        self._tags[number] = answer["ETag"]

    def _complete(self) -> None:
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in sorted(self._tags.items())]
        client().complete_multipart_upload(
            **self._target, UploadId=self._upload_id, MultipartUpload={"Parts": parts}
        )

    def _abort(self) -> None:
        if self._upload_id is not None:
            with contextlib.suppress(Exception):  # the first error is the one to report
                client().abort_multipart_upload(**self._target, UploadId=self._upload_id)


class StreamUpload(_Upload):
    """Bytes in order: parts of 16 MiB, or one put when they all fit in one."""

    def __init__(self, bucket: str, key: str) -> None:
        super().__init__(bucket, key)
        self._buffer = bytearray()

    def __enter__(self) -> "StreamUpload":
        return self

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        self._buffer += data
        while len(self._buffer) >= self._part_size():
            self._send_next(self._part_size())

    def _part_size(self) -> int:
        # Growing parts let a stream of unknown length reach the limit of an object.
        return _STREAM_PART * (1 + len(self._tags) // 1000) ** 2

    def _send_next(self, size: int) -> None:
        if self._upload_id is None:
            self._begin()
        self._send(len(self._tags) + 1, bytes(memoryview(self._buffer)[:size]))
        del self._buffer[:size]

    def _finish(self) -> None:
        if self._upload_id is None:
            self._put(bytes(self._buffer))
            return
        if self._buffer:
            self._send_next(len(self._buffer))
        self._complete()


def group_size(size: int, part_size: int) -> int:
    """How many parts of the caller make one of S3's, for an object of ``size`` bytes."""
    smallest = max(SMALLEST_PART, -(-size // MOST_PARTS))
    return max(1, -(-smallest // part_size))


class PartsUpload(_Upload):
    """Parts in any order from any thread, each sent under its own number as soon as it is whole.

    Parts of 8 MiB are S3's own parts up to 78 GiB; in larger objects several neighbours make one
    of S3's and wait for each other, as a merge produces them: nearly in order. So what is held is
    what is on its way, at most 128 MiB or one part, and the few that are being filled.
    """

    def __init__(self, bucket: str, key: str, *, size: int, part_size: int) -> None:
        super().__init__(bucket, key)
        if size > LARGEST:
            raise StoreError(
                f"s3://{bucket}/{key}: {size} bytes exceed the {LARGEST} of an S3 object; merge "
                "checkpoints that are saved in smaller shards"
            )
        self._size = size
        self._group = part_size * group_size(size, part_size)
        self._count = -(-size // self._group)
        self._whole: bytes | bytearray | None = None if size else b""
        self._lock = threading.Lock()
        self._filling: dict[int, tuple[bytearray, list[int]]] = {}
        self._sent: list[Future[None]] = []
        in_flight = max(1, min(_IN_FLIGHT, _MEMORY // self._group))
        self._room = threading.BoundedSemaphore(in_flight)
        self._pool = ThreadPoolExecutor(in_flight)

    def __enter__(self) -> "PartsUpload":
        if self._count > 1:
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # No part may arrive after an abort: S3 would keep it, and charge for it.
        self._pool.shutdown(cancel_futures=kind is not None)
        super().__exit__(kind, *rest)

    def write_at(self, start: int, data: memoryview, /) -> None:
        """Take one part; waits while too many are on their way, raises what one of them met."""
        index, offset = divmod(start, self._group)
        whole = self._filled(index, offset, data)
        if whole is None:
            return
        self._room.acquire()
        try:
            future = self._pool.submit(self._deliver, index + 1, whole)
        except BaseException:
            self._room.release()
            raise
        with self._lock:
            self._sent.append(future)
        self._raise_failed()

    def _filled(self, index: int, offset: int, data: memoryview) -> bytes | bytearray | None:
        """S3's part, if this was all that it lacked."""
        size = min(self._group, self._size - index * self._group)
        if len(data) == size:
            return bytes(data)
        with self._lock:
            part, came = self._filling.setdefault(index, (bytearray(size), []))
            came.append(len(data))
            is_last = sum(came) == size
            part[offset : offset + len(data)] = data
            if is_last:
                del self._filling[index]
        return part if is_last else None

    def _deliver(self, number: int, data: bytes | bytearray) -> None:
        try:
            if self._count > 1:
                self._send(number, data)
            else:
                self._whole = data
        finally:
            self._room.release()

    def _raise_failed(self) -> None:
        """The error of a part that ended badly; those that ended well are forgotten."""
        with self._lock:
            ended = [future for future in self._sent if future.done()]
            self._sent = [future for future in self._sent if not future.done()]
        for future in ended:
            future.result()

    def _finish(self) -> None:
        self._raise_failed()
        if self._count <= 1 and self._whole is not None:
            self._put(self._whole)
        elif len(self._tags) < self._count:
            raise StoreError(
                f"s3://{self._target['Bucket']}/{self._target['Key']}: {len(self._tags)} of "
                f"{self._count} parts were written; nothing of it is kept"
            )
        else:
            self._complete()
