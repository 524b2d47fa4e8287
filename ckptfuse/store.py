"""Bytes at a URI: a folder or an S3 prefix behind one small protocol.

Everything above this module speaks of relative paths inside a store and never of a disk or a
bucket. Writes appear whole or not at all: a folder store renames a finished temporary file, and
S3 shows an object only when its (multipart) upload completes.
"""

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ckptfuse.errors import ConfigurationError, MissingFile, StoreError

TEMPORARY_PREFIX = ".ckptfuse-tmp-"
_SYNC_BYTES = 64 * 1024 * 1024
_S3_PART_SIZE = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a listing. ``version`` changes when the file is written again."""

    path: str
    size: int
    version: str
    modified: float  # seconds since the epoch, by the store's clock


class Writer(Protocol):
    """Where the bytes of one new file go, in order."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object: ...


class Reader(Protocol):
    """One file, read by ranges from any thread."""

    def read_into(self, start: int, view: memoryview, /) -> None:
        """Fill ``view`` from ``start``; raises StoreError when the file is shorter."""


class PartWriter(Protocol):
    """One new file of known size, written in parts from any thread and in any order."""

    def write_at(self, start: int, data: memoryview, /) -> None: ...


class Store(Protocol):
    """Files under one URI. Paths are relative, with forward slashes."""

    uri: str
    #: Bytes that one read should ask for: what keeps the way to them busy.
    request_size: int
    #: Whether reads wait for a network, so that more of them at once go faster.
    is_remote: bool

    def list(self, prefix: str = "") -> list[Entry]:
        """All files whose path starts with ``prefix``, sorted by path."""

    def stat(self, path: str) -> Entry:
        """One file's entry; raises MissingFile."""

    def read(self, path: str) -> bytes:
        """A whole (small) file; raises MissingFile."""

    def read_range(self, path: str, start: int, length: int) -> bytes | bytearray:
        """Exactly ``length`` bytes from ``start``; raises StoreError when the file is shorter."""

    def reader(self, path: str) -> AbstractContextManager[Reader]:
        """Open a file for reading by ranges; raises MissingFile."""

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file, atomically, over any earlier one."""

    def writer(self, path: str) -> AbstractContextManager[Writer]:
        """Stream a new file; it appears when the context ends without an error."""

    def part_writer(
        self, path: str, size: int, part_size: int
    ) -> AbstractContextManager[PartWriter]:
        """Write a new file of ``size`` bytes by parts; it appears when the context ends well.

        Each part starts at a multiple of ``part_size`` and has that length, but for the last.
        """

    def delete(self, path: str) -> None:
        """Remove a file; a missing one is no error."""

    def child(self, name: str) -> "Store":
        """The store of a folder inside this one."""


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def open_store(uri: str | Path) -> Store:
    """The store at a local path, ``file://`` or ``s3://`` URI."""
    text = str(uri)
    if is_s3(text):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigurationError(f"{text!r} names no bucket; expected s3://BUCKET/PREFIX")
        return S3Store(bucket, prefix.strip("/"))
    if "://" in text and not text.startswith("file://"):
        raise ConfigurationError(f"{text!r}: unknown scheme; a local path or s3:// is accepted")
    return FolderStore(Path(text.removeprefix("file://")))


def split_uri(uri: str) -> tuple[str, str]:
    """A file's URI as (URI of its folder, name): ``s3://b/a/x.jsonl`` -> (``s3://b/a``, name)."""
    parent, _, name = uri.rpartition("/")
    if is_s3(uri) and (parent == "s3:/" or not name):
        raise ConfigurationError(f"{uri!r} names no object; expected s3://BUCKET/KEY")
    return parent or ("/" if uri.startswith("/") else "."), name


def read_uri(uri: str) -> bytes:
    """The bytes of one file at a local path or S3 URI."""
    parent, name = split_uri(uri)
    return open_store(parent).read(name)


class FolderStore:
    """A folder of a local or mounted file system."""

    request_size = 512 * 1024  # small enough to be still in the cache when it is used
    is_remote = False

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as they are named
        self.uri = str(self.root)

    def path(self, path: str) -> Path:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise StoreError(f"{path!r} points outside of {self.uri}")
        return self.root / parts

    def list(self, prefix: str = "") -> list[Entry]:
        if not self.root.is_dir():
            raise StoreError(f"{self.uri}: no such folder; create it or correct the path")
        folder = prefix.rpartition("/")[0]
        entries = []
        for parent, _, names in os.walk(self.root / folder):
            for name in names:
                if name.startswith(TEMPORARY_PREFIX):
                    continue
                full = Path(parent, name)
                path = full.relative_to(self.root).as_posix()
                if path.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        entries.append(self._entry(path, full))
        return sorted(entries, key=lambda entry: entry.path)

    def _entry(self, path: str, full: Path) -> Entry:
        info = full.stat()
        return Entry(path, info.st_size, str(info.st_mtime_ns), info.st_mtime)

    def stat(self, path: str) -> Entry:
        with self._missing(path):
            return self._entry(path, self.path(path))

    def read(self, path: str) -> bytes:
        with self._missing(path):
            return self.path(path).read_bytes()

    def read_range(self, path: str, start: int, length: int) -> bytes | bytearray:
        data = bytearray(length)
        with self.reader(path) as reader:
            reader.read_into(start, memoryview(data))
        return data

    @contextmanager
    def reader(self, path: str) -> Iterator[Reader]:
        with self._missing(path):
            descriptor = os.open(self.path(path), os.O_RDONLY)
        try:
            yield _Descriptor(descriptor, self.uri, path)
        finally:
            os.close(descriptor)

    def write(self, path: str, data: bytes) -> None:
        with self.writer(path) as out:
            out.write(data)

    @contextmanager
    def writer(self, path: str) -> Iterator[Writer]:
        with self._new_file(path) as descriptor, open(descriptor, "wb", closefd=False) as out:
            yield out

    @contextmanager
    def part_writer(self, path: str, size: int, part_size: int) -> Iterator[PartWriter]:
        with self._new_file(path) as descriptor, ThreadPoolExecutor(1) as syncing:
            out = _SyncedWhileWritten(descriptor, self.uri, path, syncing)
            yield out
            out.finish()

    @contextmanager
    def _new_file(self, path: str) -> Iterator[int]:
        """A temporary file's descriptor; synced and renamed when the context ends well."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(target)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        self.path(path).unlink(missing_ok=True)

    def child(self, name: str) -> "FolderStore":
        return FolderStore(self.path(name))

    @contextmanager
    def _missing(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFile(f"{self.uri}/{path}: no such file") from error
        except IsADirectoryError as error:
            raise StoreError(f"{self.uri}/{path} is a folder; a file was expected") from error
        except PermissionError as error:
            raise StoreError(f"{self.uri}/{path}: permission denied") from error


class _Descriptor:
    """An open file of a folder store, read or written at any offset."""

    def __init__(self, descriptor: int, uri: str, path: str) -> None:
        self._descriptor = descriptor
        self._where = (uri, path)

    def read_into(self, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):  # one read returns at most 2 GiB
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            if count == 0:
                raise StoreError(_short_read(*self._where, start, len(view), done))
            done += count

    def write_at(self, start: int, data: memoryview) -> None:
        while len(data):
            count = os.pwrite(self._descriptor, data, start)
            start, data = start + count, data[count:]


class _SyncedWhileWritten(_Descriptor):
    """A new file that is synced while it is written, so that little is left at the end."""

    def __init__(self, descriptor: int, uri: str, path: str, syncing: ThreadPoolExecutor) -> None:
        super().__init__(descriptor, uri, path)
        self._syncing = syncing
        self._last: Future[None] | None = None
        self._unsynced = 0

    def write_at(self, start: int, data: memoryview) -> None:
        super().write_at(start, data)
        self._unsynced += len(data)  # an update lost between threads only delays a sync
        if self._unsynced >= _SYNC_BYTES and (self._last is None or self._last.done()):
            self.finish()
            self._unsynced = 0
            self._last = self._syncing.submit(os.fdatasync, self._descriptor)

    def finish(self) -> None:
        """Raise what the last sync met: the kernel tells of a failed write only once."""
        if self._last is not None:
            self._last.result()


class S3Store:
    """A prefix of an S3 bucket; endpoint, region and credentials come from the AWS settings."""

    request_size = 8 * 1024 * 1024
    is_remote = True

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def list(self, prefix: str = "") -> list[Entry]:
        entries = []
        with self._explained(prefix):
            pages = _client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                entries += [self._entry(item["Key"], item) for item in page.get("Contents", [])]
        return sorted(entries, key=lambda entry: entry.path)

    def _entry(self, key: str, item: Any, size: str = "Size") -> Entry:
        path = key.removeprefix(self.prefix)
        return Entry(path, item[size], item["ETag"].strip('"'), item["LastModified"].timestamp())

    def stat(self, path: str) -> Entry:
        key = self.prefix + path
        with self._explained(path):
            head = _client().head_object(Bucket=self.bucket, Key=key)
            return self._entry(key, head, "ContentLength")

    def read(self, path: str) -> bytes:
        with self._explained(path):
            answer = _client().get_object(Bucket=self.bucket, Key=self.prefix + path)
            return bytes(answer["Body"].read())

    def read_range(self, path: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        span = f"bytes={start}-{start + length - 1}"
        with self._explained(path):
            answer = _client().get_object(Bucket=self.bucket, Key=self.prefix + path, Range=span)
            data = bytes(answer["Body"].read())
        if len(data) != length:
            raise StoreError(_short_read(self.uri, path, start, length, len(data)))
        return data

    @contextmanager
    def reader(self, path: str) -> Iterator[Reader]:
        yield _Ranges(self, path)

    @contextmanager
    def part_writer(self, path: str, size: int, part_size: int) -> Iterator[PartWriter]:
        with self.writer(path) as upload:
            yield _Parts(upload, part_size)

    def write(self, path: str, data: bytes) -> None:
        with self._explained(path):
            _client().put_object(Bucket=self.bucket, Key=self.prefix + path, Body=data)

    @contextmanager
    def writer(self, path: str) -> Iterator[Writer]:
        upload = _MultipartUpload(self.bucket, self.prefix + path)
        with self._explained(path):
            try:
                yield upload
                upload.complete()
            except BaseException:
                upload.abort()
                raise

    def delete(self, path: str) -> None:
        with self._explained(path):
            _client().delete_object(Bucket=self.bucket, Key=self.prefix + path)

    def child(self, name: str) -> "S3Store":
        return S3Store(self.bucket, (self.prefix + name).strip("/"))

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turn botocore's many exceptions into ours, with what a person can do."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        where = f"{self.uri}/{path}" if path else self.uri
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise ConfigurationError(
                f"{where}: no usable AWS credentials ({error}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or run with an instance role"
            ) from error
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            raise _client_error(where, self.bucket, code, error) from error
        except BotoCoreError as error:
            raise StoreError(
                f"{where}: {error}; is AWS_ENDPOINT_URL right and the store up?"
            ) from error


class _Ranges:
    """An object, read by ranged requests."""

    def __init__(self, store: S3Store, path: str) -> None:
        self._store = store
        self._path = path

    def read_into(self, start: int, view: memoryview) -> None:
        view[:] = self._store.read_range(self._path, start, len(view))


class _Parts:
    """Parts that come in any order, handed on in order; those that came early wait in memory."""

    def __init__(self, out: Writer, part_size: int) -> None:
        self._out = out
        self._part_size = part_size
        self._next = 0
        self._waiting: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def write_at(self, start: int, data: memoryview) -> None:
        with self._lock:
            self._waiting[start] = bytes(data)
            while self._next in self._waiting:
                self._out.write(self._waiting.pop(self._next))
                self._next += self._part_size


def _client_error(where: str, bucket: str, code: str, error: Exception) -> StoreError:
    if code == "NoSuchBucket":
        return StoreError(f"{where}: the bucket {bucket!r} does not exist")
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingFile(f"{where}: no such object")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return StoreError(f"{where}: access denied ({code}); check the AWS credentials and policy")
    return StoreError(f"{where}: {error}")


class _MultipartUpload:
    """Bytes in order to one S3 object: parts of 16 MiB, or one put when they all fit in one."""

    def __init__(self, bucket: str, key: str) -> None:
        self._target = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._parts: list[dict[str, object]] = []

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        self._buffer += data
        while len(self._buffer) >= self._part_size():
            self._send_part(self._part_size())

    def _part_size(self) -> int:
        # S3 admits 10,000 parts: growing ones let a single object reach its limit of 5 TiB.
        return _S3_PART_SIZE * (1 + len(self._parts) // 1000) ** 2

    def _send_part(self, size: int) -> None:
        if self._upload_id is None:
            self._upload_id = _client().create_multipart_upload(**self._target)["UploadId"]
        number = len(self._parts) + 1
        answer = _client().upload_part(
            **self._target,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=bytes(memoryview(self._buffer)[:size]),
        )
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        del self._buffer[:size]

    def complete(self) -> None:
        if self._upload_id is None:
            _client().put_object(**self._target, Body=bytes(self._buffer))
            return
        if self._buffer:
            self._send_part(len(self._buffer))
        _client().complete_multipart_upload(
            **self._target, UploadId=self._upload_id, MultipartUpload={"Parts": self._parts}
        )

    def abort(self) -> None:
        if self._upload_id is not None:
            with contextlib.suppress(Exception):  # the first error is the one to report
                _client().abort_multipart_upload(**self._target, UploadId=self._upload_id)


@lru_cache(maxsize=1)
def _client() -> Any:
    import boto3
    from botocore.config import Config

    # Checksums only where required: several S3-compatible stores answer ranged reads without one.
    retries: dict[str, object] = {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:  # what is given here would stand over it
        retries["max_attempts"] = 5
    config = Config(
        max_pool_connections=32,
        retries=retries,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.Session().client("s3", config=config)


def _short_read(uri: str, path: str, start: int, length: int, got: int) -> str:
    return (
        f"{uri}/{path}: {got} bytes came where {length} were asked for at offset {start}; "
        "the file is shorter than expected or was replaced while it was read"
    )


def remove_folder(path: Path) -> None:
    """Delete a local folder if it is there; read-only files inside do not stop it."""
    if path.is_dir():
        shutil.rmtree(path)
