"""What a store is: listings, ranged reads from any thread, writes that appear whole."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


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

    def write_at(self, start: int, data: memoryview, /) -> None:
        """Take one part; ``data`` may be used again when this returns."""


class Store(Protocol):
    """Files under one URI. Paths are relative, with forward slashes."""

    uri: str
    #: Bytes that one read should ask for: what keeps the way to them busy.
    request_size: int
    #: Whether reads wait for a network, so that more of them at once go faster.
    is_remote: bool

    def list(self, prefix: str = "") -> list[Entry]:
        """All files whose path starts with ``prefix``, sorted by path."""

    def names(self, prefix: str = "") -> tuple[str, ...]:
        """The paths of ``list``; where a file's size is another question, it is not asked."""

    def folders(self) -> tuple[str, ...]:
        """Names of the folders at the top, sorted; of however many files, few requests."""

    def stat(self, path: str) -> Entry:
        """One file's entry; raises MissingFile."""

    def read(self, path: str) -> bytes:
        """A whole (small) file; raises MissingFile."""

    def read_range(self, path: str, start: int, length: int) -> bytes | bytearray:
        """Exactly ``length`` bytes from ``start``; raises StoreError when the file is shorter."""

    def reader(self, path: str) -> AbstractContextManager[Reader]:
        """Open a file for reading by ranges; raises MissingFile, at the latest when it is read."""

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


def short_read(uri: str, path: str, start: int, length: int, got: int) -> str:
    """What is told of a file that ended before a range did."""
    return (
        f"{uri}/{path}: {got} bytes came where {length} were asked for at offset {start}; "
        "the file is shorter than expected or was replaced while it was read"
    )
