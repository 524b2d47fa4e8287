"""Digests: canonical JSON for values, trees of SHA-256 for file contents.

A file's content hash is a tree of depth one, so that ranges of a large file can be hashed by
several threads and a ranged read can be checked against its leaf::

    file     |-- leaf 0 --|-- leaf 1 --|-- ... --|-- leaf n (short) --|
    leaves   sha256(leaf 0)  sha256(leaf 1)  ...  sha256(leaf n)
    content  sha256(b"ckptfuse-tree-1:8388608:" + leaf digests)
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from io import BufferedReader
from json.encoder import encode_basestring_ascii
from pathlib import Path

LEAF_SIZE = 8 * 1024 * 1024
#: Names how content hashes are made.
TREE = f"ckptfuse-tree-1:{LEAF_SIZE}"
_TREE_PREFIX = f"{TREE}:".encode()
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_SCALARS = {str: encode_basestring_ascii, int: int.__repr__}


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, NaN refused."""
    if isinstance(value, list) and all(type(part) in _SCALARS for part in value):
        # The same text in a third of the time: a look digests tens of thousands of such keys.
        return f"[{','.join([_SCALARS[type(part)](part) for part in value])}]".encode()
    return _ENCODER.encode(value).encode()


def digest(value: object) -> str:
    """SHA-256 (hex, 64 characters) of a JSON-like value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def leaf_digest(leaf: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(leaf).digest()


def tree_digest(leaves: Iterable[bytes]) -> str:
    """Content hash (hex) from the digests of consecutive leaves of ``LEAF_SIZE`` bytes."""
    return hashlib.sha256(_TREE_PREFIX + b"".join(leaves)).hexdigest()


def content_digest(data: bytes | bytearray | memoryview) -> str:
    """Content hash (hex) of bytes that are in memory."""
    view = memoryview(data)
    starts = range(0, len(view), LEAF_SIZE)
    return tree_digest(leaf_digest(view[start : start + LEAF_SIZE]) for start in starts)


def file_content(path: Path) -> tuple[int, str]:
    """Size and content hash of a local file, read leaf by leaf."""
    buffer = memoryview(bytearray(LEAF_SIZE))

    def leaves(file: BufferedReader) -> Iterator[bytes]:
        while count := file.readinto(buffer):
            yield leaf_digest(buffer[:count])

    with path.open("rb") as file:
        return path.stat().st_size, tree_digest(leaves(file))


class TreeHasher:
    """Content hash of a stream that arrives in pieces of any size."""

    def __init__(self) -> None:
        self._leaves: list[bytes] = []
        self._leaf = hashlib.sha256()
        self._room = LEAF_SIZE

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[: self._room]
            self._leaf.update(piece)
            self._room -= len(piece)
            if self._room == 0:
                self._close_leaf()
            view = view[len(piece) :]

    def _close_leaf(self) -> None:
        self._leaves.append(self._leaf.digest())
        self._leaf = hashlib.sha256()
        self._room = LEAF_SIZE

    def leaves(self) -> list[bytes]:
        """The digests of all leaves; the stream has ended with this."""
        if self._room < LEAF_SIZE:
            self._close_leaf()
        return self._leaves

    def hexdigest(self) -> str:
        return tree_digest(self.leaves())
