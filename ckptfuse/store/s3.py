"""A prefix of an S3 bucket, through boto3 as its configuration stands (`s3_client`)."""

import http.client
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ckptfuse.errors import StoreError
from ckptfuse.store.multipart import PartsUpload, StreamUpload
from ckptfuse.store.protocol import Entry, PartWriter, Reader, Writer, short_read
from ckptfuse.store.s3_client import client, explained
from ckptfuse.store.throttle import FREE, Throttle

#: How often the rest of a range is asked for when its connection breaks, at growing intervals.
RESUMES = 4
_FIRST_PAUSE = 0.2  # seconds


class S3Store:
    """Objects under a prefix; every request that reads waits for ``throttle``."""

    request_size = 16 * 1024 * 1024  # boto3 takes 2 ms of a CPU for each, whatever its length
    is_remote = True

    def __init__(self, bucket: str, prefix: str, throttle: Throttle = FREE) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._throttle = throttle

    def list(self, prefix: str = "") -> list[Entry]:
        entries = []
        with self._explained(prefix):
            pages = client().get_paginator("list_objects_v2")
            self._throttle.wait(0)
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                entries += [
                    self._entry(item["Key"], item)
                    for item in page.get("Contents", [])
                    if not item["Key"].endswith("/")  # consoles mark folders by empty objects
                ]
                if page.get("IsTruncated"):
                    self._throttle.wait(0)
        return sorted(entries, key=lambda entry: entry.path)

    def names(self, prefix: str = "") -> tuple[str, ...]:
        return tuple(entry.path for entry in self.list(prefix))

    def folders(self) -> tuple[str, ...]:
        names = []
        with self._explained(""):
            pages = client().get_paginator("list_objects_v2")
            self._throttle.wait(0)
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix, Delimiter="/"):
                found = page.get("CommonPrefixes", [])
                names += [item["Prefix"].removeprefix(self.prefix).rstrip("/") for item in found]
                if page.get("IsTruncated"):
                    self._throttle.wait(0)
        return tuple(sorted(names))

    def _entry(self, key: str, item: Any, size: str = "Size") -> Entry:
        path = key.removeprefix(self.prefix)
        return Entry(path, item[size], item["ETag"].strip('"'), item["LastModified"].timestamp())

    def stat(self, path: str) -> Entry:
        key = self.prefix + path
        self._throttle.wait(0)
        with self._explained(path):
            head = client().head_object(Bucket=self.bucket, Key=key)
            return self._entry(key, head, "ContentLength")

    def read(self, path: str) -> bytes:
        self._throttle.wait(0)
        with self._explained(path):
            answer = client().get_object(Bucket=self.bucket, Key=self.prefix + path)
            data = bytes(answer["Body"].read())
        self._throttle.spent(len(data))
        return data

    def read_range(self, path: str, start: int, length: int) -> bytearray:
        data = bytearray(length)
        self.read_into(path, start, memoryview(data))
        return data

    def read_into(self, path: str, start: int, view: memoryview) -> None:
        """Fill ``view`` by one request, or by more where connections break."""
        done, broken = 0, 0
        while done < len(view):
            self._throttle.wait(len(view) - done)
            got, error = self._request(path, start + done, view[done:])
            done += got
            if error is None and done < len(view):
                raise StoreError(short_read(self.uri, path, start, len(view), done))
            if error is not None:
                if broken == RESUMES:
                    raise StoreError(
                        f"{self.uri}/{path}: the connection broke {broken + 1} times between "
                        f"offsets {start} and {start + len(view)} ({error}); is the store up?"
                    ) from error
                time.sleep(_FIRST_PAUSE * 2**broken)
                broken += 1

    def _request(self, path: str, start: int, view: memoryview) -> tuple[int, Exception | None]:
        """The bytes that came, and the error if that is not all that the store announced."""
        span = f"bytes={start}-{start + len(view) - 1}"
        with self._explained(path):
            answer = client().get_object(Bucket=self.bucket, Key=self.prefix + path, Range=span)
        announced = int(answer["ContentLength"])
        if announced > len(view):  # from the beginning, which is not what was asked for
            answer["Body"].close()
            raise StoreError(
                f"{self.uri}/{path}: {announced} bytes are sent for a range of {len(view)}; the "
                "store, or a proxy before it, ignores ranges (the Range header): merges need them"
            )
        return _receive(answer["Body"], view[:announced])

    @contextmanager
    def reader(self, path: str) -> Iterator[Reader]:
        yield _Ranges(self, path)

    def write(self, path: str, data: bytes) -> None:
        with self._explained(path):
            client().put_object(Bucket=self.bucket, Key=self.prefix + path, Body=data)

    @contextmanager
    def writer(self, path: str) -> Iterator[Writer]:
        with self._explained(path), StreamUpload(self.bucket, self.prefix + path) as upload:
            yield upload

    @contextmanager
    def part_writer(self, path: str, size: int, part_size: int) -> Iterator[PartWriter]:
        upload = PartsUpload(self.bucket, self.prefix + path, size=size, part_size=part_size)
        with self._explained(path), upload:
            yield upload

    def delete(self, path: str) -> None:
        with self._explained(path):
            client().delete_object(Bucket=self.bucket, Key=self.prefix + path)

    def child(self, name: str) -> "S3Store":
        return S3Store(self.bucket, (self.prefix + name).strip("/"), self._throttle)

    def _explained(self, path: str) -> AbstractContextManager[None]:
        return explained(f"{self.uri}/{path}" if path else self.uri, self.bucket)


class _Ranges:
    """An object, read by ranged requests."""

    def __init__(self, store: S3Store, path: str) -> None:
        self._store = store
        self._path = path

    def read_into(self, start: int, view: memoryview) -> None:
        self._store.read_into(self._path, start, view)


def _receive(body: Any, view: memoryview) -> tuple[int, Exception | None]:
    """Fill ``view`` from the socket, without a copy on the way; bytes that came, and why no more.

    botocore's and urllib3's own ``readinto`` read into new bytes and copy them, twice, under the
    interpreter's lock; http.client's beneath them (urllib3's ``_fp``) does not.
    """
    response = body._raw_stream
    source = getattr(response, "_fp", response)
    done = 0
    error: Exception | None = None
    try:
        while done < len(view) and (count := source.readinto(view[done:])):
            done += count
        if done < len(view):
            error = ConnectionError(f"closed after {done} of {len(view)} bytes")
    except (OSError, http.client.HTTPException) as broken:
        error = broken
    if error is None:
        response.release_conn()  # to be used again; urllib3 did not see the end
    else:
        body.close()
    return done, error
