"""A folder of a local or mounted file system."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ckptfuse.errors import AccessDenied, MissingFile, StoreError
from ckptfuse.store.protocol import Entry, PartWriter, Reader, Writer, short_read
from ckptfuse.store.throttle import FREE, Throttle

TEMPORARY_PREFIX = ".ckptfuse-tmp-"
_SYNC_BYTES = 64 * 1024 * 1024


class FolderStore:
    """Files under a folder; reads wait for ``throttle``, for each call and each folder listed."""

    request_size = 2 * 1024 * 1024  # few calls, and still in the cache when used
    is_remote = False

    def __init__(self, root: Path, throttle: Throttle = FREE) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as they are named
        self.uri = str(self.root)
        self._throttle = throttle

    def path(self, path: str) -> Path:
        return Path(self._file(path))

    def _file(self, path: str) -> str:
        """As a string: records and buckets hold tens of thousands of files."""
        if path.startswith("/") or ".." in path.split("/"):
            raise StoreError(f"{path!r} points outside of {self.uri}")
        return f"{self.uri}/{path}"

    def list(self, prefix: str = "") -> list[Entry]:
        entries = []
        for path, found in self._walk(prefix):
            info = _stat(found)
            if info is not None:
                entries.append(_entry(path, info))
        return sorted(entries, key=lambda entry: entry.path)

    def names(self, prefix: str = "") -> tuple[str, ...]:
        return tuple(sorted(path for path, _ in self._walk(prefix)))

    def _walk(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """The files whose path starts with ``prefix``; links to folders are not followed."""
        self._check_root()
        top = prefix[: prefix.rfind("/") + 1]
        pending = [top]
        while pending:
            self._throttle.wait(0)
            folder = pending.pop()
            for found in _scan(f"{self.root}/{folder}", is_top=folder == top):
                path = folder + found.name
                if found.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
                elif (
                    path.startswith(prefix)
                    and not found.name.startswith(TEMPORARY_PREFIX)
                    and not _is_link_to_folder(found)
                ):
                    yield path, found

    def folders(self) -> tuple[str, ...]:
        self._check_root()
        self._throttle.wait(0)
        found = _scan(str(self.root), is_top=True)
        return tuple(sorted(f.name for f in found if f.is_dir(follow_symlinks=False)))

    def _check_root(self) -> None:
        if not os.path.isdir(self.root):  # noqa: PTH112 - false where nothing may be asked
            raise StoreError(f"{self.uri}: no such folder; create it or correct the path")

    def stat(self, path: str) -> Entry:
        self._throttle.wait(0)
        with self._missing(path):
            return _entry(path, os.stat(self._file(path)))  # noqa: PTH116 - see _file

    def read(self, path: str) -> bytes:
        self._throttle.wait(0)
        # Not Path.read_bytes, and our own context only where it is needed: see _file.
        try:
            with open(self._file(path), "rb", buffering=0) as file:  # noqa: PTH123
                data = file.read()
        except OSError:
            with self._missing(path):
                raise
        self._throttle.spent(len(data))
        return data

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
            yield _Reader(descriptor, self.uri, path, self._throttle)
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
            out = _SyncedWhileWritten(descriptor, syncing)
            yield out
            out.finish()

    @contextmanager
    def _new_file(self, path: str) -> Iterator[int]:
        """A temporary file's descriptor; synced and renamed when the context ends well."""
        target = self.path(path)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error}") from error
        try:
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
        return FolderStore(self.path(name), self._throttle)

    @contextmanager
    def _missing(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFile(f"{self.uri}/{path}: no such file") from error
        except IsADirectoryError as error:
            raise StoreError(f"{self.uri}/{path} is a folder; a file was expected") from error
        except PermissionError as error:
            raise AccessDenied(f"{self.uri}/{path}: permission denied") from error


def _scan(folder: str, *, is_top: bool) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing when it was removed since it was listed.

    One that may not be read says so where it was asked for; below that (a ``lost+found``) it is
    passed over.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        is_denied = isinstance(error, PermissionError)
        if is_denied and not is_top:
            return []
        kind = AccessDenied if is_denied else StoreError
        raise kind(f"{folder.rstrip('/')}: cannot be listed: {error.strerror}") from error


def _is_link_to_folder(found: os.DirEntry[str]) -> bool:
    try:
        return found.is_symlink() and found.is_dir()
    except OSError:  # in a circle, or through what this user may not pass
        return False


def _stat(found: os.DirEntry[str]) -> os.stat_result | None:
    """None of what was removed since it was listed, and of a link that leads to no file."""
    try:
        return found.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES):
            return None
        raise StoreError(f"{found.path}: cannot be looked at: {error.strerror}") from error


def _entry(path: str, info: os.stat_result) -> Entry:
    return Entry(path, info.st_size, str(info.st_mtime_ns), info.st_mtime)


class _Reader:
    """An open file, read at any offset."""

    def __init__(self, descriptor: int, uri: str, path: str, throttle: Throttle) -> None:
        self._descriptor = descriptor
        self._where = (uri, path)
        self._throttle = throttle

    def read_into(self, start: int, view: memoryview) -> None:
        self._throttle.wait(len(view))
        done = 0
        while done < len(view):  # one read returns at most 2 GiB
            try:
                count = os.preadv(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                where = "/".join(self._where)
                raise StoreError(f"{where}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise StoreError(short_read(*self._where, start, len(view), done))
            done += count


class _SyncedWhileWritten:
    """A new file that is synced while it is written, so that little is left at the end."""

    def __init__(self, descriptor: int, syncing: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._syncing = syncing
        self._last: Future[None] | None = None
        self._unsynced = 0

    def write_at(self, start: int, data: memoryview) -> None:
        self._unsynced += len(data)  # an update lost between threads only delays a sync
        while len(data):
            count = os.pwrite(self._descriptor, data, start)
            start, data = start + count, data[count:]
        if self._unsynced >= _SYNC_BYTES and (self._last is None or self._last.done()):
            self.finish()
            self._unsynced = 0
            self._last = self._syncing.submit(os.fdatasync, self._descriptor)

    def finish(self) -> None:
        """Raise what the last sync met: the kernel tells of a failed write only once."""
        if self._last is not None:
            self._last.result()


def remove_folder(path: Path) -> None:
    """Delete a local folder if it is there; read-only files inside do not stop it."""
    if path.is_dir():
        shutil.rmtree(path)


def link_tree(source: Path, target: Path) -> None:
    """Hard-link a folder's files in place of what is there."""
    remove_folder(target)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link_file(path, target / path.relative_to(source))


def link_file(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
