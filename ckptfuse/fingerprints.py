"""What a checkpoint's bytes are: every file hashed once, leaf by leaf, several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

from ckptfuse import checkpoints, digests
from ckptfuse.checkpoints import Checkpoint, Contents
from ckptfuse.errors import ChangedCheckpoint, MissingFile
from ckptfuse.store import Entry, Store

READ_THREADS = 8


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """A checkpoint's fingerprint from one read of its files."""
    return checkpoints.fingerprint(contents_of(checkpoint))


def contents_of(checkpoint: Checkpoint, known: Contents | None = None) -> Contents:
    """Read every file once that is not ``known``, for its hash alone, a few leaves at a time.

    Raises ChangedCheckpoint when a file was written again meanwhile.
    """
    store = checkpoint.store()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        contents = {
            entry.path: (known or {}).get(entry.path) or (entry.size, _content(store, entry, pool))
            for entry in checkpoint.files
        }
    check_unchanged(checkpoint)
    return contents


def copy_file(source: Store, target: Store, entry: Entry) -> tuple[int, str]:
    """Copy one file, a leaf at a time; returns its size and the content hash of what was read."""
    hasher = digests.TreeHasher()
    buffer = memoryview(bytearray(min(digests.LEAF_SIZE, entry.size)))
    with source.reader(entry.path) as reader, target.writer(entry.path) as out:
        for start in range(0, entry.size, digests.LEAF_SIZE):
            piece = buffer[: min(digests.LEAF_SIZE, entry.size - start)]
            reader.read_into(start, piece)
            hasher.update(piece)
            out.write(piece)
    return entry.size, hasher.hexdigest()


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise ChangedCheckpoint unless every file still has the size and version of the listing."""
    store = checkpoint.store()
    for entry in checkpoint.files:
        try:
            now = store.stat(entry.path)
        except MissingFile:
            now = None
        if now is None or (now.size, now.version) != (entry.size, entry.version):
            raise ChangedCheckpoint(
                f"{checkpoint.uri}/{entry.path} was written again or removed while it was read; "
                "nothing was kept of this reading"
            )


def _content(store: Store, entry: Entry, pool: ThreadPoolExecutor) -> str:
    local = threading.local()
    with store.reader(entry.path) as reader:

        def leaf(start: int) -> bytes:
            if not hasattr(local, "buffer"):
                local.buffer = memoryview(bytearray(min(digests.LEAF_SIZE, entry.size)))
            view = local.buffer[: min(digests.LEAF_SIZE, entry.size - start)]
            reader.read_into(start, view)
            return digests.leaf_digest(view)

        return digests.tree_digest(pool.map(leaf, range(0, entry.size, digests.LEAF_SIZE)))
